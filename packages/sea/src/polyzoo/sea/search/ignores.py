"""Patterns in .gitignore syntax: the user's, and the nested ones of a repository. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from polyzoo.core.errors import ConfigError


def compile_patterns(patterns: Sequence[str], *, option: str) -> GitIgnoreSpec:
    """Read patterns in .gitignore syntax.

    Raises:
        ConfigError: one of them is not a pattern; the message names it and the option.
    """
    for pattern in patterns:
        if not _is_pattern(pattern):
            raise ConfigError(
                f"{option}={pattern!r} is not a pattern; use .gitignore syntax, such as src/**/*.py"
            )
    return GitIgnoreSpec.from_lines(patterns)


@dataclass(frozen=True, slots=True)
class IgnoreFile:
    """One .gitignore: its rules see paths relative to its own folder."""

    base: str
    """Folder of the file relative to the root, "" for the root."""
    above: str
    """What to put before a path relative to the root, for a file that lies above it."""
    spec: GitIgnoreSpec


def is_ignored(path: str, ignores: Sequence[IgnoreFile]) -> bool:
    """Ask the deepest .gitignore that has an opinion."""
    for ignore in reversed(ignores):
        relative = path[len(ignore.base) + 1 :] if ignore.base else ignore.above + path
        verdict = ignore.spec.check_file(relative).include
        if verdict is not None:
            return verdict
    return False


def read_ignore(path: Path) -> GitIgnoreSpec | None:
    """Read a .gitignore; None where it cannot be read."""
    if path.is_symlink():  # git does not follow it either
        return None
    try:
        lines = path.read_bytes().decode("utf-8-sig", "replace").splitlines()
    except OSError:
        return None
    try:
        return GitIgnoreSpec.from_lines(lines)
    except ValueError:  # git drops only the pattern it cannot read
        return GitIgnoreSpec.from_lines(line for line in lines if _is_pattern(line))


def _is_pattern(line: str) -> bool:
    try:
        GitIgnoreSpec.from_lines([line])
    except ValueError:
        return False
    return True


def ignores_above(root: Path) -> list[IgnoreFile]:
    """Rules of the git repository that `root` lies in, top first.

    When they ignore `root` itself (a virtual environment inside a clone), whoever asks for it wants
    it all the same, so they do not apply.
    """
    top = next((folder for folder in (root, *root.parents) if (folder / ".git").exists()), None)
    if top is None:
        return []
    parts = root.relative_to(top).parts
    files = [(0, top / ".git" / "info" / "exclude")]
    files += [(depth, top.joinpath(*parts[:depth], ".gitignore")) for depth in range(len(parts))]
    specs = [(depth, spec) for depth, path in files if (spec := read_ignore(path))]
    for depth in range(1, len(parts) + 1):
        for start, spec in reversed(specs):
            if start >= depth:
                continue
            verdict = spec.check_file("/".join(parts[start:depth]) + "/").include
            if verdict:
                return []
            if verdict is False:
                break
    return [
        IgnoreFile("", "".join(f"{part}/" for part in parts[depth:]), spec) for depth, spec in specs
    ]
