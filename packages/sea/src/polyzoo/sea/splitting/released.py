"""The published splitters with their faults, to compare with published numbers. Torch-free.

What is wrong with them, and kept here on purpose: preparing collapses the indentation of Python;
the syntax-tree splitter loses the text after its last cut, ignores the caller's `min_line` below
the top, and uses byte columns as character columns; one window means "not split", and one item
gives no window at all. Nothing else in this package uses this module.
"""

from __future__ import annotations

import io
import re
import tokenize as python_tokenize
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

from polyzoo.sea.splitting import languages

if TYPE_CHECKING:
    import tree_sitter

Item = TypeVar("Item")
Point = tuple[int, int]

MAX_DEPTH = 4
"""Nodes deeper than this give no cut point; the root has depth 0."""
WINDOW_MARGIN = 20
"""Pieces a token or word window may have beyond its number of items."""
INNER_MIN_LINE = 5
"""The row distance used below the top, whatever the caller asks for."""

_DOCSTRING = re.compile(r'""".*?"""', re.DOTALL)
_SPACES = re.compile(" +")
_COMMENT_OR_STRING = re.compile(
    r"""//.*?$|/\*.*?\*/|'(?:\\.|[^\\'])*'|"(?:\\.|[^\\"])*\"""", re.DOTALL | re.MULTILINE
)


def prepare(source: str, *, language: str) -> str:
    """The text before splitting: for Python without its first triple-quoted span; single spaces."""
    if language == "python":
        source = _DOCSTRING.sub(" ", source, count=1)
    return _SPACES.sub(" ", source)


def sliding_windows(items: Sequence[Item], *, window: int, step: int) -> list[Sequence[Item]]:
    """Windows at 0, step, 2*step, ... below `len(items) - 1`; none for fewer than two items."""
    return [items[start : start + window] for start in range(0, len(items) - 1, step)]


def remove_comments(source: str, *, language: str) -> str:
    """The text without comments (and Python docstrings) and without blank lines.

    Raises:
        Exception: whatever Python's tokenizer says about a broken text; callers keep the text then.
    """
    if language == "ruby":
        return source
    if language == "python":
        stripped = _remove_python_comments(source)
    else:
        stripped = _COMMENT_OR_STRING.sub(
            lambda match: " " if match.group().startswith("/") else match.group(), source
        )
    return "\n".join(line for line in stripped.split("\n") if line.strip())


def strip_comments(source: str, *, language: str) -> str:
    """As `remove_comments`, or the text unchanged where that fails."""
    try:
        return remove_comments(source, language=language)
    except (python_tokenize.TokenError, SyntaxError, ValueError):
        return source


def lexer_tokens(code: str, *, language: str) -> list[str]:
    """Texts of the leaves of the syntax tree; a `string` node is a leaf, comments are left out."""
    code = wrap(code, language=language)
    root = _root(code, language)
    lines = code.split("\n")
    return [
        _between(lines, node.start_point, node.end_point)
        for node in languages.leaves(root)
        if node.type != "comment"
    ]


def start_points(code: str, *, language: str, min_line: int) -> list[Point]:
    """(row, byte column) of the cut points of a comment-stripped text."""
    return _points(_root(code, language), 0, min_line)


def ast_pieces(code: str, *, language: str, min_line: int = INNER_MIN_LINE) -> list[str]:
    """The text between cut points; what follows the last one is lost."""
    code = wrap(strip_comments(code, language=language), language=language)
    points = start_points(code, language=language, min_line=min_line)
    if len(points) < 2:
        return [code]
    lines = code.split("\n")
    return [
        "\n".join(lines[first[0] : second[0]]) + lines[second[0]][: second[1]]
        for first, second in pairwise(points)
    ]


def piece_count(tokens: Sequence[str], count: Callable[[str], int]) -> int:
    """Encoder pieces of a token list: token 0 as it is, the others as if a space came before.

    Args:
        tokens: Lexer tokens.
        count: Number of byte-pair pieces of a text.
    """
    if not tokens:
        return 0
    # "@ token" less its first piece leaves the token with the mark of a space before it.
    return count(tokens[0]) + sum(count("@ " + token) - 1 for token in tokens[1:])


def windows(
    source: str, *, language: str, kind: str, window: int, step: int, min_line: int = 3
) -> list[list[str]]:
    """The windows of one function as lists of items; fewer than two mean that it stays whole."""
    if kind == "token":
        items = lexer_tokens(strip_comments(source, language=language), language=language)
    elif kind == "ast":
        items = ast_pieces(prepare(source, language=language), language=language, min_line=min_line)
    else:
        items = prepare(source, language=language).split("\n" if kind == "line" else " ")
    return [list(items) for items in sliding_windows(items, window=window, step=step)]


def window_text(items: Sequence[str], *, kind: str) -> str:
    """A window as one text: tree pieces joined by line ends, lines and words by a space."""
    return ("\n" if kind == "ast" else " ").join(items)


def wrap(code: str, *, language: str) -> str:
    """PHP text between the tags that the published code parses it with; the tags stay in it."""
    return f"<?php{code}?>" if language == "php" else code


def _root(code: str, language: str) -> tree_sitter.Node:
    return languages.parser(language).parse(code.encode()).root_node


def _points(node: tree_sitter.Node, depth: int, min_line: int) -> list[Point]:
    if depth > MAX_DEPTH:
        return []
    found: list[Point] = []
    if node.child_count and node.type != "comment":
        found.append((node.start_point[0], node.start_point[1]))
        for child in node.children:
            found.extend(_points(child, depth + 1, INNER_MIN_LINE))
    kept = found[:1]
    for point in found[1:]:
        if point[0] - kept[-1][0] > min_line:
            kept.append(point)
    return kept


def _between(lines: list[str], start: Point, end: Point) -> str:
    if start[0] == end[0]:
        return lines[start[0]][start[1] : end[1]]
    inner = lines[start[0] + 1 : end[0]]
    return "".join([lines[start[0]][start[1] :], *inner, lines[end[0]][: end[1]]])


def _remove_python_comments(source: str) -> str:
    out: list[str] = []
    previous = python_tokenize.INDENT
    last_line, last_column = -1, 0
    for kind, text, (line, column), (end_line, end_column), _ in python_tokenize.generate_tokens(
        io.StringIO(source).readline
    ):
        if line > last_line:
            last_column = 0
        if column > last_column:
            out.append(" " * (column - last_column))
        if kind == python_tokenize.STRING:
            statement = previous in (python_tokenize.INDENT, python_tokenize.NEWLINE)
            if not statement and column > 0:
                out.append(text)
        elif kind != python_tokenize.COMMENT:
            out.append(text)
        previous = kind
        last_line, last_column = end_line, end_column
    return "".join(out)
