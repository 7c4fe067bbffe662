"""Real functions to split: stored ones of six languages, and those of installed Python packages."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from support.workspace import ROOT

LANGUAGES = ("python", "java", "javascript", "go", "php", "ruby")


@dataclass(frozen=True)
class Function:
    """One function's source."""

    name: str
    language: str
    source: str


@cache
def stored_functions() -> tuple[Function, ...]:
    """The functions of the reference cases, three a language, short to very long."""
    found = []
    for language in LANGUAGES:
        path = ROOT / "tests" / "parity" / "sea" / f"split_{language}.json"
        cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
        found.extend(Function(case["id"], language, case["source"]) for case in cases)
    return tuple(found)


@cache
def package_files(distribution: str) -> tuple[Path, ...]:
    """All Python files of an installed distribution."""
    files = metadata.files(distribution) or ()
    paths = (Path(str(file.locate())) for file in files if file.suffix == ".py")
    return tuple(sorted(path for path in paths if path.is_file()))


def package_functions(distribution: str) -> list[Function]:
    """Every function and method of an installed distribution, found by Python's own parser."""
    found = []
    for path in package_files(distribution):
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines(keepends=True)
        if "\f" in source or "\x1c" in source:  # splitlines counts more lines than ast does
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                text = "".join(lines[node.lineno - 1 : node.end_lineno])
                found.append(Function(f"{path.name}:{node.lineno}", "python", text))
    return found


def python_code_only(source: str) -> str:
    """Python source without comments, docstrings and white space, by the standard library alone."""
    # A method's text is indented: an `if` around it makes it a module that parses.
    text = f"if 1:\n{source}" if source[:1].isspace() else source
    lines = text.splitlines(keepends=True)
    spans = []
    # A last line may end in a backslash.
    for node in ast.walk(ast.parse(text + "\n")):
        if (value := _documentation(node)) is not None:
            last = value.end_lineno or value.lineno
            columns = [
                len(lines[line - 1].encode()[:column].decode())
                for line, column in ((value.lineno, value.col_offset), (last, value.end_col_offset))
            ]
            spans.append(((value.lineno, columns[0]), (last, columns[1])))
    spans.extend(
        (token.start, token.end)
        for token in tokenize.generate_tokens(io.StringIO(text + "\n").readline)
        if token.type == tokenize.COMMENT
    )
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    kept = []
    position = len(text) - len(source)
    for first, last in sorted(spans):
        kept.append(text[position : starts[first[0] - 1] + first[1]])
        position = starts[last[0] - 1] + last[1]
    kept.append(text[position:])
    return re.sub(r"\s+", "", "".join(kept))


def _documentation(node: ast.AST) -> ast.Expr | None:
    """The first statement, if it is a string; bytes and f-strings too, they are meant the same."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
        return None
    first = node.body[0] if node.body else None
    if not isinstance(first, ast.Expr):
        return None
    if isinstance(first.value, ast.JoinedStr):
        return first
    value = first.value.value if isinstance(first.value, ast.Constant) else None
    return first if isinstance(value, str | bytes) else None
