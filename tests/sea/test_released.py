"""The published splitters: the faults that parity keeps, one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyzoo.core.errors import DataError
from polyzoo.sea.config import SplitConfig
from polyzoo.sea.splitting import released, split
from support.functions import stored_functions
from support.tokenizing import byte_pieces, word_pieces

RELEASED = SplitConfig(profile="released", max_blocks=1_000_000)


class TestSlidingWindows:
    """The window generator."""

    @given(st.integers(0, 60), st.integers(1, 40), st.integers(1, 40))
    def test_agrees_with_its_definition(self, count: int, window: int, step: int):
        expected = []
        place = 0
        while place < count - 1:
            expected.append(list(range(place, min(place + window, count))))
            place += step
        found = released.sliding_windows(list(range(count)), window=window, step=step)
        assert found == expected

    def test_one_item_gives_no_window(self):
        assert released.sliding_windows(["a"], window=4, step=2) == []

    def test_eighteen_items_are_needed_for_two_windows_of_32(self):
        assert len(released.sliding_windows(range(17), window=32, step=16)) == 1
        assert len(released.sliding_windows(range(18), window=32, step=16)) == 2


class TestPreparation:
    """Text before splitting."""

    def test_python_loses_its_indentation_and_its_first_docstring(self):
        source = 'def f():\n    """One\n    two."""\n    if x:\n        """Kept."""\n'
        assert released.prepare(source, language="python") == (
            'def f():\n \n if x:\n """Kept."""\n'
        )

    def test_other_languages_lose_only_spaces(self):
        source = 'x =  """a  b"""\n\t\ty'
        assert released.prepare(source, language="go") == 'x = """a b"""\n\t\ty'

    def test_comment_removal_spares_strings(self):
        source = "a = \"// no\"; // yes\n/* yes\n yes */ b = '/* no */';\n\n"
        assert released.remove_comments(source, language="java") == (
            "a = \"// no\";  \n  b = '/* no */';"
        )

    def test_ruby_keeps_its_comments(self):
        source = "# kept\ndef f\nend"
        assert released.strip_comments(source, language="ruby") == source

    def test_broken_python_stays_as_it_is(self):
        source = "def f(:\n  '''open # comment"
        assert released.strip_comments(source, language="python") == source


class TestTreePieces:
    """The syntax-tree splitter."""

    def test_the_end_is_lost(self):
        source = "".join(
            f"def f{index}():\n  a = 1\n  b = 2\n  c = 3\n  d = 4\n" for index in range(4)
        )
        pieces = released.ast_pieces(source, language="python", min_line=3)
        assert len(pieces) == 3
        assert "".join(pieces) != source
        assert "f3" not in "".join(pieces)

    def test_fewer_than_two_points_give_the_whole_text(self):
        assert released.ast_pieces("x = 1", language="python") == ["x = 1"]

    def test_php_keeps_the_wrapper(self):
        assert released.ast_pieces("f();", language="php") == ["<?phpf();?>"]


class TestSplit:
    """The profile through the common entry point."""

    @pytest.mark.parametrize("function", stored_functions(), ids=lambda function: function.name)
    @pytest.mark.parametrize("kind", ["token", "line", "space", "ast"])
    def test_blocks_are_the_published_windows(self, function, kind):
        config = replace(RELEASED, kind=kind, window=16, step=8)
        found = split(
            function.source, language=function.language, config=config, tokenize=byte_pieces
        )
        windows = released.windows(
            function.source, language=function.language, kind=kind, window=16, step=8
        )
        limit = 36 if kind in ("token", "space") else config.budget
        assert all(1 <= len(block.ids) <= limit for block in found.blocks if len(windows) > 1)
        if len(windows) < 2:
            assert [block.ids for block in found.blocks] == [found.whole[: config.budget]]
            return
        counts = []
        for window in windows:
            tokens = list(window)
            if kind != "token":
                text = released.window_text(window, kind=kind)
                tokens = released.lexer_tokens(text, language=function.language) if text else []
            pieces = released.piece_count(tokens, lambda text: len(byte_pieces(text).ids))
            counts.append(min(pieces, limit))
        assert [len(block.ids) for block in found.blocks] == [count for count in counts if count]

    def test_blocks_point_at_the_whole_text(self):
        source = "def f():\n" + "    a = 1\n" * 40
        config = replace(RELEASED, kind="line", window=8, step=4)
        found = split(source, language="python", config=config, tokenize=word_pieces)
        assert {(block.start, block.end) for block in found.blocks} == {(0, len(source))}
        assert {(block.first_line, block.last_line) for block in found.blocks} == {(0, 40)}

    def test_thinning_is_counted(self):
        source = "def f():\n" + "    a = 1\n" * 40
        config = replace(RELEASED, kind="line", window=8, step=4, max_blocks=3)
        found = split(source, language="python", config=config, tokenize=word_pieces)
        assert (len(found.blocks), found.dropped_blocks) == (3, 8)

    @pytest.mark.parametrize("text", ["", "# only a comment"])
    def test_nothing_to_split_is_said(self, text: str):
        with pytest.raises(DataError, match="no code is left"):
            split(text, language="python", config=RELEASED, tokenize=word_pieces)
