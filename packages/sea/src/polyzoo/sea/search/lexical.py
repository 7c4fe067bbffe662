"""Words of code for full-text search: identifiers split where people read them. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

VERSION = 1
"""Of the splitting below; an index built with another one has its text part made anew."""

TOKENIZER = "porter unicode61 remove_diacritics 2 tokenchars '_'"
"""FTS5's own tokenizer behind ours: folds case, stems English, keeps snake_case names whole."""

MAX_QUERY_TERMS = 48

_WORD = re.compile(r"\w+")
_ASCII_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_RUN = re.compile(r"[^\W\d_]+|\d+")

STOP_WORDS = frozenset(
    {
        "a",
        "an",
        "and",
        "any",
        "are",
        "as",
        "at",
        "be",
        "but",
        "by",
        "can",
        "code",
        "do",
        "does",
        "doing",
        "for",
        "from",
        "function",
        "get",
        "given",
        "has",
        "have",
        "how",
        "i",
        "if",
        "in",
        "into",
        "is",
        "it",
        "its",
        "me",
        "method",
        "my",
        "of",
        "on",
        "one",
        "or",
        "our",
        "should",
        "so",
        "some",
        "such",
        "than",
        "that",
        "the",
        "their",
        "them",
        "then",
        "there",
        "these",
        "they",
        "this",
        "to",
        "use",
        "used",
        "using",
        "was",
        "we",
        "what",
        "when",
        "where",
        "which",
        "while",
        "who",
        "why",
        "will",
        "with",
        "without",
        "you",
        "your",
    }
)


@lru_cache(maxsize=65_536)
def split_word(word: str) -> tuple[str, ...]:
    """Split one identifier at underscores, case changes and digits; the whole comes last.

    Example:
        >>> split_word("parseHTTPResponse")
        ('parse', 'http', 'response', 'parsehttpresponse')
    """
    found = _ASCII_PART.findall(word) if word.isascii() else _split_any_script(word)
    parts = tuple(part.lower() for part in found)
    whole = word.strip("_").lower()
    return parts if parts == (whole,) or not whole else (*parts, whole)


def words(text: str) -> str:
    """Return the searchable words of code or prose, separated by blanks."""
    return " ".join(map(_joined, _WORD.findall(text)))


@lru_cache(maxsize=262_144)
def _joined(word: str) -> str:
    return " ".join(split_word(word))


def _split_any_script(word: str) -> list[str]:
    """Split at the same borders, by Unicode's notion of case."""
    parts: list[str] = []
    for run in _RUN.findall(word):
        start = 0
        for place in range(1, len(run)):
            after_small = run[place - 1].islower() and run[place].isupper()
            before_small = run[place].isupper() and run[place + 1 : place + 2].islower()
            if after_small or before_small:
                parts.append(run[start:place])
                start = place
        parts.append(run[start:])
    return parts


def query_terms(query: str) -> list[str]:
    """Return the words to look for in what a person typed.

    Words that say nothing about code are left out unless nothing else is there; an identifier is
    looked for whole and in parts.
    """
    found = dict.fromkeys(part for word in _WORD.findall(query) for part in split_word(word))
    telling = [word for word in found if word not in STOP_WORDS] or list(found)
    return telling[:MAX_QUERY_TERMS]


def any_of(terms: Sequence[str]) -> str:
    """Return an FTS5 expression that matches any of the words."""
    # Quoted, so that AND, NOT, NEAR and column names are words like any other.
    return " OR ".join(f'"{term}"' for term in terms)
