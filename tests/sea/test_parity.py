"""Stored results of the published implementation. `--parity-dir DIR` takes further cases."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polyzoo.core.weights import load_into
from polyzoo.sea.aggregation import Aggregation, released_kind
from polyzoo.sea.config import SeaConfig
from polyzoo.sea.convert import rename
from polyzoo.sea.encoding.encoder import PackedEncoder
from polyzoo.sea.encoding.encoder_loading import register_attention
from polyzoo.sea.evaluation import released_rows
from polyzoo.sea.losses import contrastive_loss
from polyzoo.sea.metrics import Figures, answer_ranks, mean_reciprocal_rank, released_ranks
from polyzoo.sea.model import SeaModel
from polyzoo.sea.splitting import released
from support.parity import case_folders
from support.tokenizing import byte_pieces

TOLERANCE = 1e-5


def relative_error(found: Tensor | np.ndarray, wanted: Tensor | np.ndarray) -> float:
    """Largest difference over the largest value."""
    found, wanted = torch.as_tensor(found).detach(), torch.as_tensor(wanted)
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


@dataclass(frozen=True)
class Stored:
    """One pair of .json and .npz files."""

    about: Any
    arrays: dict[str, np.ndarray]

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name].copy())

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): self.tensor(name)
            for name in self.arrays
            if name.startswith(prefix)
        }


def stored(config: pytest.Config, name: str) -> list[Stored]:
    found = []
    for folder in case_folders(config, "sea"):
        path = Path(folder) / f"{name}.json"
        if path.is_file():
            with np.load(path.with_suffix(".npz")) as arrays:
                values = {key: arrays[key] for key in arrays.files}
            found.append(Stored(json.loads(path.read_text(encoding="utf-8")), values))
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    if "split_case" in metafunc.fixturenames:
        cases = _split_cases(config)
        metafunc.parametrize("split_case", cases, ids=[case["id"] for case in cases])
    if "aggregation_case" in metafunc.fixturenames:
        cases = [(file, case) for file in stored(config, "aggregation")
                 for case in file.about["cases"]]  # fmt: skip
        metafunc.parametrize("aggregation_case", cases, ids=[case["case"] for _, case in cases])
    if "combine_case" in metafunc.fixturenames:
        cases = [(file, name) for file in stored(config, "combine_divide")
                 for name in file.about["variants"] if not name.startswith("_")]  # fmt: skip
        metafunc.parametrize("combine_case", cases, ids=[name for _, name in cases])


class TestAggregation:
    """Every variant of the published aggregation module."""

    def test_there_are_cases(self, pytestconfig: pytest.Config):
        assert stored(pytestconfig, "aggregation")

    def test_vectors_and_weights(self, aggregation_case: tuple[Stored, dict[str, Any]]):
        file, case = aggregation_case
        flags = case["config"]
        kind, raw = released_kind(flags["common_type"], with_ave=flags["with_ave"])
        module = Aggregation(case["dim"], kind=kind, raw=raw, multiply=flags["mul"])
        weights = {f"fusion_layer.{k}": v for k, v in file.under(f"{case['variant']}/w/").items()}
        renamed = rename(weights, aggregator=kind, source="stored")
        load_into(
            module,
            {name.removeprefix("aggregation."): tensor for name, tensor in renamed.items()},
            source="stored",
        )
        if hasattr(module, "raw_weight"):
            module.raw_weight.fill_(case["global_weight"])  # pyright: ignore[reportCallIssue]
        x = file.tensor(f"{case['case']}/x")
        b, blocks, dim = x.shape
        given = file.tensor(f"{case['case']}/raw") if case["raw_global_given"] else None
        out = module(x.reshape(-1, dim), torch.arange(b + 1) * blocks, given)
        assert relative_error(out.vectors, file.tensor(f"{case['case']}/y")) <= TOLERANCE
        if f"{case['case']}/reported_weights" in file.arrays:
            wanted = file.tensor(f"{case['case']}/reported_weights")
            assert relative_error(out.weights.reshape(b, blocks), wanted) <= TOLERANCE


def combine_model(file: Stored, *, common_type: str, with_ave: bool, fusion: str) -> SeaModel:
    """The stored tiny RoBERTa with one of the stored aggregations, loaded as a checkpoint is."""
    from transformers import RobertaConfig, RobertaModel

    register_attention()
    shape = RobertaConfig.from_dict(file.about["config"])
    shape._attn_implementation = "polyzoo"
    kind, raw = released_kind(common_type, with_ave=with_ave)
    config = SeaConfig(
        encoder="stored", pooling="pooler", normalize=False, aggregator=kind, raw=raw
    )
    model = SeaModel(PackedEncoder(RobertaModel(shape), pooling="pooler"), config)
    tensors = {f"encoder.{name}": tensor for name, tensor in file.under("encoder/").items()}
    tensors |= {f"fusion_layer.{name}": x for name, x in file.under(f"{fusion}/fusion/").items()}
    load_into(model, rename(tensors, aggregator=kind, source="stored"), source="stored")
    return model.eval()


def without_padding(rows: Tensor, pad: int = 1) -> list[list[int]]:
    return [[token for token in row if token != pad] for row in rows.tolist()]


class TestCombineDivide:
    """Encoder, pooler and aggregation together, on the stored functions of 1 to 6 blocks."""

    def test_code_vectors_scores_and_loss(self, combine_case: tuple[Stored, str]):
        file, name = combine_case
        about = file.about["variants"][name]
        model = combine_model(
            file, common_type=about["common_type"], with_ave=about["with_ave"], fusion=name
        )
        counts = file.arrays["counts"]
        starts = np.concatenate([[0], np.cumsum(counts)])
        codes = model.embed_codes(without_padding(file.tensor("concat_blocks")), starts)
        queries = model.embed_queries(without_padding(file.tensor("nl")))
        scores = model.scores(queries, codes)
        for wanted in ("code_emb", "get_code_emb"):
            assert relative_error(codes.vectors, file.tensor(f"{name}/{wanted}")) <= TOLERANCE
        assert relative_error(queries, file.tensor(f"{name}/nl_emb")) <= TOLERANCE
        assert relative_error(scores, file.tensor(f"{name}/scores")) <= TOLERANCE
        loss = contrastive_loss(scores, temperature=1.0)
        assert float(loss) == pytest.approx(float(file.arrays[f"{name}/loss"]), rel=TOLERANCE)

    def test_fused_forward_gives_the_same(self, combine_case: tuple[Stored, str]):
        file, name = combine_case
        about = file.about["variants"][name]
        model = combine_model(
            file, common_type=about["common_type"], with_ave=about["with_ave"], fusion=name
        )
        assert model.encoder.fuse()
        starts = np.concatenate([[0], np.cumsum(file.arrays["counts"])])
        codes = model.embed_codes(without_padding(file.tensor("concat_blocks")), starts)
        assert relative_error(codes.vectors, file.tensor(f"{name}/code_emb")) <= TOLERANCE


class TestReleasedPrediction:
    """The published inference over a codebase, which weighs answers above other candidates."""

    def test_scores_with_stored_blocks(self, pytestconfig: pytest.Config):
        files = stored(pytestconfig, "combine_divide")
        assert files
        for file in files:
            model, queries, codes, about = self.parts(file)
            out = model.aggregate(codes[0], codes[1])
            found = (queries @ out.vectors.T).detach()
            n = about["n_code"]
            wanted = file.tensor("predict/scores")
            assert relative_error(found, wanted[:, :n]) <= TOLERANCE
            assert bool((wanted[:, n:] == -50).all())

    def test_an_unsplit_answer_counts_one_and_a_half(self, pytestconfig: pytest.Config):
        for file in stored(pytestconfig, "combine_divide"):
            model, queries, _, about = self.parts(file)
            inputs = without_padding(file.tensor("predict/code_inputs"))
            plain = model.embed_codes(inputs, np.arange(len(inputs) + 1))
            wanted = file.tensor("predict/scores")
            for row, entries in enumerate(about["ground_truth_and_blocks"]):
                if len(entries) == 1:
                    score = float(queries[row] @ plain.vectors[entries[0]])
                    assert float(wanted[row, entries[0]]) == pytest.approx(1.5 * score, rel=1e-4)

    @staticmethod
    def parts(file: Stored) -> tuple[SeaModel, Tensor, tuple[Tensor, Tensor], dict[str, Any]]:
        """Model, query vectors, and entries in the order the published inference aggregates."""
        about = file.about["variants"]["_predict"]
        model = combine_model(file, common_type="one_layer", with_ave=True, fusion="predict")
        vectors = model.encoder.encode(without_padding(file.tensor("predict/code_inputs"))).detach()
        blocks = {entries[0]: entries for entries in about["ground_truth_and_blocks"]}
        order = [blocks.get(code, [code]) for code in range(about["n_code"])]
        starts = np.concatenate([[0], np.cumsum([len(entries) for entries in order])])
        rows, new_starts = released_rows(starts, list(blocks))
        entries = vectors[[entry for entries in order for entry in entries]]
        queries = model.embed_queries(without_padding(file.tensor("predict/nl_inputs")))
        return model, queries, (entries[rows], torch.from_numpy(new_starts)), about


class TestMetrics:
    """Ranks, tie policies and cut-offs."""

    def test_policies(self, pytestconfig: pytest.Config):
        files = stored(pytestconfig, "metrics")
        assert files
        for file in files:
            for part in ("no_ties", "ties"):
                about = file.about[part]
                for policy, wanted in about["policies"].items():
                    found = answer_ranks(file.arrays[part], about["ground_truth"], ties=policy)
                    figures = Figures.of(found.ranks)
                    assert found.ranks.tolist() == wanted["ranks"]
                    assert figures.mrr == pytest.approx(wanted["mrr"], rel=TOLERANCE)
                    assert figures.median_rank == wanted["median_rank"]
                    for k in ("1", "5", "10"):
                        assert figures.recall[k] == pytest.approx(wanted[f"r{k}"], rel=TOLERANCE)

    def test_published_values_where_there_are_no_ties(self, pytestconfig: pytest.Config):
        for file in stored(pytestconfig, "metrics"):
            about = file.about["no_ties"]
            found = answer_ranks(file.arrays["no_ties"], about["ground_truth"])
            assert found.tied == 0
            figures = Figures.of(found.ranks)
            for name, value in (("mrr", figures.mrr), ("median_rank", figures.median_rank)):
                assert value == pytest.approx(about["official"][name], rel=TOLERANCE)
            for k, share in figures.recall.items():
                assert share == pytest.approx(about["official"][f"r{k}"], rel=TOLERANCE)

    def test_graphcodebert_cutoffs(self, pytestconfig: pytest.Config):
        for file in stored(pytestconfig, "metrics"):
            about = file.about["no_ties"]
            found = answer_ranks(file.arrays["no_ties"], about["ground_truth"])
            for cutoff, wanted in about["graphcodebert_cut"].items():
                value = mean_reciprocal_rank(found.ranks, cutoff=int(cutoff))
                assert value == pytest.approx(wanted, rel=TOLERANCE)

    def test_released_form_with_masked_block_columns(self, pytestconfig: pytest.Config):
        for file in stored(pytestconfig, "metrics"):
            about = file.about["blocks_masked"]
            answers = [entries[0] for entries in about["new_query_ids"]]
            ranks = released_ranks(
                file.arrays["blocks_masked"], answers, candidates=about["n_real"]
            )
            assert (1 / ranks).tolist() == pytest.approx(about["official"]["reciprocal_ranks"])
            figures = Figures.of(ranks)
            assert figures.mrr == pytest.approx(about["official"]["mrr"], rel=TOLERANCE)
            assert figures.median_rank == about["official"]["median_rank"]

    def test_cosine_matrix(self, pytestconfig: pytest.Config):
        for file in stored(pytestconfig, "metrics"):
            a, b = (torch.nn.functional.normalize(file.tensor(f"cos_{x}"), dim=1) for x in "ab")
            assert relative_error(a @ b.T, file.tensor("cos")) <= TOLERANCE


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
