"""From source files to CodeSearchNet records, in parallel. Torch-free."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyzoo.core.errors import DataError
from polyzoo.sea.corpus import filters
from polyzoo.sea.search.units import Unit, units_of
from polyzoo.sea.splitting import languages
from polyzoo.sea.splitting.documentation import summary
from polyzoo.sea.splitting.parsing import ParsedSource


@dataclass(frozen=True, kw_only=True, slots=True)
class MineTask:
    """Some files of one package and the rules for them; plain values, for another process."""

    root: Path
    files: tuple[str, ...]
    repo: str
    version: str
    license: str
    partition: str
    min_lines: int
    min_words: int
    max_doc_tokens: int
    keep_undocumented: bool


@dataclass(kw_only=True, slots=True)
class MinedFile:
    """What one file gave."""

    records: list[dict[str, Any]] = field(default_factory=list)
    functions: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failure: str | None = None


def mine_files(task: MineTask) -> list[MinedFile]:
    """The records of every file of a task, in its order. A file that cannot be read is reported."""
    return [_mine_file(task, path) for path in task.files]


def _mine_file(task: MineTask, path: str) -> MinedFile:
    mined = MinedFile()
    language = languages.detect(path)
    reason = filters.refused_path(path)
    if language is None or reason is not None:
        mined.refused[reason or "not source"] += 1
        return mined
    try:
        source = languages.decode_source((task.root / path).read_bytes(), path=path)
        tree = ParsedSource(source, language=language)
    except (DataError, OSError) as error:
        mined.failure = str(error)
        mined.refused["unreadable file"] += 1
        return mined
    units = [unit for unit in units_of(tree, path=path) if unit.kind in ("function", "method")]
    mined.functions = len(units)
    for unit in units:
        _mine_unit(task, mined, tree, unit, path)
    return mined


def _mine_unit(task: MineTask, mined: MinedFile, tree: ParsedSource, unit: Unit, path: str) -> None:
    language = tree.language
    original = tree.text[unit.definition_start : unit.end]
    code = original
    span = unit.docstring_span
    inside = span is not None and span[0] >= unit.definition_start
    if span is not None and inside:
        code = _without(tree.text, unit.definition_start, unit.end, span)
    reason = filters.refused_code(unit, code, language=language, min_lines=task.min_lines)
    if reason is not None:
        mined.refused[reason] += 1
        return
    first_paragraph = summary(unit.docstring or "")
    reason = filters.refused_summary(
        first_paragraph, min_words=task.min_words, max_tokens=task.max_doc_tokens
    )
    if reason is not None:
        mined.refused[reason] += 1
        if not task.keep_undocumented:
            return
        first_paragraph = ""
    mined.records.append(
        {
            "repo": task.repo,
            "path": path,
            "func_name": unit.symbol,
            "original_string": original,
            "language": language,
            "code": code,
            "code_tokens": _tokens(tree, unit, span if inside else None),
            "docstring": (unit.docstring or "") if first_paragraph else "",
            "docstring_tokens": filters.lexemes(first_paragraph),
            "sha": hashlib.sha256(original.encode("utf-8", "replace")).hexdigest(),
            "url": f"{task.repo}@{task.version}/{path}#L{unit.first_line}-L{unit.last_line}",
            "partition": task.partition,
            "license": task.license,
            "version": task.version,
        }
    )


def _tokens(tree: ParsedSource, unit: Unit, docstring: tuple[int, int] | None) -> list[str]:
    tokens = []
    for node in tree.lexer_nodes(unit.definition_start, unit.end):
        start, end = tree.span(node)
        if docstring is None or not docstring[0] <= start < docstring[1]:
            tokens.append(tree.text[start:end])
    return tokens


def _without(text: str, start: int, end: int, hole: tuple[int, int]) -> str:
    """`text[start:end]` without the hole, and without the lines that are blank because of it."""
    before, after = text[start : hole[0]], text[hole[1] : end]
    tail = after.lstrip(" \t;")
    if tail[:1] in ("\n", "\r") or not tail:
        line = before.rfind("\n") + 1
        if line and not before[line:].strip():
            return before[:line] + tail.removeprefix("\r").removeprefix("\n")
        return before.rstrip(" \t") + tail
    return before + tail
