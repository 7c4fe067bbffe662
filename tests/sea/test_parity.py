"""Stored results of the published implementation. `--parity-dir DIR` takes further cases."""

from __future__ import annotations

import json
from dataclasses import dataclass
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
from polyzoo.sea.encoder import PackedEncoder, register_attention
from polyzoo.sea.evaluation import released_rows
from polyzoo.sea.losses import contrastive_loss
from polyzoo.sea.metrics import Figures, answer_ranks, mean_reciprocal_rank, released_ranks
from polyzoo.sea.model import SeaModel
from support.parity import case_folders

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
