"""What an index holds of a file: functions, methods, classes, module-level code. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Literal

from polyzoo.sea.splitting import languages
from polyzoo.sea.splitting.documentation import (
    comment_above,
    plain_comment,
    plain_string,
    string_docstring,
)
from polyzoo.sea.splitting.parsing import LineIndex, ParsedSource, blank

if TYPE_CHECKING:
    import tree_sitter

UnitKind = Literal["function", "method", "class", "module"]

MAX_CLASS_DEPTH = 32
"""Classes nested deeper stay part of the one around them; real code nests three or four."""

_GO_RECEIVER = re.compile(r"([A-Za-z_]\w*)\s*(?:\[.*\])?\s*\)\s*$", re.DOTALL)
_SPACES = re.compile(r"\s+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """One searchable piece of a file.

    `text` has the length and the lines of `source[start:end]`: what is a unit of its own (the
    functions of a class or module) is blanked in it, so offsets in `text` plus `start` are offsets
    in the file.
    """

    symbol: str
    """Qualified name, for example "Class.method"; of a module the file's name without suffix."""
    kind: UnitKind
    start: int
    """First character, decorators included."""
    end: int
    first_line: int
    """Counted from 1."""
    last_line: int
    text: str
    docstring: str | None
    """Documentation without quotes or comment marks, indentation removed."""
    signature: str
    """The head on one line, without the body; empty for a module."""
    definition_start: int
    """First character of the definition itself, after decorators."""
    docstring_span: tuple[int, int] | None
    """Where the documentation stands: inside the unit for Python, above it elsewhere."""
    has_error: bool
    """Whether the parser found a fault inside."""


@dataclass(slots=True)
class _Definition:
    node: tree_sitter.Node
    role: str  # function, class or scope
    outer: tree_sitter.Node
    start: int
    end: int
    name: str
    qualified: str = ""
    in_class: bool = False
    depth: int = 0


def extract_units(source: str, *, language: str, path: str) -> list[Unit]:
    """Cut a file into functions, methods, class headers and module-level code, in text order.

    Functions inside functions stay part of the outer one. A file with syntax errors gives the units
    that the parser could still see.

    Args:
        source: The file's text.
        language: One of the six.
        path: Names the module unit.

    Raises:
        ConfigError: unknown language.
        DataError: the file is too large to be source.
        MissingExtraError: the language's grammar is not installed.

    Example:
        >>> units = extract_units("def f(): return 1", language="python", path="a.py")
        >>> [(unit.kind, unit.symbol, unit.first_line) for unit in units]
        [('function', 'f', 1)]
    """
    return units_of(ParsedSource(source, language=language), path=path)


def units_of(tree: ParsedSource, *, path: str) -> list[Unit]:
    """As `extract_units`, of a text that is already parsed."""
    definitions = _definitions(tree)
    lines = LineIndex(tree.text)
    units = []
    holes: dict[int, list[tuple[int, int]]] = {}
    stack: list[int] = []
    for index, definition in enumerate(definitions):
        while stack and definitions[stack[-1]].end <= definition.start:
            stack.pop()
        owner = stack[-1] if stack else -1
        if definition.role != "scope":
            holes.setdefault(owner, []).append((definition.start, definition.end))
        if definition.role == "class":
            stack.append(index)
    for index, definition in enumerate(definitions):
        if definition.role == "function":
            units.append(_function_unit(tree, definition, lines))
        elif definition.role == "class":
            units.append(_class_unit(tree, definition, holes.get(index, []), lines))
    module = _module_unit(tree, holes.get(-1, []), lines, path)
    if module is not None:
        units.insert(0, module)
    return units


def _definitions(tree: ParsedSource) -> list[_Definition]:
    """Definitions that become units or name them, outermost first, functions' insides left out."""
    found = languages.captures(languages.definitions_query(tree.language), tree.root)
    nodes = sorted(
        ((node, role) for role, members in found.items() for node in members),
        key=lambda pair: (pair[0].start_byte, -pair[0].end_byte),
    )
    kept: list[_Definition] = []
    stack: list[_Definition] = []
    for node, role in nodes:
        if tree.is_outside(node) or node.start_byte < 0:
            continue
        outer = tree.statement_of(node)
        start, end = tree.span(outer)
        name = _name(tree, node)
        while stack and stack[-1].end <= start:
            stack.pop()
        if stack and (stack[-1].role == "function" or len(stack) > MAX_CLASS_DEPTH):
            continue
        if kept and kept[-1].start == start and kept[-1].end == end and role == "scope":
            continue
        if not name and role != "scope":
            continue
        entry = _Definition(node, role, outer, start, end, name)
        _qualify(tree, entry, stack)
        stack.append(entry)
        kept.append(entry)
    return kept


