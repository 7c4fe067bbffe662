"""Where a syntax tree allows cuts, from between statements down to between tokens. Torch-free."""

from __future__ import annotations

import re
from bisect import bisect_left
from typing import TYPE_CHECKING

from polyzoo.sea.splitting import languages
from polyzoo.sea.splitting.cuts import Border
from polyzoo.sea.splitting.parsing import ParsedSource

if TYPE_CHECKING:
    import tree_sitter

# Nodes whose children are statements or members, in any of the six languages.
_BLOCKS = frozenset(
    (
        *("module", "program", "source_file", "block", "statement_block", "compound_statement"),
        *("class_body", "constructor_body", "interface_body", "enum_body", "annotation_type_body"),
        *("enum_body_declarations", "declaration_list", "field_declaration_list", "object"),
        *("body_statement", "block_body", "statement_list", "then", "do", "do_block", "begin"),
        *("begin_block", "else", "else_clause", "ensure", "rescue", "when", "switch_body"),
        *("switch_block", "switch_block_statement_group", "switch_case", "switch_default"),
        *("case_statement", "default_statement", "expression_case", "type_case", "default_case"),
        "communication_case",
    )
)
_LINE = re.compile(r"^[^\S\n]*(\S)", re.MULTILINE)
_LONG_LINE = 256
"""Bytes above which a node on one line is looked into as well (minified code)."""
_DEPTH_COST = 0.3


class TreeBorders:
    """Borders of one text as positions in its sequence of pieces.

    Args:
        tree: The parsed text.
        text: The same text with what is left out blanked.
        starts: Character offset of every piece, ascending.
    """

    def __init__(self, tree: ParsedSource, text: str, starts: list[int]) -> None:
        self._tree = tree
        self._starts = starts
        self._line_starts = {match.start(1) for match in _LINE.finditer(text)}

    def levels(self, *, keep_together: int) -> list[list[Border]]:
        """Borders between statements, then where another node begins a line.

        Args:
            keep_together: A position (the end of the signature) at which not to cut.
        """
        best: dict[int, Border] = {}
        pending: list[tuple[tree_sitter.Node, int]] = [(self._tree.root, 0)]
        while pending:
            node, depth = pending.pop()
            is_block = node.type in _BLOCKS
            for position, child in enumerate(node.named_children):
                if child.type in self._tree.grammar.comments or self._tree.is_outside(child):
                    continue
                offset = self._tree.offset(child.start_byte)
                begins_line = offset in self._line_starts
                if begins_line or (is_block and position):
                    self._add(best, offset, child, depth, is_block=is_block)
                long = child.end_byte - child.start_byte > _LONG_LINE
                if long or child.type in _BLOCKS or child.start_point[0] != child.end_point[0]:
                    pending.append((child, depth + is_block))
        best.pop(keep_together, None)
        ordered = [best[index] for index in sorted(best)]
        return [
            [border for border in ordered if border.level == 1],
            ordered,
        ]

    def tokens(self) -> list[Border]:
        """Borders between lexer tokens."""
        found: dict[int, Border] = {}
        for node in self._tree.lexer_nodes():
            index = bisect_left(self._starts, self._tree.offset(node.start_byte))
            if 0 < index < len(self._starts):
                found.setdefault(index, Border(index, 3, 2.0, node.type))
        return [found[index] for index in sorted(found)]

    def _add(
        self,
        best: dict[int, Border],
        offset: int,
        child: tree_sitter.Node,
        depth: int,
        *,
        is_block: bool,
    ) -> None:
        index = bisect_left(self._starts, offset)
        if not 0 < index < len(self._starts):
            return
        level = 1 if is_block else 2
        border = Border(index, level, depth * _DEPTH_COST + (level - 1), child.type)
        known = best.get(index)
        if known is None or (border.level, border.cost) < (known.level, known.cost):
            best[index] = border


def line_borders(text: str, starts: list[int]) -> list[Border]:
    """Borders at the start of every line that is not blank."""
    found = {}
    for match in _LINE.finditer(text):
        index = bisect_left(starts, match.start(1))
        if 0 < index < len(starts):
            found[index] = Border(index, 1, 0.0, "line")
    return [found[index] for index in sorted(found)]


def body_start(tree: ParsedSource) -> int | None:
    """Where the body of the first definition begins: the end of the signature."""
    query = languages.definitions_query(tree.language)
    found = languages.captures(query, tree.root)
    for node in found.get("function", [])[:1]:
        for candidate in (node, *(node.child_by_field_name(name) for name in ("value", "right"))):
            body = candidate.child_by_field_name("body") if candidate is not None else None
            if body is not None:
                return tree.offset(body.start_byte)
    return None
