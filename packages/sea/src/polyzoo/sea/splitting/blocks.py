"""Source text -> code blocks for the encoder. Torch-free.

The function is tokenised once. Its blocks are slices of its pieces, so that nothing can get lost
between text and blocks, and each block knows the characters and lines it came from.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from polyzoo.core.errors import DataError
from polyzoo.core.log import get_logger
from polyzoo.sea.config import SplitConfig
from polyzoo.sea.splitting import borders, released, windows
from polyzoo.sea.splitting.cuts import Border, choose_cuts
from polyzoo.sea.splitting.parsing import LineIndex
from polyzoo.sea.splitting.pieces import Pieces as Pieces
from polyzoo.sea.splitting.pieces import PreparedSource, prepare_source
from polyzoo.sea.splitting.pieces import Tokenize as Tokenize

MAX_ERROR_SHARE = 0.25
"""With more of the text inside error nodes, the tree says nothing about where to cut."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A run of a function's pieces."""

    ids: list[int]
    start: int
    """First character in the text given to `split`; a repeated signature is not counted."""
    end: int
    first_line: int
    """Counted from 0 in that text."""
    last_line: int
    kind: str
    """The syntax node that begins here, or the window kind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The blocks of one function."""

    blocks: tuple[Block, ...]
    whole: list[int]
    """Pieces of the function, uncut."""
    fallback: str | None
    """Why line borders were used instead of the syntax tree."""
    dropped_blocks: int
    """Blocks left out because there were more than `max_blocks`."""


def split(text: str, *, language: str, config: SplitConfig, tokenize: Tokenize) -> Split:
    """Cut a function into blocks of at most `config.budget` pieces.

    Comments (unless kept) and docstrings (unless kept) do not reach the encoder, and runs of white
    space count as one space. With the fair profile and no overlap every remaining piece is in
    exactly one block; step below window repeats pieces on purpose.

    Args:
        text: A function, a method, or any other stretch of source.
        language: One of the six.
        config: How to cut.
        tokenize: The encoder's tokenizer.

    Raises:
        ConfigError: unknown language.
        DataError: nothing but comments and documentation, or a signature that fills the budget.
        MissingExtraError: the language's grammar is not installed.

    Example:
        >>> found = split(source, language="python", config=SplitConfig(), tokenize=tokenize)
        >>> found.blocks[0].first_line
        0
    """
    if config.profile == "released":
        return _split_released(text, language, config, tokenize)
    prepared = prepare_source(text, language, config, tokenize)
    fallback = None
    if config.kind == "ast":
        ranges, fallback = _ast_ranges(prepared, config)
    else:
        ranges = _window_ranges(prepared, config)
    repeated = prepared.pieces.ids[: _head_size(prepared, config)] if len(ranges) > 1 else []
    kept = _thinned(ranges, config.max_blocks)
    lines = LineIndex(text)
    blocks = tuple(
        _block(prepared, lines, first, last, label, repeated if first else [])
        for first, last, label in kept
    )
    return Split(
        blocks=blocks,
        whole=prepared.pieces.ids,
        fallback=fallback,
        dropped_blocks=len(ranges) - len(kept),
    )


def _ast_ranges(
    prepared: PreparedSource, config: SplitConfig
) -> tuple[list[tuple[int, int, str]], str | None]:
    size = len(prepared.pieces.ids)
    share = prepared.tree.error_share
    fallback = None
    if share >= MAX_ERROR_SHARE:
        fallback = f"line borders: syntax errors cover {share:.0%} of the text"
    first_label = prepared.tree.first_type()
    if size <= config.budget:
        return [(0, size, first_label)], fallback
    signature = _signature_size(prepared)
    # What is repeated stands before every block, so only the rest is cut.
    head = _head_size(prepared, config)
    capacity = config.budget - config.overlap - head
    if capacity < 1:
        raise DataError(
            f"budget={config.budget} leaves no room for code beside the repeated signature of "
            f"{head} pieces and overlap={config.overlap}; raise the budget, lower "
            f"signature_pieces={config.signature_pieces}, or set repeat_signature=False"
        )
    if fallback is None:
        tree_borders = borders.TreeBorders(prepared.tree, prepared.text, prepared.starts)
        levels = tree_borders.levels(keep_together=signature)
        if _has_gap(levels[1], size, capacity):
            levels.append(tree_borders.tokens())
    else:
        levels = [borders.line_borders(prepared.text, prepared.starts)]
    levels = [[border for border in level if border.index > head] for level in levels]
    cuts = choose_cuts(levels, start=head, end=size, capacity=capacity, min_size=config.min_tokens)
    labels: dict[int, str] = {
        border.index: border.label for level in reversed(levels) for border in level
    }
    ranges = [(0, [*cuts, size][1], first_label)]
    ranges.extend(
        (max(first - config.overlap, head), last, labels.get(first, "piece"))
        for first, last in pairwise([*cuts[1:], size])
    )
    return ranges, fallback


