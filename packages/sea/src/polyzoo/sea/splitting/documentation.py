"""Documentation of functions: where it is, its plain text, its first paragraph. Torch-free."""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from bisect import bisect_right
from typing import TYPE_CHECKING

from polyzoo.sea.splitting import languages
from polyzoo.sea.splitting.parsing import ParsedSource

if TYPE_CHECKING:
    import tree_sitter

_STRING = re.compile(r"""(?s)^[rRuUbBfF]{0,2}('''|\"\"\"|'|")(.*)\1$""")
_BLOCK_COMMENT = re.compile(r"(?s)^/\*+(.*?)\**/$")
_STAR = re.compile(r"^[ \t]*\*?(?:(?<=\*)[ \t])?", re.MULTILINE)
_LINE_MARK = re.compile(r"^[ \t]*(?://+|#+)[!]?[ \t]?", re.MULTILINE)
# Where the description ends and lists of parameters, examples or directives begin.
_SECTION = re.compile(
    r"^\s*(?:@\w+|\\param\b|:(?:param|type|returns?|rtype|raises?|arg|keyword)\b.*:|\.\. \w|>>> |"
    r"(?:Args|Arguments|Parameters|Params|Returns?|Yields?|Raises|Examples?|Notes?|See Also|"
    r"Attributes|Usage|Input|Inputs|Outputs?|Keyword Args|Keyword Arguments)\s*:?\s*$)"
)
_UNDERLINE = re.compile(r"^\s*([-=~*^])\1{2,}\s*$")


def string_docstring(body: tree_sitter.Node | None) -> tree_sitter.Node | None:
    """The statement that is the docstring of a Python body (block or module), if it has one."""
    if body is None:
        return None
    for child in body.named_children:
        if child.type == "comment":
            continue
        if child.type != "expression_statement" or child.named_child_count != 1:
            return None
        inner = child.named_children[0]
        return child if inner.type in ("string", "concatenated_string") else None
    return None


def docstring_spans(tree: ParsedSource) -> list[tuple[int, int]]:
    """The characters of all documentation: of the text, its classes and functions, at any depth."""
    if tree.language == "python":
        found = languages.captures(languages.python_docstrings_query(), tree.root)
        return [
            tree.span(node)
            for node in found.get("docstring", [])
            # `"%s" % x` and `"a", "b"` are expressions; a docstring stands alone.
            if node.named_child_count == 1
        ]
    if not tree.comments:
        return []
    found = languages.captures(languages.definitions_query(tree.language), tree.root)
    spans = {
        comment_above(tree, tree.offset(tree.statement_of(node).start_byte))
        for role in ("function", "class")
        for node in found.get(role, [])
    }
    return sorted(span for span in spans if span is not None)


def plain_string(source: str) -> str:
    """The text of a Python string without quotes and escapes, indentation removed."""
    source = source.strip()
    match = _STRING.match(source)
    text = match.group(2) if match else source
    if match is None or "\\" in text or match.group(1) in text:
        text = _evaluated(source) or text
    return inspect.cleandoc(text).strip()


def _evaluated(source: str) -> str | None:
    """A string that has escapes or several parts, or None (an f-string, a broken one)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=SyntaxWarning)
            warnings.simplefilter("ignore", category=DeprecationWarning)  # the same before 3.12
            value = ast.literal_eval(source)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, str) else None


def plain_comment(source: str) -> str:
    """The text of a run of comments without their marks, indentation removed."""
    source = source.strip()
    block = _BLOCK_COMMENT.match(source)
    if block:
        text = _STAR.sub("", block.group(1))
    elif source.startswith("=begin"):
        text = re.sub(r"(?m)^=(begin|end).*$", "", source)
    else:
        text = _LINE_MARK.sub("", source)
    return inspect.cleandoc(text.replace("\r", "")).strip()


def comment_above(tree: ParsedSource, start: int) -> tuple[int, int] | None:
    """The characters of the comment block that ends directly above `start`, if there is one.

    Java and PHP: only `/** ... */`. Elsewhere a run of line comments, or one block comment.
    """
    ends = tree.comment_spans
    text = tree.text
    index = bisect_right(ends, start, key=lambda span: span[1]) - 1
    first = None
    below = start
    while index >= 0:
        begin, end = ends[index]
        gap = text[end:below]
        if gap.strip() or gap.count("\n") > 1 or text[end:below].count("\r\n") > 1:
            break
        marked = text.startswith("/**", begin)
        if tree.language in ("java", "php") and not marked:
            break
        # A comment after code on its line speaks of that code.
        line_start = text.rfind("\n", 0, begin) + 1
        if text[line_start:begin].strip() and not marked:
            break
        first = begin
        below = begin
        if text.startswith(("/*", "=begin"), begin):
            break
        index -= 1
        if index >= 0 and text.startswith("/*", ends[index][0]):
            break
    if first is None:
        return None
    end = start
    while end > first and text[end - 1].isspace():
        end -= 1
    return first, end


def summary(documentation: str) -> str:
    """The first paragraph, on one line, up to the first section, tag or directive."""
    lines: list[str] = []
    for line in documentation.strip().splitlines():
        if not line.strip() or _SECTION.match(line):
            if lines:
                break
            if line.strip():
                return ""
            continue
        if _UNDERLINE.match(line):
            lines = []
            continue
        lines.append(line.strip())
    return " ".join(lines)