def _qualify(tree: ParsedSource, entry: _Definition, stack: list[_Definition]) -> None:
    owners = [owner.name for owner in stack if owner.name]
    name = entry.name
    entry.in_class = any(owner.role == "class" for owner in stack)
    if tree.language == "go" and entry.node.type == "method_declaration":
        receiver = entry.node.child_by_field_name("receiver")
        match = _GO_RECEIVER.search(tree.node_text(receiver)) if receiver else None
        if match:
            owners = [match.group(1)]
            entry.in_class = True
    if tree.language == "javascript" and ".prototype." in name:
        name = name.replace(".prototype.", ".")
        entry.in_class = True
    entry.qualified = ".".join([*owners, name]) if name else ".".join(owners)


def _name(tree: ParsedSource, node: tree_sitter.Node) -> str:
    for field in ("name", "left", "key", "property"):
        child = node.child_by_field_name(field)
        if child is not None:
            text = _SPACES.sub("", tree.node_text(child)).strip("\"'`")
            for prefix in ("module.exports.", "exports.", "this.", "self.", "window."):
                if tree.language == "javascript" and text.startswith(prefix):
                    text = text.removeprefix(prefix)
            return text[:200]
    return ""


def _function_unit(tree: ParsedSource, entry: _Definition, lines: LineIndex) -> Unit:
    body = _body(entry.node)
    docstring, span = _documentation(tree, entry, body)
    kind: UnitKind = "method" if entry.in_class else "function"
    return _unit(
        tree, entry, kind, tree.text[entry.start : entry.end], docstring, span, body, lines
    )


def _class_unit(
    tree: ParsedSource, entry: _Definition, holes: list[tuple[int, int]], lines: LineIndex
) -> Unit:
    body = _body(entry.node)
    docstring, span = _documentation(tree, entry, body)
    text = blank(tree.text, entry.start, entry.end, holes)
    return _unit(tree, entry, "class", text.rstrip(), docstring, span, body, lines)


def _unit(
    tree: ParsedSource,
    entry: _Definition,
    kind: UnitKind,
    text: str,
    docstring: str | None,
    span: tuple[int, int] | None,
    body: tree_sitter.Node | None,
    lines: LineIndex,
) -> Unit:
    definition_start = (
        tree.offset(entry.node.start_byte) if tree.language == "python" else entry.start
    )
    head_end = tree.offset(body.start_byte) if body is not None else entry.end
    head = tree.text[definition_start:head_end]
    end = entry.start + len(text)
    return Unit(
        symbol=entry.qualified,
        kind=kind,
        start=entry.start,
        end=end,
        first_line=lines.line(entry.start) + 1,
        last_line=lines.line(max(end - 1, entry.start)) + 1,
        text=text,
        docstring=docstring,
        signature=_SPACES.sub(" ", head).strip()[:500],
        definition_start=definition_start,
        docstring_span=span,
        has_error=entry.node.has_error,
    )


def _module_unit(
    tree: ParsedSource, holes: list[tuple[int, int]], lines: LineIndex, path: str
) -> Unit | None:
    """What is left of the file, unless only comments, documentation and tags are left."""
    docstring, span = None, None
    if tree.language == "python":
        statement = string_docstring(tree.root)
        if statement is not None:
            span = tree.span(statement)
            docstring = plain_string(tree.text[slice(*span)])
    ignored = [*holes, *tree.comment_spans]
    if span is not None:
        ignored.append(span)
    ignored.sort()
    rest = blank(tree.text, 0, len(tree.text), ignored)
    if not re.sub(r"<\?(?:php|=)?|\?>|[\s;{}()]", "", rest):
        return None
    text = blank(tree.text, 0, len(tree.text), sorted(holes)).rstrip()
    start = len(text) - len(text.lstrip())
    return Unit(
        symbol=PurePath(path).stem,
        kind="module",
        start=start,
        end=len(text),
        first_line=lines.line(start) + 1,
        last_line=lines.line(len(text) - 1) + 1,
        text=text[start:],
        docstring=docstring,
        signature="",
        definition_start=start,
        docstring_span=span,
        has_error=tree.root.has_error,
    )


def _documentation(
    tree: ParsedSource, entry: _Definition, body: tree_sitter.Node | None
) -> tuple[str | None, tuple[int, int] | None]:
    if tree.language == "python":
        statement = string_docstring(body)
        if statement is None:
            return None, None
        span = tree.span(statement)
        return plain_string(tree.text[slice(*span)]) or None, span
    span = comment_above(tree, entry.start)
    if span is None:
        return None, None
    return plain_comment(tree.text[slice(*span)]) or None, span


def _body(node: tree_sitter.Node) -> tree_sitter.Node | None:
    body = node.child_by_field_name("body")
    if body is not None:
        return body
    for field in ("value", "right", "type"):
        inner = node.child_by_field_name(field)
        if inner is not None and (body := inner.child_by_field_name("body")) is not None:
            return body
    return None