def _has_gap(level: list[Border], size: int, capacity: int) -> bool:
    """Whether some part is still too large, so that finer borders are worth looking for."""
    edges = [0, *(border.index for border in level), size]
    return any(last - first > capacity for first, last in pairwise(edges))


def _window_ranges(prepared: PreparedSource, config: SplitConfig) -> list[tuple[int, int, str]]:
    size = len(prepared.pieces.ids)
    positions = windows.item_positions(config.kind, prepared.tree, prepared.text, prepared.starts)
    edges = [*positions, size]
    found = windows.window_ranges(len(positions), window=config.window, step=config.step)
    return [
        (first, last, f"{config.kind} window")
        for begin, end in found
        for first, last in windows.chop(edges[begin], edges[end], budget=config.budget)
    ]


def _signature_size(prepared: PreparedSource) -> int:
    """Pieces before the body of the function; 0 when there is none."""
    offset = borders.body_start(prepared.tree)
    return 0 if offset is None else bisect_left(prepared.starts, offset)


def _head_size(prepared: PreparedSource, config: SplitConfig) -> int:
    """Pieces of the signature that stand before every block: a long one is cut."""
    if not config.repeat_signature or config.kind != "ast":
        return 0
    return min(_signature_size(prepared), config.signature_pieces)


def _thinned(ranges: list[tuple[int, int, str]], most: int) -> list[tuple[int, int, str]]:
    count = len(ranges)
    if count <= most:
        return ranges
    _warn_thinned(most)
    if most == 1:
        return ranges[:1]
    return [ranges[round(index * (count - 1) / (most - 1))] for index in range(most)]


@cache
def _warn_thinned(most: int) -> None:
    get_logger("polyzoo.sea").warning(
        "a function has more than max_blocks=%d blocks: evenly spaced ones are kept, and "
        "Split.dropped_blocks counts the rest (said once)",
        most,
    )


def _block(
    prepared: PreparedSource,
    lines: LineIndex,
    first: int,
    last: int,
    kind: str,
    repeated: list[int],
) -> Block:
    spans = prepared.pieces.spans[first:last]
    start = spans[0][0]
    end = spans[-1][1]
    return Block(
        ids=[*repeated, *prepared.pieces.ids[first:last]],
        start=start,
        end=end,
        first_line=lines.line(start),
        last_line=lines.line(max(end - 1, start)),
        kind=kind,
    )


def _split_released(text: str, language: str, config: SplitConfig, tokenize: Tokenize) -> Split:
    """Blocks of the published code; their text is rewritten, so all point at the whole text."""
    limit = config.budget
    if config.kind in ("token", "space"):
        limit = min(limit, config.window + released.WINDOW_MARGIN)
    stripped = released.strip_comments(text, language=language)
    whole = _released_ids(released.lexer_tokens(stripped, language=language), tokenize)
    if not whole:
        raise DataError(f"{text[:60]!r}: no code is left without comments and documentation")
    found = released.windows(
        text,
        language=language,
        kind=config.kind,
        window=config.window,
        step=config.step,
        min_line=config.min_line,
    )
    entries = [whole[: config.budget]]
    for items in found if len(found) > 1 else []:
        if config.kind == "token":
            tokens = items
        else:
            block = released.window_text(items, kind=config.kind)
            tokens = released.lexer_tokens(block, language=language) if block else []
        ids = _released_ids(tokens, tokenize)[:limit]
        if ids:
            entries.append(ids)
    # The caller adds the truncated whole function itself, if it wants it among the entries.
    kept = entries[1:] or entries
    numbered = [(index, index, "") for index in range(len(kept))]
    chosen = [kept[index] for index, _, _ in _thinned(numbered, config.max_blocks)]
    last_line = text.rstrip().count("\n")
    kind = f"released {config.kind} window"
    return Split(
        blocks=tuple(
            Block(ids=ids, start=0, end=len(text), first_line=0, last_line=last_line, kind=kind)
            for ids in chosen
        ),
        whole=whole,
        fallback=None,
        dropped_blocks=len(kept) - len(chosen),
    )


def _released_ids(tokens: list[str], tokenize: Tokenize) -> list[int]:
    """Pieces of lexer tokens one by one, every one but the first as if a space came before it."""
    ids: list[int] = []
    for position, token in enumerate(tokens):
        pieces = tokenize(f"@ {token}" if position else token).ids
        ids.extend(pieces[1:] if position else pieces)
    return ids
