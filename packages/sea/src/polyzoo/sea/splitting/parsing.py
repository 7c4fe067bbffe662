"""A parsed piece of source with character offsets, whatever it took to parse it. Torch-free."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from polyzoo.core.errors import DataError
from polyzoo.sea.splitting import languages

if TYPE_CHECKING:
    import tree_sitter

# Read as blanks: a BOM and NUL (which grammars take for the end).
_BLANKED = {0xFEFF: " ", 0x00: " "}
_NOT_NEWLINE = re.compile(r"[^\r\n]")
_SURROGATE = re.compile("[\ud800-\udfff]")


MAX_QUERY_EFFORT = 200_000_000
"""About a second in the parser library, which cannot be stopped once it runs."""


class ParsedSource:
    """A text and its syntax tree; every offset it gives is in characters of the given text.

    Args:
        text: A file or a lone function or method.
        language: One of the six.

    Raises:
        DataError: the text is too large to be source, or far too broken.
    """

    def __init__(self, text: str, *, language: str) -> None:
        self.language = language
        self.grammar = languages.grammar(language)
        self.text = clean(text)
        size = len(self.text)
        if size > languages.MAX_SOURCE_BYTES:
            raise DataError(
                f"{size:,} characters of {language} source, the limit is "
                f"{languages.MAX_SOURCE_BYTES:,}; this is generated code or data, leave it out"
            )
        self._body = self.text.encode()
        self._prefix, self._tree, self.error_share = self._parse()

    @property
    def root(self) -> tree_sitter.Node:
        """The root node. Its offsets are bytes of the parsed text: use `span` to read them."""
        return self._tree.root_node

    def offset(self, byte: int) -> int:
        """The character offset of a byte offset of the tree."""
        byte = min(max(byte - self._prefix, 0), len(self._body))
        return byte if self._starts is None else int(self._starts[byte])

    def _byte(self, offset: int) -> int:
        if self._starts is None:
            return offset + self._prefix
        return int(np.searchsorted(self._starts, offset)) + self._prefix

    def span(self, node: tree_sitter.Node) -> tuple[int, int]:
        """The characters [start, end) of a node."""
        return self.offset(node.start_byte), self.offset(node.end_byte)

    def node_text(self, node: tree_sitter.Node) -> str:
        """The characters of a node."""
        start, end = self.span(node)
        return self.text[start:end]

    def is_outside(self, node: tree_sitter.Node) -> bool:
        """Whether a node lies wholly in what was put around the text to parse it."""
        start, end = self.span(node)
        return end <= start

    def statement_of(self, node: tree_sitter.Node) -> tree_sitter.Node:
        """The statement a definition is written as: with decorators, export, `const name =`."""
        outer = node
        parent = outer.parent
        while parent is not None and parent.type in self.grammar.wrappers:
            # `var a = function () {}, b = ...` is not one definition's; a decorator is.
            siblings = sum(child.type != "decorator" for child in parent.named_children)
            if siblings > (2 if parent.type in ("call", "assignment_expression") else 1):
                break
            # `private def f` in Ruby, but not a call that takes a long block.
            if self.language == "ruby" and parent.start_point[0] != node.start_point[0]:
                break
            outer = parent
            parent = outer.parent
        return outer

    def first_type(self) -> str:
        """The type of the first statement of the text."""
        node = self.root
        while True:
            children = [
                child
                for child in node.named_children
                if child.type not in self.grammar.comments and not self.is_outside(child)
            ]
            if not children:
                return node.type
            node = children[0]
            # What was put around the text begins before it.
            if node.start_byte >= self._prefix:
                return node.type

    def lexer_nodes(self, start: int = 0, end: int | None = None) -> Iterator[tree_sitter.Node]:
        """Leaf nodes that begin within some characters, without comments; a string is one leaf."""
        end = len(self.text) if end is None else end
        first, last = self._byte(start), self._byte(end)
        top = self.root.descendant_for_byte_range(first, max(last - 1, first)) or self.root
        for node in languages.leaves(top):
            inside = first <= node.start_byte < last
            if inside and node.type not in self.grammar.comments and not self.is_outside(node):
                yield node

    @cached_property
    def comments(self) -> list[tree_sitter.Node]:
        """All comments in text order."""
        query = languages.comments_query(self.language)
        return languages.captures(query, self.root).get("comment", [])

    @cached_property
    def comment_spans(self) -> list[tuple[int, int]]:
        """The characters of every comment in text order, without the line end some grammars add."""
        spans = []
        for node in self.comments:
            start, end = self.span(node)
            while end > start and self.text[end - 1] in "\r\n":
                end -= 1
            if end > start:
                spans.append((start, end))
        return spans

    @cached_property
    def _starts(self) -> np.ndarray | None:
        """Byte offset -> character offset, or None where both are the same."""
        if len(self._body) == len(self.text):
            return None
        data = np.frombuffer(self._body, dtype=np.uint8)
        # A byte that continues a character (10xxxxxx) does not begin one.
        begins = np.cumsum((data & 0xC0) != 0x80)
        return np.append(begins - 1, len(self.text))

    def _parse(self) -> tuple[int, tree_sitter.Tree, float]:
        """Parse as it stands, then inside each shell until one has no errors; keep the best."""
        parser = languages.parser(self.language)
        best: tuple[tuple[float, int], int, tree_sitter.Tree] | None = None
        for before, after in self._shells():
            head = before.encode()
            # Some grammars want a line end after the last statement.
            tree = parser.parse(head + self._body + b"\n" + after.encode())
            if tree.root_node.has_error:
                share, faults = _errors(tree.root_node, len(self._body))
            else:
                share, faults = 0.0, 0
            if best is None or (share, faults) < best[0]:
                best = (share, faults), len(head), tree
            if faults == 0:
                break
        if best is None:
            raise AssertionError("_shells gives at least one way to parse")
        return best[1], best[2], best[0][0]

    def _shells(self) -> list[tuple[str, str]]:
        shells = [("", ""), *self.grammar.method_shells]
        if self.language == "php" and not self.text.lstrip().startswith("<"):
            # Without an opening tag PHP reads everything as literal output, and finds no error.
            shells = [("<?php ", ""), *self.grammar.method_shells]
            if "<?" in self.text:
                shells.append(("", ""))
        return shells


def clean(text: str) -> str:
    """Replace, one for one, the characters that no grammar and no tokenizer takes."""
    if "\x00" in text or "\ufeff" in text:
        text = text.translate(_BLANKED)
    if not text.isascii() and _SURROGATE.search(text):
        text = _SURROGATE.sub("\ufffd", text)
    return text


def blank(text: str, start: int, end: int, holes: list[tuple[int, int]]) -> str:
    """`text[start:end]` with the (sorted) holes turned into spaces; line ends stay."""
    parts = []
    position = start
    for first, last in holes:
        if last > position:
            parts.append(text[position : max(first, position)])
            parts.append(_NOT_NEWLINE.sub(" ", text[max(first, position) : min(last, end)]))
            position = last
    parts.append(text[position:end])
    return "".join(parts)


class LineIndex:
    """Line of a character offset, both counted from 0."""

    def __init__(self, text: str) -> None:
        self._starts = [0, *(match.end() for match in re.finditer("\n", text))]

    def line(self, offset: int) -> int:
        """The line that holds a character."""
        return bisect_right(self._starts, offset) - 1


def _errors(root: tree_sitter.Node, size: int) -> tuple[float, int]:
    """Share of the text inside error nodes, and how many faulty nodes there are."""
    covered, faults, effort, end = 0, 0, 0, 0
    pending = [root]
    while pending:
        node = pending.pop()
        if node.is_error:
            faults += 1
            effort += _query_effort(node)
            # Outer nodes come first, so an error inside an error is not counted again.
            if node.start_byte >= end:
                covered += node.end_byte - node.start_byte
                end = node.end_byte
        elif node.is_missing:
            faults += 1
        pending.extend(child for child in reversed(node.children) if child.has_error)
    if effort > MAX_QUERY_EFFORT:
        raise DataError(
            f"{size:,} bytes of source with thousands of unmatched brackets or operators in a row; "
            "this is damaged or no source, leave it out"
        )
    return min(covered / max(size, 1), 1.0), faults


def _query_effort(node: tree_sitter.Node) -> int:
    """Steps a query needs for the tokens of an error: it looks along every run of them again."""
    if node.child_count < 1_000:
        return 0
    runs = (
        sum(1 for _ in run)
        for named, run in groupby(c.is_named for c in node.children)
        if not named
    )
    return sum(run * run for run in runs)
