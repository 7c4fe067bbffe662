"""Words: where identifiers are split, and what a query asks for."""

from __future__ import annotations

import re
import sqlite3

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyzoo.sea.search import lexical


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("parseHTTPResponse", ("parse", "http", "response", "parsehttpresponse")),
        ("load_state_dict", ("load", "state", "dict", "load_state_dict")),
        ("__init__", ("init",)),
        ("utf8", ("utf", "8", "utf8")),
        ("HTTPServer", ("http", "server", "httpserver")),
        ("x", ("x",)),
        ("_", ()),
        ("GrößeMaß", ("größe", "maß", "größemaß")),
        ("日本語", ("日本語",)),
    ],
)
def test_split_word(word, parts):
    assert lexical.split_word(word) == parts


@given(st.text(max_size=40))
def test_splitting_keeps_every_letter_and_digit(text):
    """Oracle: the parts of a word, joined, are the word without underscores, whatever the case."""
    for word in re.findall(r"\w+", text):
        parts = lexical.split_word(word)
        joined = "".join(parts[:-1] if len(parts) > 1 else parts)
        assert joined.casefold() == word.replace("_", "").lower().casefold()


@given(st.text(max_size=200))
def test_every_query_is_a_valid_expression(text):
    """Oracle: FTS5 itself parses it."""
    terms = lexical.query_terms(text)
    database = sqlite3.connect(":memory:")
    database.execute(f'CREATE VIRTUAL TABLE t USING fts5 (a, tokenize = "{lexical.TOKENIZER}")')
    if terms:
        expression = lexical.any_of(terms)
        database.execute("SELECT rowid FROM t WHERE t MATCH ?", (expression,)).fetchall()
    database.close()


def test_stop_words_go_unless_nothing_else_is_there():
    assert lexical.query_terms("how to open the file") == ["open", "file"]
    assert lexical.query_terms("what is it") == ["what", "is", "it"]
    assert lexical.query_terms("?!") == []
    assert len(lexical.query_terms(" ".join(f"w{i}" for i in range(500)))) == 48


def test_operators_of_the_engine_are_plain_words():
    assert lexical.query_terms('a AND b NOT "c" NEAR(d)') == ["b", "not", "c", "near", "d"]
