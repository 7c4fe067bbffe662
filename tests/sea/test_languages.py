"""Languages: detection, missing grammars, decoding, parsing odd text."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyzoo.core.errors import ConfigError, DataError
from polyzoo.sea.splitting import languages
from polyzoo.sea.splitting.parsing import LineIndex, ParsedSource, blank
from support.functions import LANGUAGES, stored_functions


class TestTable:
    """Suffixes and grammars."""

    @pytest.mark.parametrize(
        ("path", "language"),
        [
            ("a/b.py", "python"),
            ("stub.pyi", "python"),
            ("A.java", "java"),
            ("x.min.JS", "javascript"),
            ("x.mjs", "javascript"),
            ("x_test.go", "go"),
            ("index.php", "php"),
            ("task.rake", "ruby"),
            ("README.md", None),
            ("Makefile", None),
        ],
    )
    def test_detection_by_suffix(self, path: str, language: str | None):
        assert languages.detect(path) == language

    @pytest.mark.parametrize("language", LANGUAGES)
    def test_grammar_loads_once_and_queries_compile(self, language: str):
        assert languages.get_language(language) is languages.get_language(language)
        tree = ParsedSource("\n", language=language)
        assert languages.captures(languages.definitions_query(language), tree.root) == {}
        assert tree.comments == []

    def test_unknown_language_lists_the_known(self):
        with pytest.raises(ConfigError, match=r"'perl'.*go, java, javascript, php, python, ruby"):
            languages.get_language("perl")

    def test_missing_grammar_names_its_package(self):
        # A module set to None in sys.modules is one that cannot be imported.
        code = (
            "import sys; sys.modules['tree_sitter_go'] = None\n"
            "from polyzoo.sea.splitting import languages\n"
            "from polyzoo.core.errors import MissingExtraError\n"
            "languages.get_language('python')\n"
            "try:\n    languages.parser('go')\n"
            "except MissingExtraError as error:\n    print(error)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert "pip install tree-sitter-go" in done.stdout
        assert "polyzoo-sea[languages]" in done.stdout

    def test_importing_the_splitters_loads_no_grammar_and_no_torch(self):
        code = (
            "import sys\n"
            "import polyzoo.sea.splitting.blocks, polyzoo.sea.search.units\n"
            "import polyzoo.sea.corpus.build\n"
            "loaded = {'torch', 'transformers', 'tree_sitter', 'tree_sitter_python'}\n"
            "print(sorted(loaded & set(sys.modules)))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == "[]"


class TestDecoding:
    """Bytes of a file to text."""

    def test_a_bom_is_dropped_and_line_ends_stay(self):
        data = b"\xef\xbb\xbfx = 1\r\ny = 2\n"
        assert languages.decode_source(data, path="a.py") == "x = 1\r\ny = 2\n"

    def test_a_coding_line_is_honoured_for_python_only(self):
        data = b"# -*- coding: latin-1 -*-\nx = '\xe9'\n"
        assert "é" in languages.decode_source(data, path="a.py")
        with pytest.raises(DataError, match=r"a\.rb: byte 31 is not utf-8"):
            languages.decode_source(data, path="a.rb")

    def test_an_unknown_coding_is_said(self):
        with pytest.raises(DataError, match=r"a\.py: its coding line names 'klingon'"):
            languages.decode_source(b"# coding: klingon\n", path="a.py")

    def test_other_bytes_name_file_and_place(self):
        with pytest.raises(DataError, match=r"lib/a\.py: byte 4 is not utf-8; convert the file"):
            languages.decode_source(b"x = \xff", path="lib/a.py")

    def test_fifty_megabytes_are_refused(self):
        with pytest.raises(DataError, match=r"big\.js: 52,428,800 bytes of source, the limit is"):
            languages.decode_source(b"x" * 52_428_800, path="big.js")


class TestParsing:
    """Offsets of the tree in characters of the text."""

    @given(
        st.text(alphabet=st.sampled_from([*"ab(){};= \n", "é", "😀", "\ufeff", "\x00", "\ud800"]))
    )
    def test_every_byte_offset_leads_to_its_character(self, text: str):
        for language in ("python", "php"):
            tree = ParsedSource(text, language=language)
            assert len(tree.text) == len(text)
            for node in languages.leaves(tree.root):
                start, end = tree.span(node)
                assert 0 <= start <= end <= len(text)
                if tree.text.isascii() and node.text and not tree.is_outside(node):
                    assert tree.text[start:end] in node.text.decode()

    def test_non_ascii_offsets_are_characters(self):
        text = "é = '😀😀'\nnext_name = 1\n"
        tree = ParsedSource(text, language="python")
        names = [tree.node_text(node) for node in tree.lexer_nodes()]
        assert names == ["é", "=", "'😀😀'", "next_name", "=", "1"]

    @pytest.mark.parametrize("function", stored_functions(), ids=lambda function: function.name)
    def test_real_functions_parse_without_errors(self, function):
        assert ParsedSource(function.source, language=function.language).error_share == 0

    def test_error_share_is_a_share(self):
        assert ParsedSource("x = 1\n" * 10 + ")\n", language="python").error_share < 0.25
        noise = ParsedSource("class of the ones ( which (are not closed\n" * 9, language="java")
        assert 0.25 < noise.error_share <= 1

    @pytest.mark.parametrize("run", ["(" * 200_000, ("(" * 5_000 + "x") * 100])
    def test_a_text_that_takes_quadratic_time_is_refused(self, run: str):
        with pytest.raises(
            DataError, match="thousands of unmatched brackets or operators in a row"
        ):
            ParsedSource(f"x = {run}", language="python")

    def test_lexer_nodes_of_a_stretch(self):
        text = "a = 1  # é\nb = 'é'\nc = 3\n"
        tree = ParsedSource(text, language="python")
        start, end = text.index("b"), text.index("c")
        assert [tree.node_text(node) for node in tree.lexer_nodes(start, end)] == ["b", "=", "'é'"]


class TestSmallParts:
    """Blanking and counting lines."""

    @given(st.text(alphabet="ab\r\n"), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30))))
    def test_blanking_keeps_length_and_lines(self, text: str, holes):
        spans = sorted((min(hole), max(hole)) for hole in holes)
        found = blank(text, 0, len(text), spans)
        expected = "".join(
            " " if c not in "\r\n" and any(a <= place < b for a, b in spans) else c
            for place, c in enumerate(text)
        )
        assert found == expected

    @given(st.text(alphabet="ab\r\n", min_size=1))
    def test_line_of_an_offset(self, text: str):
        index = LineIndex(text)
        assert [index.line(place) for place in range(len(text))] == [
            text.count("\n", 0, place) for place in range(len(text))
        ]
