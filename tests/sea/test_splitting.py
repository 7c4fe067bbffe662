"""The fair splitters: nothing lost, nothing above the budget, offsets that lead back."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyzoo.core.errors import ConfigError, DataError
from polyzoo.sea.config import SplitConfig
from polyzoo.sea.splitting import Split, released, split
from polyzoo.sea.splitting.parsing import ParsedSource
from support.functions import (
    LANGUAGES,
    Function,
    package_functions,
    python_code_only,
    stored_functions,
)
from support.tokenizing import Recorder, Tokenize, byte_pieces, numbered_pieces, word_pieces

UNLIMITED = SplitConfig(max_blocks=1_000_000)
PACKAGES = ("requests", "pyyaml", "tqdm", "click", "idna")
"""Installed with polyzoo. POLYZOO_SPLIT_PACKAGES=a,b names others for a larger run."""


def squeeze(text: str) -> str:
    """A text without white space."""
    return re.sub(r"\s+", "", text)


def fair(
    source: str, language: str, config: SplitConfig, tokenize: Tokenize = word_pieces
) -> tuple[Split, Recorder]:
    """Split and check what holds for every split of the fair profile without overlap."""
    recorder = Recorder(tokenize)
    found = split(source, language=language, config=config, tokenize=recorder)
    assert found.whole == recorder.pieces.ids
    ids = [piece for block in found.blocks for piece in block.ids]
    assert ids == found.whole
    assert found.dropped_blocks == 0
    assert all(1 <= len(block.ids) <= config.budget for block in found.blocks)
    for block in found.blocks:
        assert 0 <= block.start < block.end <= len(source)
        assert block.first_line == source.count("\n", 0, block.start)
        assert block.last_line == source.count("\n", 0, block.end - 1)
        assert not source[block.start].isspace()
        assert not source[block.end - 1].isspace()
    for first, second in zip(found.blocks, found.blocks[1:], strict=False):
        assert first.start < second.start
        # A character of several pieces may lie on both sides of a cut.
        assert second.start >= first.end - 1
    position = 0
    for block in found.blocks:
        # The block's place in the file holds its text; comments may stand between its pieces.
        text = recorder.seen(position, position + len(block.ids))
        place = squeeze(source[block.start : block.end])
        position += len(block.ids)
        if tokenize is word_pieces:
            assert (place[0], place[-1]) == (text[0], text[-1])
            assert place == text or len(place) > len(text)
    return found, recorder


def block_counts(function: Function, tokenize: Tokenize, budgets: list[int]) -> list[int]:
    counts = []
    for budget in budgets:
        config = replace(UNLIMITED, budget=budget)
        found, _ = fair(function.source, function.language, config, tokenize)
        counts.append(len(found.blocks))
    return counts


@pytest.fixture(params=stored_functions(), ids=lambda function: function.name)
def stored(request: pytest.FixtureRequest) -> Function:
    return request.param


@pytest.fixture(params=[word_pieces, byte_pieces], ids=["words", "byte pairs"])
def tokenize(request: pytest.FixtureRequest) -> Tokenize:
    return request.param


class TestStoredFunctions:
    """Functions of all six languages."""

    def test_more_budget_never_means_more_blocks(self, stored: Function, tokenize: Tokenize):
        budgets = [1, 2, 3, 7, 16, 17, 31, 64, 100, 126, 127, 254, 300, 510, 4000]
        counts = block_counts(stored, tokenize, budgets)
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] == 1

    @pytest.mark.parametrize("kind", ["line", "token", "space"])
    @pytest.mark.parametrize("budget", [16, 254])
    def test_windows_that_touch_lose_nothing(
        self, stored: Function, tokenize: Tokenize, kind: str, budget: int
    ):
        config = replace(UNLIMITED, kind=kind, window=8, step=8, budget=budget)
        fair(stored.source, stored.language, config, tokenize)

    @pytest.mark.parametrize("kind", ["line", "token", "space"])
    def test_overlapping_windows_cover_the_same(self, stored: Function, kind: str):
        config = replace(UNLIMITED, kind=kind, window=8, step=3)
        found = split(
            stored.source, language=stored.language, config=config, tokenize=numbered_pieces
        )
        assert {piece for block in found.blocks for piece in block.ids} == set(found.whole)
        # Every window brings something new.
        ends = [block.ids[-1] for block in found.blocks]
        assert sorted(set(ends)) == ends

    def test_all_code_is_covered_and_comments_are_not(self, stored: Function):
        config = replace(UNLIMITED, budget=40)
        _, recorder = fair(stored.source, stored.language, config)
        if stored.language == "ruby":
            # The published comment removal leaves Ruby alone; no string here holds "#".
            expected = squeeze(re.sub(r"(?m)(?:^|\s)#(?!\{).*$", "", stored.source))
        elif stored.language == "python":
            expected = python_code_only(stored.source)
        else:
            text = released.remove_comments(stored.source, language=stored.language)
            expected = squeeze(text)
        assert recorder.seen() == expected

    def test_comments_stay_on_request_and_docstrings_only_on_their_own(self, stored: Function):
        config = replace(UNLIMITED, keep_comments=True, keep_docstrings=True)
        _, recorder = fair(stored.source, stored.language, config)
        assert recorder.seen() == squeeze(stored.source)

    def test_white_space_costs_nothing(self, stored: Function, tokenize: Tokenize):
        wide = stored.source.replace("\n", "\n\n\n").replace("\t", "\t\t\t")
        assert (
            split(wide, language=stored.language, config=UNLIMITED, tokenize=tokenize).whole
            == split(
                stored.source, language=stored.language, config=UNLIMITED, tokenize=tokenize
            ).whole
        )

    def test_line_ends_do_not_matter(self, stored: Function):
        config = replace(UNLIMITED, budget=64)
        unix = split(stored.source, language=stored.language, config=config, tokenize=word_pieces)
        text = stored.source.replace("\n", "\r\n")
        windows = split(text, language=stored.language, config=config, tokenize=word_pieces)
        assert [block.ids for block in windows.blocks] == [block.ids for block in unix.blocks]
        assert [(block.first_line, block.last_line) for block in windows.blocks] == [
            (block.first_line, block.last_line) for block in unix.blocks
        ]

    def test_what_fits_is_one_block(self, stored: Function):
        whole = fair(stored.source, stored.language, replace(UNLIMITED, budget=100_000))[0].whole
        for kind in ("ast", "line", "token", "space"):
            config = replace(UNLIMITED, kind=kind, budget=len(whole), window=100_000)
            found, _ = fair(stored.source, stored.language, config)
            assert len(found.blocks) == 1
            assert found.blocks[0].ids == found.whole == whole
            # Splitting the block again changes nothing.
            text = stored.source[found.blocks[0].start : found.blocks[0].end]
            again, _ = fair(text, stored.language, config)
            assert [block.ids for block in again.blocks] == [whole]

    def test_overlap_repeats_the_end_of_the_block_before(self, stored: Function):
        plain = replace(UNLIMITED, budget=50)
        config = replace(UNLIMITED, budget=60, overlap=10)
        apart = split(stored.source, language=stored.language, config=plain, tokenize=word_pieces)
        found = split(stored.source, language=stored.language, config=config, tokenize=word_pieces)
        if len(found.whole) <= 60:
            assert len(found.blocks) == 1
            return
        assert [len(block.ids) for block in found.blocks] == [
            len(block.ids) + (10 if index else 0) for index, block in enumerate(apart.blocks)
        ]
        for first, second in zip(found.blocks, found.blocks[1:], strict=False):
            assert second.ids[:10] == first.ids[-10:]

    def test_repeated_signature_begins_every_block_within_the_budget(self, stored: Function):
        config = replace(UNLIMITED, budget=120, repeat_signature=True)
        found = split(
            stored.source, language=stored.language, config=config, tokenize=numbered_pieces
        )
        assert all(len(block.ids) <= 120 for block in found.blocks)
        if len(found.blocks) == 1:
            assert found.blocks[0].ids == found.whole
            return
        second = found.blocks[1]
        # Pieces are numbered: the signature is the run from 0 at which the second block begins.
        size = next(place for place, piece in enumerate(second.ids) if place != piece)
        assert size > 0
        bodies = [block.ids[size:] for block in found.blocks]
        assert all(block.ids[:size] == found.whole[:size] for block in found.blocks)
        assert found.whole[:size] + [piece for body in bodies for piece in body] == found.whole

    @pytest.mark.parametrize("most", [1, 7, 32])
    def test_a_repeated_signature_is_cut(self, stored: Function, most: int):
        config = replace(UNLIMITED, budget=60, repeat_signature=True)
        config = replace(config, signature_pieces=most)
        found = split(
            stored.source, language=stored.language, config=config, tokenize=numbered_pieces
        )
        assert all(len(block.ids) <= 60 for block in found.blocks)
        seen = list(found.blocks[0].ids)
        for block in found.blocks[1:]:
            size = next(place for place, piece in enumerate(block.ids) if place != piece)
            assert 0 < size <= most
            assert block.ids[:size] == found.whole[:size]
            seen += block.ids[size:]
        assert seen == found.whole


class TestInstalledPackages:
    """Every function of some installed packages."""

    @pytest.fixture(
        params=(os.environ.get("POLYZOO_SPLIT_PACKAGES") or ",".join(PACKAGES)).split(",")
    )
    def functions(self, request: pytest.FixtureRequest) -> list[Function]:
        functions = package_functions(request.param)
        assert functions, f"{request.param} holds no function"
        return functions

    def test_nothing_lost_nothing_above_the_budget(self, functions: list[Function]):
        config = replace(UNLIMITED, budget=64)
        for function in functions:
            found, recorder = fair(function.source, "python", config)
            assert found.fallback is None, function.name
            assert recorder.seen() == python_code_only(function.source), function.name

    def test_more_budget_never_means_more_blocks(self, functions: list[Function]):
        for function in functions:
            counts = block_counts(function, byte_pieces, [40, 126, 254])
            assert counts == sorted(counts, reverse=True), function.name


class TestChosenCuts:
    """Where the cuts lie."""

    SOURCE = "\n".join(
        [
            "def work(first, second):",
            "    total = first + second + first",
            "    for item in range(total):",
            "        total += item * first",
            "        total -= item * second",
            "    while total > first:",
            "        total //= second",
            "    return total + first + second",
        ]
    )

    def test_blocks_begin_at_statements(self):
        config = replace(UNLIMITED, budget=30, min_tokens=4)
        found = split(self.SOURCE, language="python", config=config, tokenize=word_pieces)
        begins = [self.SOURCE[block.start :].split()[0] for block in found.blocks]
        assert len(begins) >= 3
        assert set(begins) <= {"def", "total", "for", "while", "return"}
        assert {block.kind for block in found.blocks[1:]} <= {
            "expression_statement",
            "for_statement",
            "while_statement",
            "return_statement",
        }

    def test_outer_statements_are_preferred(self):
        body = "    a = b + c\n" * 6
        source = f"def f():\n{body}    if a:\n        x = 1\n        y = 2\n{body}"
        config = replace(UNLIMITED, budget=45, min_tokens=4)
        found = split(source, language="python", config=config, tokenize=word_pieces)
        assert len(found.blocks) == 2
        assert not source[: found.blocks[1].start].endswith("        ")

    def test_signature_stays_with_the_first_statement(self):
        arguments = ", ".join(f"argument_{index}" for index in range(8))
        source = f"def f({arguments}):\n" + "    call(argument_1, argument_2)\n" * 10
        size = len(split(source, language="python", config=UNLIMITED, tokenize=word_pieces).whole)
        for budget in range(56, size):
            config = replace(UNLIMITED, budget=budget)
            found = split(source, language="python", config=config, tokenize=word_pieces)
            assert "call" in source[found.blocks[0].start : found.blocks[0].end]

    def test_no_tiny_last_block_where_the_cut_can_move(self):
        source = "def f():\n" + "    value = value + 1\n" * 12 + "    return 1\n"
        size = len(split(source, language="python", config=UNLIMITED, tokenize=word_pieces).whole)
        config = replace(UNLIMITED, budget=size - 2, min_tokens=16)
        found = split(source, language="python", config=config, tokenize=word_pieces)
        assert len(found.blocks) == 2
        assert len(found.blocks[1].ids) >= 16

    def test_a_long_string_is_cut_at_pieces(self):
        source = 'def f():\n    return """' + "word " * 500 + '"""\n'
        config = replace(UNLIMITED, budget=100)
        found, _ = fair(source, "python", config)
        assert len(found.blocks) == -(-len(found.whole) // 100)

    def test_minified_code_is_cut_between_statements(self):
        source = (
            "function f(){" + "".join(f"var v{i}=g(v{i - 1},{i});" for i in range(1, 200)) + "}"
        )
        config = replace(UNLIMITED, budget=60)
        found, _ = fair(source, "javascript", config)
        assert all(source.startswith("var", block.start) for block in found.blocks[1:])

    def test_thinning_keeps_first_and_last_and_counts(self):
        source = "def f():\n" + "    value = value + 1\n" * 100
        every = split(
            source, language="python", config=replace(UNLIMITED, budget=20), tokenize=word_pieces
        )
        for most in (1, 2, 3, 7):
            config = SplitConfig(budget=20, max_blocks=most)
            found = split(source, language="python", config=config, tokenize=word_pieces)
            assert len(found.blocks) == most
            assert found.blocks[0] == every.blocks[0]
            assert most == 1 or found.blocks[-1] == every.blocks[-1]
            assert found.dropped_blocks == len(every.blocks) - most
            assert {block.start for block in found.blocks} <= {b.start for b in every.blocks}


class TestOddText:
    """Input that is no tidy function."""

    @pytest.mark.parametrize("language", LANGUAGES)
    @pytest.mark.parametrize("text", ["", "   \n\t", "\ufeff", "\x00"])
    def test_nothing_to_split_is_said(self, language: str, text: str):
        with pytest.raises(DataError, match="no code is left"):
            split(text, language=language, config=UNLIMITED, tokenize=word_pieces)

    @pytest.mark.parametrize(
        ("language", "text"),
        [
            ("python", "# only\n# comments"),
            ("python", '"""Only documentation."""'),
            ("java", "/** Only. */\n// comments"),
            ("javascript", "/* only */"),
            ("go", "// only"),
            ("ruby", "# only"),
            ("ruby", "=begin\nonly\n=end\n"),
        ],
    )
    def test_comments_alone_are_said(self, language: str, text: str):
        with pytest.raises(DataError, match="no code is left"):
            split(text, language=language, config=UNLIMITED, tokenize=word_pieces)

    def test_unknown_language_lists_the_known(self):
        with pytest.raises(ConfigError, match=r"'cobol'.*go, java, javascript, php, python, ruby"):
            split("x", language="cobol", config=UNLIMITED, tokenize=word_pieces)

    def test_a_signature_that_fills_the_budget_is_said(self):
        arguments = ", ".join(f"argument_{index}" for index in range(60))
        source = f"def f({arguments}):\n" + "    call()\n" * 20
        config = replace(UNLIMITED, budget=100, repeat_signature=True, signature_pieces=1000)
        with pytest.raises(
            DataError, match=r"budget=100.*signature of \d+ pieces.*signature_pieces=1000"
        ):
            split(source, language="python", config=config, tokenize=word_pieces)

    def test_fifty_megabytes_on_one_line_are_refused(self):
        source = "x = [" + "1," * 25_000_000 + "]"
        with pytest.raises(DataError, match=r"characters of python source, the limit is"):
            split(source, language="python", config=UNLIMITED, tokenize=word_pieces)

    @pytest.mark.parametrize("language", LANGUAGES)
    def test_code_nested_thousands_deep(self, language: str):
        depth = 5_000
        source = "f = " + "(" * depth + "1" + ")" * depth
        config = replace(UNLIMITED, budget=100)
        fair(source, language, config)

    def test_statements_nested_hundreds_deep(self):
        source = "def f():\n" + "".join(f"{' ' * i}if x{i}:\n" for i in range(1, 800)) + " " * 800
        source += "pass\n"
        config = replace(UNLIMITED, budget=100)
        fair(source, "python", config)

    @pytest.mark.parametrize("language", LANGUAGES)
    def test_noise_falls_back_to_lines_and_says_so(self, language: str):
        source = "\n".join(")]}>>=%% ?? ;; @@ ((( [[[ {{{ <<<" for _ in range(40))
        config = replace(UNLIMITED, budget=50)
        found = split(source, language=language, config=config, tokenize=word_pieces)
        assert [piece for block in found.blocks for piece in block.ids] == found.whole
        assert all(len(block.ids) <= 50 for block in found.blocks)
        if ParsedSource(source, language=language).error_share >= 0.25:
            assert found.fallback is not None
            assert re.match(r"line borders: syntax errors cover \d+% of the text", found.fallback)
            starts = {block.start for block in found.blocks}
            assert all(start == 0 or source[start - 1] == "\n" for start in starts)
        else:
            assert found.fallback is None

    def test_the_fallback_is_reached(self):
        source = "\n".join("class of the ones ( which (are not closed" for _ in range(40))
        found = split(source, language="java", config=UNLIMITED, tokenize=word_pieces)
        assert found.fallback is not None

    @pytest.mark.parametrize(
        ("language", "source"),
        [
            ("java", "public int f(int a) {\n    return a;\n}"),
            ("javascript", "static async f(a) {\n    return a;\n}"),
            ("javascript", "f: function (a) {\n    return a;\n}"),
            ("php", "public function f($a) {\n    return $a;\n}"),
            ("php", "function f($a) {\n    return $a;\n}"),
            ("php", "<?php\nfunction f($a) {\n    return $a;\n}"),
            ("php", "function f($a) { ?><b><?php return $a; }"),
            ("ruby", "def f(a)\n  a\nend"),
            ("go", "func (s *T) F(a int) int {\n\treturn a\n}"),
            ("python", "    def f(self, a):\n        return a\n"),
            ("python", 'def f(a):\n    print "python", 2\n    exec "code"\n'),
        ],
    )
    def test_members_alone_parse(self, language: str, source: str):
        assert ParsedSource(source, language=language).error_share == 0
        found, recorder = fair(source, language, UNLIMITED)
        assert recorder.seen() == squeeze(source)
        assert found.fallback is None

    @pytest.mark.parametrize("language", LANGUAGES)
    def test_bom_nul_tabs_and_surrogates_keep_offsets(self, language: str):
        source = "\ufeffname\t=\tcall( 'é\x00\ud800😀' )\r\nother = name\r\n"
        found = split(source, language=language, config=UNLIMITED, tokenize=word_pieces)
        assert found.blocks[0].start == 1
        assert found.blocks[0].last_line == 1
        assert found.blocks[0].end == source.rindex("name") + 4

    def test_documentation_inside_and_above_is_left_out(self):
        texts = {
            "python": 'def f():\n  """SECRET words."""\n  class A:\n    "SECRET"\n  return 1',
            "go": "// SECRET words\nfunc f() int {\n\treturn 1\n}",
            "ruby": "# SECRET words\ndef f\n  1\nend",
            "java": "/** SECRET words. */\nint f() {\n  return 1;\n}",
            "php": "/** SECRET words. */\nfunction f() {\n  return 1;\n}",
            "javascript": "/** SECRET words. */\nfunction f() {\n  return 1;\n}",
        }
        for language, text in texts.items():
            for keep in (False, True):
                config = replace(UNLIMITED, keep_comments=keep)
                assert "SECRET" not in fair(text, language, config)[1].text, language
            config = replace(UNLIMITED, keep_docstrings=True)
            assert "SECRET" in fair(text, language, config)[1].text, language


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_text_in_any_language(data: st.DataObject):
    alphabet = st.sampled_from(
        [
            *"abcdefxyz019_ \n\t(){}[];:,.=+-*/#'\"\\<>?$@|&",
            "é",
            "😀",
            "\r\n",
            "def ",
            "return ",
            "function ",
            "if ",
            "end\n",
            "class ",
            "<?php ",
            "/*",
            "*/",
            "//",
            '"""',
            "\ufeff",
            "\x00",
        ]
    )
    text = "".join(data.draw(st.lists(alphabet, max_size=200)))
    config = replace(
        UNLIMITED,
        kind=data.draw(st.sampled_from(["ast", "line", "token", "space"])),
        budget=data.draw(st.integers(1, 40)),
        window=5,
        step=5,
        min_tokens=data.draw(st.integers(0, 20)),
        keep_comments=data.draw(st.booleans()),
    )
    language = data.draw(st.sampled_from(LANGUAGES))
    blank = not squeeze(text.replace("\x00", "").replace("\ufeff", ""))
    if blank:
        with pytest.raises(DataError, match="no code is left"):
            fair(text, language, config)
        return
    with contextlib.suppress(DataError):  # comments alone
        fair(text, language, config)
