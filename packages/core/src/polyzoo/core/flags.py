"""From a command line to a config: preset, then config file, then flags. tyro reads the flags."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import tyro

from polyzoo.core.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """What the command line asked for."""

    config: Any
    """The command's config, complete and checked."""
    json: bool
    """Print one JSON document."""
    quiet: bool
    """Show no progress."""


@dataclass(frozen=True, kw_only=True)
class _Common:
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Take values from a JSON or YAML file; flags go over them."""
    json: bool = False
    """Print one JSON document on stdout instead of text."""
    quiet: bool = False
    """Show no progress and no notes."""


def parse(
    cls: type,
    arguments: Sequence[str],
    *,
    prog: str,
    summary: str,
    presets: Mapping[str, Callable[[], Any]],
) -> Parsed | None:
    """Build a command's config; None where help was asked for (and printed).

    Raises:
        UsageError: In one line: an unknown flag or preset, a bad or a missing value.
    """
    rest = list(arguments)
    helping = bool({"-h", "--help"} & set(rest))
    start = None
    if presets and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        if name not in presets:
            close = difflib.get_close_matches(name, presets, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(presets)}"
            raise UsageError(f"{prog}: no preset {name!r}; {hint}")
        start = presets[name]()
    values = _starting_values(cls, start)
    file = _config_file(rest)
    if file is not None and not helping:
        from polyzoo.core import config as configs  # pydantic and yaml: a help page needs neither

        configs.overlay(cls, values, configs.read_mapping(file), where=str(file))
    _switch_on_parts(cls, values, rest, helping)
    wrapper = dataclasses.make_dataclass(
        "Flags",
        [
            ("command", Annotated[cls, tyro.conf.arg(name="")]),
            ("common", Annotated[_Common, tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff]),
        ],
    )
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed = tyro.cli(
                wrapper,
                args=rest,
                prog=f"{prog} [PRESET]" if presets and helping else prog,
                description=_description(summary, presets),
                default=wrapper(_with_holes(cls, values), _Common()),
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as exit_:
        if not exit_.code:
            return None
        problem = _one_line(complaint.getvalue()).replace(f"Missing from {prog}", "Missing")
        raise UsageError(f"{prog}: {problem}; see {prog} --help") from None
    except ValueError as error:  # a config's own check
        raise UsageError(f"{prog}: {error}") from None
    return Parsed(config=parsed.command, json=parsed.common.json, quiet=parsed.common.quiet)


def _starting_values(cls: type, start: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in dataclasses.fields(cls):
        if start is not None:
            values[item.name] = getattr(start, item.name)
        elif item.default is not MISSING:
            values[item.name] = item.default
        elif item.default_factory is not MISSING:
            values[item.name] = item.default_factory()
    return values


def _with_holes(cls: type, values: Mapping[str, Any]) -> Any:
    """Return an instance whose required fields are still open; tyro's own will be checked."""
    instance = object.__new__(cls)
    for item in dataclasses.fields(cls):
        object.__setattr__(instance, item.name, values.get(item.name, tyro.MISSING))
    return instance


def _config_file(arguments: Sequence[str]) -> str | None:
    for index, argument in enumerate(arguments):
        following = arguments[index + 1] if index + 1 < len(arguments) else "-"
        if argument == "--config" and not following.startswith("-"):
            return following
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
    return None


def _switch_on_parts(
    cls: type, values: dict[str, Any], arguments: Sequence[str], helping: bool, prefix: str = "--"
) -> None:
    """Give absent parts (`lora: LoraConfig | None = None`) their defaults once a flag names them.

    On a help page all of them are shown.
    """
    hints = get_type_hints(cls)
    for name, value in values.items():
        flag = f"{prefix}{name.replace('_', '-')}."
        named = any(argument.replace("_", "-").startswith(flag) for argument in arguments)
        if value is None and (named or helping):
            kinds = [kind for kind in get_args(hints[name]) if dataclasses.is_dataclass(kind)]
            if len(kinds) == 1 and isinstance(kinds[0], type):
                values[name] = _with_holes(kinds[0], _starting_values(kinds[0], None))
        elif dataclasses.is_dataclass(value) and not isinstance(value, type) and (named or helping):
            inner = _starting_values(type(value), value)
            _switch_on_parts(type(value), inner, arguments, helping, flag)
            values[name] = _with_holes(type(value), inner)


def _description(summary: str, presets: Mapping[str, Callable[[], Any]]) -> str:
    lines = [f"{summary}."]
    if presets:
        lines += ["", "PRESET is one of:"]
        for name, preset in presets.items():
            about = (preset.__doc__ or "").strip().splitlines()
            lines.append(f"  {name}: {about[0] if about else ''}".rstrip(": "))
    return "\n".join(lines)


def _one_line(box: str) -> str:
    """Turn tyro's framed complaint into one line."""
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", row) for row in box.splitlines()]
    text = " ".join(row.strip("│|╭╮╰╯ ") for row in rows if not re.match(r"\s*[╭╰]", row))
    parts = [" ".join(part.split()) for part in re.split(r"[─-]{8,}", text)]
    kept = [
        part for part in parts if part and not part.startswith(("For full helptext", "Argument"))
    ]
    return "; ".join(kept).rstrip(".") or "the command line cannot be understood"
