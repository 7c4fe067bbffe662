"""Which files of a repository are worth indexing, and why the others are not. Torch-free."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pathspec import GitIgnoreSpec

from polyzoo.core.errors import DataError
from polyzoo.sea.search.ignores import (
    IgnoreFile,
    compile_patterns,
    ignores_above,
    is_ignored,
    read_ignore,
)
from polyzoo.sea.splitting.languages import detect

MAX_FILE_BYTES = 1_000_000
MAX_LINE = 2_000
_SNIFF_BYTES = 8_192
_EXAMPLES = 20

VENDORED = frozenset(
    {
        "node_modules",
        "bower_components",
        "jspm_packages",
        "vendor",
        "_vendor",
        "third_party",
        "thirdparty",
        "Pods",
        "site-packages",
        "venv",
        "virtualenv",
    }
)
_CACHES = frozenset({"__pycache__", ".git"})
_GENERATED_NAME = re.compile(r"_pb2(_grpc)?\.pyi?$|\.min\.|\.pb\.go$|_generated\.go$|-min\.js$")
_GENERATED_GO = re.compile(rb"^// Code generated .* DO NOT EDIT\.\r?$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to index: its place and language, and the numbers that say whether it changed."""

    path: str
    """Relative to the repository, with forward slashes."""
    language: str
    size: int
    mtime_ns: int


@dataclass(slots=True)
class Skipped:
    """How many entries were left out for each reason, with the first few of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, path: str) -> None:
        """Count one entry."""
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(path)


@dataclass(frozen=True, kw_only=True, slots=True)
class WalkRules:
    """What the caller wants of a repository."""

    languages: tuple[str, ...] = ()
    """Only these; all known ones when empty."""
    include: tuple[str, ...] = ()
    """Only files that match one of these patterns (.gitignore syntax); all when empty."""
    exclude: tuple[str, ...] = ()
    """No file or folder that matches one of these patterns (.gitignore syntax)."""
    gitignore: bool = True
    """Obey .gitignore files."""
    vendored: bool = False
    """Enter vendored and hidden folders too."""


def walk(root: Path, rules: WalkRules, skipped: Skipped) -> Iterator[SourceFile]:
    """Yield the source files under `root` by folder and name; symbolic links are not followed.

    Files are judged by name, size and place alone: `reason_to_skip` judges their content, so that a
    walk that only asks what changed reads nothing.

    Raises:
        DataError: `root` is not a folder that can be read.
    """
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"{root} {problem}; give the folder of a repository")
    try:
        os.listdir(root)  # noqa: PTH208 - only whether it may be read
    except OSError as error:
        raise DataError(
            f"{root} cannot be read ({error.strerror}); check its permissions"
        ) from None
    root = root.resolve()
    include = compile_patterns(rules.include, option="include") if rules.include else None
    exclude = compile_patterns(rules.exclude, option="exclude")
    ignores = ignores_above(root) if rules.gitignore else []
    stack: list[tuple[str, list[IgnoreFile]]] = [("", ignores)]
    while stack:
        folder, ignores = stack.pop()
        try:
            with os.scandir(root / folder) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            skipped.add(f"unreadable folder ({error.strerror})", folder)
            continue
        if rules.gitignore and any(entry.name == ".gitignore" for entry in entries):
            own = read_ignore(root / folder / ".gitignore")
            ignores = [*ignores, IgnoreFile(folder, "", own)] if own else ignores
        folders: list[tuple[str, list[IgnoreFile]]] = []
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_symlink():
                # Only a link that would have mattered is worth a word.
                if detect(entry.name) or entry.is_dir():
                    skipped.add("symbolic link", path)
            elif entry.is_dir(follow_symlinks=False):
                reason = _folder_reason(entry, path, rules, exclude, ignores)
                if reason:
                    skipped.add(reason, path + "/")
                else:
                    folders.append((path, ignores))
            else:
                file = _judge(entry, path, rules, include, exclude, ignores, skipped)
                if file:
                    yield file
        stack.extend(reversed(folders))


def reason_to_skip(data: bytes, path: str) -> str | None:
    """Judge a file by its content: binary, minified or generated; None when it is source."""
    if b"\0" in data:
        return "binary (NUL bytes)"
    if path.endswith(".go") and _GENERATED_GO.search(data[:_SNIFF_BYTES]):
        return "generated"
    # One long literal in hand-written code is no reason to lose the file's functions.
    long = sum(len(line) for line in data.split(b"\n") if len(line) > MAX_LINE)
    if long * 2 > len(data):
        return f"minified (most text in lines above {MAX_LINE:,} characters)"
    return None


def _folder_reason(
    entry: os.DirEntry[str],
    path: str,
    rules: WalkRules,
    exclude: GitIgnoreSpec,
    ignores: Sequence[IgnoreFile],
) -> str | None:
    if entry.name in _CACHES:
        return "cache folder"
    if not rules.vendored:
        if entry.name.startswith("."):
            return "hidden folder"
        if entry.name in VENDORED or Path(entry.path, "pyvenv.cfg").exists():
            return "vendored folder"
    if not _is_text(path):
        return "name is not UTF-8"
    if exclude.match_file(path + "/"):
        return "excluded"
    if is_ignored(path + "/", ignores):
        return ".gitignore"
    return None


def _judge(
    entry: os.DirEntry[str],
    path: str,
    rules: WalkRules,
    include: GitIgnoreSpec | None,
    exclude: GitIgnoreSpec,
    ignores: Sequence[IgnoreFile],
    skipped: Skipped,
) -> SourceFile | None:
    language = detect(entry.name)
    if language is None:
        skipped.add("not a known language", path if _is_text(path) else repr(path))
        return None
    reason = None
    if rules.languages and language not in rules.languages:
        reason = "language not asked for"
    elif not _is_text(path):
        reason, path = "name is not UTF-8", repr(path)
    elif exclude.match_file(path):
        reason = "excluded"
    elif include is not None and not include.match_file(path):
        reason = "not included"
    elif is_ignored(path, ignores):
        reason = ".gitignore"
    elif _GENERATED_NAME.search(entry.name):
        reason = "generated"
    if reason is None:
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError as error:
            reason = f"unreadable file ({error.strerror})"
        else:
            if not stat.S_ISREG(status.st_mode):
                reason = "not a regular file"
            elif status.st_size > MAX_FILE_BYTES:
                reason = f"above {MAX_FILE_BYTES:,} bytes"
            else:
                return SourceFile(path, language, status.st_size, status.st_mtime_ns)
    skipped.add(reason, path)
    return None


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8 arrive as lone surrogates
        return False
    return True
