"""The six languages: grammars (imported on first use), suffixes, node types. Torch-free."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import PurePath
from typing import TYPE_CHECKING, get_args

from polyzoo.core.errors import ConfigError, DataError, MissingExtraError
from polyzoo.sea.config import Language

if TYPE_CHECKING:
    import tree_sitter

MAX_SOURCE_BYTES = 8 * 1024 * 1024
"""A tree takes about a hundred times its text; no file that people wrote comes near this."""
_CODING_COOKIE = re.compile(rb"^[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Grammar:
    """What is particular to one language.

    `definitions` is a tree-sitter query with the captures `function`, `class` and `scope` (a named
    object whose members are qualified by its name, without being a unit itself). `wrappers` are the
    nodes that belong to a definition although they enclose it (export, decorators, assignment).
    """

    module: str
    package: str
    factory: str = "language"
    suffixes: tuple[str, ...]
    comments: frozenset[str]
    definitions: str
    wrappers: frozenset[str] = frozenset()
    method_shells: tuple[tuple[str, str], ...] = ()
    """(before, after) texts to parse a lone member inside, where it has errors alone."""


_C_COMMENTS = frozenset({"comment", "line_comment", "block_comment", "html_comment"})

_JAVASCRIPT_VALUES = "[(arrow_function) (function_expression) (generator_function)]"
_JAVASCRIPT_DEFINITIONS = f"""
(function_declaration) @function
(generator_function_declaration) @function
(method_definition) @function
(variable_declarator value: {_JAVASCRIPT_VALUES}) @function
(assignment_expression right: {_JAVASCRIPT_VALUES}) @function
(pair value: {_JAVASCRIPT_VALUES}) @function
(field_definition value: {_JAVASCRIPT_VALUES}) @function
(class_declaration) @class
(variable_declarator value: (class)) @class
(assignment_expression right: (class)) @class
(variable_declarator value: (object)) @scope
(assignment_expression right: (object)) @scope
(pair value: (object)) @scope
"""

GRAMMARS: dict[str, Grammar] = {
    "python": Grammar(
        module="tree_sitter_python",
        package="tree-sitter-python",
        suffixes=(".py", ".pyi", ".pyw"),
        comments=frozenset({"comment"}),
        definitions="(function_definition) @function (class_definition) @class",
        wrappers=frozenset({"decorated_definition"}),
    ),
    "java": Grammar(
        module="tree_sitter_java",
        package="tree-sitter-java",
        suffixes=(".java",),
        comments=_C_COMMENTS,
        definitions="""
            [(method_declaration) (constructor_declaration) (compact_constructor_declaration)
             (annotation_type_element_declaration)] @function
            [(class_declaration) (interface_declaration) (enum_declaration) (record_declaration)
             (annotation_type_declaration)] @class
        """,
        method_shells=(("class _ {", "}"),),
    ),
    "javascript": Grammar(
        module="tree_sitter_javascript",
        package="tree-sitter-javascript",
        suffixes=(".js", ".mjs", ".cjs", ".jsx"),
        comments=_C_COMMENTS,
        definitions=_JAVASCRIPT_DEFINITIONS,
        wrappers=frozenset(
            {
                "export_statement",
                "lexical_declaration",
                "variable_declaration",
                "expression_statement",
                "assignment_expression",
            }
        ),
        method_shells=(("class _ {", "}"), ("({", "})")),
    ),
    "go": Grammar(
        module="tree_sitter_go",
        package="tree-sitter-go",
        suffixes=(".go",),
        comments=frozenset({"comment"}),
        definitions="""
            [(function_declaration) (method_declaration)] @function
            (type_spec) @class
        """,
        wrappers=frozenset({"type_declaration"}),
    ),
    "php": Grammar(
        module="tree_sitter_php",
        package="tree-sitter-php",
        factory="language_php",
        suffixes=(".php", ".phtml"),
        comments=frozenset({"comment"}),
        definitions="""
            [(function_definition) (method_declaration)] @function
            [(class_declaration) (interface_declaration) (trait_declaration)
             (enum_declaration)] @class
        """,
        method_shells=(("<?php class _ {", "}"),),
    ),
    "ruby": Grammar(
        module="tree_sitter_ruby",
        package="tree-sitter-ruby",
        suffixes=(".rb", ".rake", ".gemspec"),
        comments=frozenset({"comment"}),
        definitions="""
            [(method) (singleton_method)] @function
            [(class) (module)] @class
            (singleton_class) @scope
        """,
        wrappers=frozenset({"argument_list", "call", "identifier"}),
    ),
}

_BY_SUFFIX: dict[str, Language] = {
    suffix: language for language in get_args(Language) for suffix in GRAMMARS[language].suffixes
}


def grammar(name: str) -> Grammar:
    """The table row of a language.

    Raises:
        ConfigError: the language is unknown; the message lists the known ones.
    """
    try:
        return GRAMMARS[name]
    except KeyError:
        raise ConfigError(
            f"language={name!r} is not known; choose one of {', '.join(sorted(GRAMMARS))}"
        ) from None


@cache
def get_language(name: str) -> tree_sitter.Language:
    """The tree-sitter language object, loaded from its wheel.

    Raises:
        ConfigError: the language is unknown.
        MissingExtraError: its grammar is not installed; the message names the package.
    """
    row = grammar(name)
    tree_sitter = _import("tree_sitter", package="tree-sitter", language=name)
    module = _import(row.module, package=row.package, language=name)
    return tree_sitter.Language(getattr(module, row.factory)())


def parser(name: str) -> tree_sitter.Parser:
    """A new parser; parsers keep state, so threads must not share one."""
    language = get_language(name)
    import tree_sitter

    return tree_sitter.Parser(language)


@cache
def definitions_query(name: str) -> tree_sitter.Query:
    """The compiled query for functions, classes and naming scopes."""
    language = get_language(name)
    import tree_sitter

    return tree_sitter.Query(language, grammar(name).definitions)


_BODY_STRING = "(comment)* . (expression_statement [(string) (concatenated_string)]) @docstring"


@cache
def python_docstrings_query() -> tree_sitter.Query:
    """The compiled query for the statements that are Python docstrings."""
    language = get_language("python")
    import tree_sitter

    return tree_sitter.Query(
        language,
        f"""
        (module . {_BODY_STRING})
        (class_definition body: (block . {_BODY_STRING}))
        (function_definition body: (block . {_BODY_STRING}))
        """,
    )


@cache
def comments_query(name: str) -> tree_sitter.Query:
    """The compiled query for comments."""
    language = get_language(name)
    import tree_sitter

    known = sorted(
        kind for kind in grammar(name).comments if language.id_for_node_kind(kind, True) is not None
    )
    return tree_sitter.Query(language, "\n".join(f"({kind}) @comment" for kind in known))


def captures(query: tree_sitter.Query, root: tree_sitter.Node) -> dict[str, list[tree_sitter.Node]]:
    """All captures of a query under a node, by capture name, each in text order."""
    import tree_sitter

    found = tree_sitter.QueryCursor(query).captures(root)
    return {
        name: sorted(nodes, key=lambda node: (node.start_byte, -node.end_byte))
        for name, nodes in found.items()
    }


def detect(path: str | PurePath) -> Language | None:
    """The language of a file by its suffix, or None when it is none of the six."""
    return _BY_SUFFIX.get(PurePath(path).suffix.lower())


def suffixes(languages: tuple[str, ...]) -> tuple[str, ...]:
    """All file suffixes of some languages."""
    return tuple(suffix for name in languages for suffix in grammar(name).suffixes)


def decode_source(data: bytes, *, path: str) -> str:
    """Decode a source file: UTF-8 with or without BOM, or what a Python coding line names.

    Offsets count from the first character after a BOM; line ends are kept as they are.

    Raises:
        DataError: too large, or not in its encoding; the message names path, byte and fix.
    """
    if len(data) > MAX_SOURCE_BYTES:
        raise DataError(
            f"{path}: {len(data):,} bytes of source, the limit is {MAX_SOURCE_BYTES:,}; "
            "exclude the file, it is generated or data"
        )
    encoding = "utf-8-sig"
    for line in data.split(b"\n", 2)[:2]:
        cookie = _CODING_COOKIE.match(line) if path.endswith((".py", ".pyi", ".pyw")) else None
        if cookie:
            named = cookie.group(1).decode("ascii", "replace")
            encoding = "utf-8-sig" if named.lower().startswith("utf") else named
            break
    try:
        return data.decode(encoding)
    except LookupError:
        raise DataError(f"{path}: its coding line names {encoding!r}, which is unknown") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start} is not {encoding.removesuffix('-sig')}; "
            "convert the file to UTF-8 or exclude it"
        ) from None


def leaves(root: tree_sitter.Node, *, string_is_leaf: bool = True) -> Iterator[tree_sitter.Node]:
    """The leaf nodes in text order, without recursion; a `string` node counts as a leaf."""
    cursor = root.walk()
    while True:
        node = cursor.node
        whole = string_is_leaf and node is not None and node.type == "string"
        if not whole and cursor.goto_first_child():
            continue
        if node is not None:
            yield node
        while not cursor.goto_next_sibling():
            if not cursor.goto_parent():
                return


def _import(module: str, *, package: str, language: str):  # noqa: ANN202  (a module)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"language={language!r} needs the package {package}, which is not installed; run: "
            f'pip install {package}, or: pip install "polyzoo-sea[languages]"'
        ) from error
