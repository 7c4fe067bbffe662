"""What a search answers, and how it looks in a terminal. Torch-free."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Literal

Drift = Literal["moved", "changed", "gone"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeLine:
    """One line of a hit."""

    number: int
    """In the file, counted from 1."""
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BestBlock:
    """The part of a hit that fits the query best."""

    first_line: int
    last_line: int
    score: float | None
    """Inner product with the query; None where words decided."""
    lines: tuple[CodeLine, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """One unit found, and why."""

    rank: int
    path: str
    first_line: int
    last_line: int
    symbol: str
    kind: str
    language: str
    signature: str
    summary: str
    """First line of the documentation."""
    score: float
    """What hits are ordered by: in hybrid mode the sum of weight / (60 + rank) over both lists."""
    vector_rank: int | None
    """Place in the list by vectors; None where it is not among those compared."""
    vector_score: float | None
    lexical_rank: int | None
    lexical_score: float | None
    """BM25 over symbol, path, documentation and words of the code."""
    block: BestBlock | None
    drift: Drift | None
    """How the file has changed since it was indexed: the unit moved (the lines here are the new
    ones), changed too, or cannot be found any more (the lines are the old ones)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """The hits, and what is to be known before trusting them."""

    query: str
    mode: str
    """The mode used: hybrid falls back to lexical while there are no vectors."""
    index: str
    repo: str
    model_id: str
    units: int
    coverage: float
    """Share of the units that have a vector."""
    stale_files: int | None
    """Files changed, added or removed since they were indexed; None where that was not checked."""
    notices: tuple[str, ...]
    """Why results may be incomplete or out of date, and what to do about it."""
    took_ms: dict[str, float]
    hits: tuple[Hit, ...]

    @property
    def exit_code(self) -> int:
        """1 when nothing was found, as grep has it."""
        return 0 if self.hits else 1


def render(result: SearchResult) -> str:
    """Show hits for people: place, symbol, score and its reasons, best block."""
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    lines: list[str] = []
    for hit in result.hits:
        lines += [*_head(hit, color), *_code(hit, color), ""]
    if not result.hits:
        lines += [f"no hit for {result.query!r} among {result.units:,} units", ""]
    lines += [_paint(f"note: {notice}", "33", color) for notice in result.notices]
    total = result.took_ms.get("total", 0.0)
    lines.append(_paint(f"{len(result.hits)} hits, {result.mode}, {total:.0f} ms", "2", color))
    return "\n".join(lines)


def _head(hit: Hit, color: bool) -> list[str]:
    place = _paint(f"{hit.path}:{hit.first_line}", "36", color)
    symbol = _paint(hit.symbol, "1", color)
    drift = _paint(f" [{hit.drift} since indexing]", "33", color) if hit.drift else ""
    reasons = []
    if hit.vector_rank is not None:
        reasons.append(f"meaning #{hit.vector_rank} ({hit.vector_score:.3f})")
    if hit.lexical_rank is not None:
        reasons.append(f"words #{hit.lexical_rank} ({hit.lexical_score:.1f})")
    why = _paint(f"{hit.score:.4f} = {' + '.join(reasons)}", "2", color)
    head = [f"{hit.rank:>2}. {place}  {symbol}{drift}  {hit.kind}  {why}"]
    if hit.summary:
        head.append(_paint(f"    {hit.summary}", "3", color))
    return head


def _code(hit: Hit, color: bool) -> list[str]:
    if hit.block is None:
        return []
    width = len(str(hit.block.lines[-1].number)) if hit.block.lines else 1
    shown = []
    for line in hit.block.lines:
        best = hit.block.first_line <= line.number <= hit.block.last_line
        mark = "|" if best else " "
        text = _paint(line.text, "32", color) if best else line.text
        shown.append(f"    {line.number:>{width}} {mark} {text}")
    if hit.block.lines and hit.block.lines[-1].number < hit.block.last_line:
        shown.append(f"    {'':>{width}}   ... to line {hit.block.last_line}")
    return shown


def _paint(text: str, style: str, color: bool) -> str:
    return f"\x1b[{style}m{text}\x1b[0m" if color else text
