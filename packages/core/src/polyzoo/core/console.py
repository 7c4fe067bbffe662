"""What the `polyzoo` command shows: help pages, results, errors. Torch-free."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

from polyzoo.core.log import quietly

_ABOUT = "Models you can read, train and run, sharing one attention and one training loop."


def root_help(groups: Mapping[str, str]) -> str:
    """Return the page of `polyzoo --help`."""
    return "\n".join(
        (
            f"{_bold('polyzoo')}  {_ABOUT}",
            "",
            f"{_bold('usage')}  polyzoo GROUP COMMAND [PRESET] [OPTIONS]",
            "",
            *_table("groups", groups or {"(none)": "no polyzoo package offers commands here"}),
            "",
            "polyzoo GROUP --help lists commands, polyzoo GROUP COMMAND --help explains one.",
            "polyzoo --version names every installed part.",
        )
    )


def group_help(name: str, summary: str, commands: Mapping[str, str]) -> str:
    """Return the page of `polyzoo GROUP --help`."""
    return "\n".join(
        (
            f"{_bold(f'polyzoo {name}')}  {summary}",
            "",
            f"{_bold('usage')}  polyzoo {name} COMMAND [OPTIONS]",
            "",
            *_table("commands", commands),
            "",
            f"polyzoo {name} COMMAND --help explains one. Each takes --config FILE (JSON or YAML;",
            "flags go over it), --json (one JSON document on stdout) and --quiet (no progress).",
        )
    )


def versions() -> str:
    """Return the versions of polyzoo's parts and of what they stand on, importing none of them."""
    points = importlib.metadata.entry_points(group="polyzoo.commands")
    found = {point.dist.name: point.dist.version for point in points if point.dist is not None}
    for name in ("torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "(not installed)"
    found["python"] = platform.python_version()
    own = found.pop("polyzoo-core", "(not installed)")
    parts = ", ".join(f"{name} {found[name]}" for name in sorted(found))
    return f"polyzoo {own} ({parts})"


def as_json(result: Any) -> str:
    """Return a result as one JSON document; numbers that JSON lacks become null."""
    return json.dumps(_plain(result), ensure_ascii=False, allow_nan=False)


def as_lines(result: Any) -> str:
    """Return a result as `key: value` lines."""
    plain = _plain(result)
    if not isinstance(plain, dict):
        return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)
    width = max((len(key) for key in plain), default=0)
    return "\n".join(f"{key + ':':<{width + 2}}{_short(value)}" for key, value in plain.items())


def error_text(error: BaseException, status: int, *, as_json: bool) -> str:
    """Return what stderr gets when a command ends with an error."""
    if not as_json:
        return f"{_bold('polyzoo: error:', sys.stderr)} {error}"
    kind, message = type(error).__name__, str(error)
    return json.dumps({"error": {"type": kind, "message": message, "exit_code": status}})


@contextmanager
def session(*, quiet: bool, stdout_to_stderr: bool) -> Iterator[None]:
    """Show polyzoo's log on stderr while a command runs, and keep stdout clean where asked.

    Args:
        quiet: Only warnings, no progress.
        stdout_to_stderr: Whatever a library prints goes to stderr, since stdout will carry JSON.
    """
    logger = logging.getLogger("polyzoo")
    handler, level = logging.StreamHandler(sys.stderr), logger.level
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    stdout = sys.stdout
    try:
        if stdout_to_stderr:
            sys.stdout = sys.stderr
        with quietly(quiet):
            yield
    finally:
        sys.stdout = stdout
        logger.setLevel(level)
        logger.removeHandler(handler)


def _plain(value: Any) -> Any:
    """Turn dataclasses, paths and NumPy scalars into what JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, PurePath):
        return str(value)
    listed = getattr(value, "tolist", None)  # NumPy scalars and arrays, torch tensors
    if callable(listed):
        return _plain(listed())
    raise TypeError(f"a command's result holds {type(value).__name__}, which JSON cannot")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _table(title: str, rows: Mapping[str, str]) -> list[str]:
    width = max(len(name) for name in rows) if rows else 0
    return [_bold(title), *(f"  {name:<{width}}  {text}" for name, text in rows.items())]


def _bold(text: str, stream: Any = None) -> str:
    terminal = (stream or sys.stdout).isatty() and not os.environ.get("NO_COLOR")
    return f"\x1b[1m{text}\x1b[0m" if terminal else text
