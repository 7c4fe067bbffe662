"""Which functions make a code-search pair: CodeSearchNet's rules. Torch-free."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from polyzoo.sea.search.units import Unit

_TEST_PART = re.compile(
    r"^(?:tests?|testing|testsuite|specs?|__tests__|fixtures|mocks?|conftest\.py)$|"
    r"^(?:test_.*|.*_test|.*_spec|.*\.test|.*\.spec|.*Tests?)\.\w+$"
)
_TEST_NAME = re.compile(r"(?:^|[._])(?:[tT]est)(?:$|_|[A-Z0-9])|^(?:setUp|tearDown)")
_LINK = re.compile(r"https?:|www\.|<img\b|!\[", re.IGNORECASE)
_GENERATED = re.compile(r"_pb2(?:_grpc)?\.|\.min\.|\.generated\.")
_WORD = re.compile(r"\w+")
_LEXEME = re.compile(r"\w+|[^\w\s]")
_FOREIGN = frozenset(
    (
        *("der", "und", "nicht", "ist", "mit", "von", "werden", "eine", "einen", "für"),
        *("le", "les", "des", "est", "pour", "dans", "que", "une", "sur", "avec"),
        *("el", "los", "las", "para", "por", "una", "como", "del", "não", "uma", "com"),
        *("il", "che", "di", "per", "della", "sono"),
    )
)
_ENGLISH = frozenset(
    (
        *("the", "a", "an", "of", "to", "and", "in", "is", "for", "be", "that", "this", "with"),
        *("are", "or", "if", "on", "it", "as", "by", "from", "not", "return", "returns", "get"),
        "set",
    )
)
_CONSTRUCTORS = {
    "python": frozenset(),
    "php": frozenset({"__construct", "__destruct", "__get", "__set", "__call", "__toString"}),
    "java": frozenset({"toString", "hashCode", "equals"}),
    "javascript": frozenset({"constructor", "toString"}),
    "go": frozenset({"String"}),
    "ruby": frozenset({"initialize", "to_s"}),
}


def lexemes(text: str) -> list[str]:
    """Words and single punctuation marks, as CodeSearchNet's documentation tokens."""
    return _LEXEME.findall(text)


def refused_path(path: str) -> str | None:
    """Why no function of a file is taken, or None."""
    parts = PurePosixPath(path).parts
    if any(_TEST_PART.match(part) for part in parts):
        return "test file"
    if parts[-1] == "__init__.py":
        return "__init__ file"
    if _GENERATED.search(parts[-1]):
        return "generated file"
    return None


def refused_code(unit: Unit, code: str, *, language: str, min_lines: int) -> str | None:
    """Why a function is not taken whatever its documentation says, or None."""
    name = unit.symbol.rsplit(".", 1)[-1]
    if name.startswith("__") and name.endswith("__"):
        return "dunder"
    if name in _CONSTRUCTORS[language] or _is_constructor(unit, language):
        return "constructor or conversion"
    if _TEST_NAME.search(name):
        return "test function"
    if unit.has_error:
        return "does not parse"
    if sum(1 for line in code.splitlines() if line.strip()) < min_lines:
        return "too few lines"
    return None


def refused_summary(summary: str, *, min_words: int, max_tokens: int) -> str | None:
    """Why the first paragraph of a documentation is no query, or None."""
    words = _WORD.findall(summary)
    if not summary:
        return "no documentation"
    if len(words) < min_words:
        return "documentation too short"
    if len(lexemes(summary)) > max_tokens:
        return "documentation too long"
    if _LINK.search(summary):
        return "link or image in documentation"
    if not is_english(summary):
        return "documentation not English"
    return None


def is_english(text: str) -> bool:
    """A cheap guess: nearly all letters are ASCII, and no other language's small words prevail."""
    letters = [character for character in text if character.isalpha()]
    if not letters or sum(character.isascii() for character in letters) < 0.9 * len(letters):
        return False
    words = {word.lower() for word in _WORD.findall(text)}
    foreign = len(words & _FOREIGN)
    return foreign < 2 or foreign <= len(words & _ENGLISH)


def _is_constructor(unit: Unit, language: str) -> bool:
    parts = unit.symbol.split(".")
    return language in ("java", "php") and len(parts) > 1 and parts[-1] == parts[-2]
