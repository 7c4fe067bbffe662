"""Stored results of the published implementation. `--parity-dir DIR` takes further cases."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from polyzoo.sea import released
from support.parity import case_folders
from support.tokenizing import byte_pieces


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "split_case" in metafunc.fixturenames:
        cases = _split_cases(metafunc.config)
        metafunc.parametrize("split_case", cases, ids=[case["id"] for case in cases])


def _split_cases(config: pytest.Config) -> list[dict[str, Any]]:
    """Every case of every split_*.json, with the versions that its file was made with."""
    cases = []
    for folder in case_folders(config, "sea"):
        for path in sorted(Path(folder).glob("split_*.json")):
            stored = json.loads(path.read_text(encoding="utf-8"))
            cases.extend({**case, "versions": stored["versions"]} for case in stored["cases"])
    return cases


def _places(windows: list[Any], step: int) -> list[list[int]]:
    return [[index * step, len(window)] for index, window in enumerate(windows)]


def _grammar_is_recorded(case: dict[str, Any]) -> bool:
    """Whether the installed grammar is the one the case was made with: only then nodes agree."""
    versions = {
        name: version for name, version in case["versions"].items() if name != "tree-sitter"
    }
    return all(metadata.version(name) == version for name, version in versions.items())


class TestSplitting:
    """The released profile, faults included."""

    def test_there_are_cases(self, request: pytest.FixtureRequest):
        assert _split_cases(request.config)

    def test_preparation(self, split_case: dict[str, Any]):
        source, language = split_case["source"], split_case["language"]
        prepared = released.prepare(source, language=language)
        assert prepared == split_case["official_preprocess"]
        assert released.strip_comments(source, language=language) == split_case["comments_removed"]

    def test_line_windows(self, split_case: dict[str, Any]):
        lines = split_case["official_preprocess"].split("\n")
        assert len(lines) == split_case["line_count"]
        narrow = released.sliding_windows(lines, window=8, step=4)
        assert _places(narrow, 4) == split_case["line_windows_8_4"]
        found = released.windows(
            split_case["source"], language=split_case["language"], kind="line", window=32, step=16
        )
        texts = [released.window_text(window, kind="line") for window in found]
        assert [[16 * index, text] for index, text in enumerate(texts)] == (
            split_case["line_windows_32_16"]
        )

    def test_word_windows(self, split_case: dict[str, Any]):
        words = split_case["official_preprocess"].split(" ")
        assert len(words) == split_case["word_count"]
        wide = released.sliding_windows(words, window=256, step=128)
        assert _places(wide, 128) == split_case["word_windows_256_128"]
        found = released.windows(
            split_case["source"], language=split_case["language"], kind="space", window=64, step=32
        )
        texts = [released.window_text(window, kind="space") for window in found]
        # At most the first six are stored.
        assert [[32 * index, text] for index, text in enumerate(texts)][:6] == (
            split_case["word_windows_64_32"]
        )

    def test_lexer_tokens(self, split_case: dict[str, Any]):
        tokens = released.lexer_tokens(
            split_case["comments_removed"], language=split_case["language"]
        )
        if not _grammar_is_recorded(split_case):
            # Other grammar versions name and nest leaves differently; the text must be the same.
            expected = "".join("".join(split_case["tokens"]).split())
            assert "".join("".join(tokens).split()) == expected
            return
        assert tokens == split_case["tokens"]
        for window, step in ((256, 128), (32, 16)):
            found = released.sliding_windows(tokens, window=window, step=step)
            assert _places(found, step) == split_case[f"token_windows_{window}_{step}"]
        by_kind = released.windows(
            split_case["source"], language=split_case["language"], kind="token", window=32, step=16
        )
        assert _places(by_kind, 16) == split_case["token_windows_32_16"]

    def test_encoder_pieces(self, split_case: dict[str, Any]):
        count = released.piece_count(split_case["tokens"], lambda text: len(byte_pieces(text).ids))
        assert count == split_case["bpe_token_count"]

    @pytest.mark.parametrize("text", ["ast_on_source", "ast_on_official_preprocess"])
    def test_tree_pieces(self, split_case: dict[str, Any], text: str):
        stored, language = split_case[text], split_case["language"]
        source = stored["input"]
        pieces = {
            name: released.ast_pieces(source, language=language, min_line=min_line)
            for name, min_line in (
                ("blocks_min3", 3),
                ("blocks_min1", 1),
                ("blocks_default_min5", 5),
            )
        }
        assert released.ast_pieces(source, language=language) == pieces["blocks_default_min5"]
        if not _grammar_is_recorded(split_case):
            # A grammar update can move a cut by a node: the start of the text and the number of
            # pieces stay within one cut of the stored ones.
            for name, found in pieces.items():
                assert abs(len(found) - len(stored[name])) <= max(1, len(stored[name]) // 4)
                assert found[0].split("\n")[0] == stored[name][0].split("\n")[0]
            return
        code = released.wrap(released.strip_comments(source, language=language), language=language)
        points = released.start_points(code, language=language, min_line=3)
        assert [list(point) for point in points] == stored["start_points_min3"]
        for name, found in pieces.items():
            assert found == stored[name]
        for window, step in ((32, 16), (4, 2)):
            found = released.sliding_windows(pieces["blocks_min3"], window=window, step=step)
            assert _places(found, step) == stored[f"windows_{window}_{step}"]
