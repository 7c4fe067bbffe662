"""Ranks and protocols in closed form."""

from __future__ import annotations

import numpy as np
import pytest

from polyzoo.core.errors import DataError
from polyzoo.sea.baselines import TfIdf, terms
from polyzoo.sea.evaluation import rank, released_rows
from polyzoo.sea.metrics import Figures, answer_ranks, by_length, mean_reciprocal_rank


def rows_of(scores: np.ndarray):
    return lambda first, last: scores[first:last]


def test_perfect_and_constant_scores():
    answers = np.arange(6)
    perfect = rank(rows_of(np.eye(6)), answers, np.full(6, 10))
    assert perfect.all.mrr == 1.0
    assert perfect.all.recall["1"] == 100.0
    assert perfect.tied == 0
    flat = np.ones((6, 6))
    policies = {"pessimistic": 1 / 6, "mean": 1 / 3.5, "optimistic": 1.0}
    for ties, mrr in policies.items():
        found = rank(rows_of(flat), answers, np.full(6, 10), ties=ties)  # pyright: ignore[reportArgumentType]
        assert found.all.mrr == pytest.approx(mrr)
        assert found.tied == 6


def test_ties_by_hand():
    scores = np.array([[3.0, 2.0, 2.0, 2.0, 1.0]])
    assert answer_ranks(scores, [2]).ranks.tolist() == [4]
    assert answer_ranks(scores, [2], ties="mean").ranks.tolist() == [3]
    assert answer_ranks(scores, [2], ties="optimistic").ranks.tolist() == [2]
    assert answer_ranks(scores, [4]).ranks.tolist() == [5]


def test_cutoff_and_buckets():
    ranks = np.array([1.0, 4.0, 2000.0])
    assert mean_reciprocal_rank(ranks) == pytest.approx((1 + 0.25 + 0.0005) / 3)
    assert mean_reciprocal_rank(ranks, cutoff=1000) == pytest.approx(1.25 / 3)
    found = by_length(ranks, np.array([256, 257, 513]))
    assert [found[name].n for name in ("<=256", "257-512", ">512", ">256")] == [1, 1, 1, 2]
    assert found["<=256"].mrr == 1.0
    assert Figures.of(np.array([])).mrr == 0.0


def test_what_is_not_a_score_is_refused():
    scores = np.eye(3)
    scores[1, 2] = np.nan
    with pytest.raises(DataError, match="query 1 has a score that is not a finite number"):
        answer_ranks(scores, [0, 1, 2])
    with pytest.raises(DataError, match="outside the 3 candidates"):
        answer_ranks(np.eye(3), [0, 1, 3])
    with pytest.raises(DataError, match="do not fit"):
        answer_ranks(np.eye(3), [0, 1])


def test_csn1000_ranks_inside_its_pools():
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(2100, 2100))
    answers = generator.permutation(2100)
    found = rank(rows_of(scores), answers, np.full(2100, 10), protocol="csn1000")
    wanted = [
        answer_ranks(scores[a:b][:, answers[a:b]], np.arange(1000)).ranks
        for a, b in ((0, 1000), (1000, 2000))
    ]
    assert found.all.n == 2000  # the last 100 fill no pool
    assert found.ranks == np.concatenate(wanted).tolist()
    with pytest.raises(DataError, match="at least 1000 queries, there are 12"):
        rank(rows_of(scores), answers[:12], np.full(12, 10), protocol="csn1000")


def test_graphcodebert_ignores_ranks_beyond_1000():
    scores = -np.arange(1500.0)[None].repeat(2, axis=0)
    answers, lengths = np.array([1, 1200]), np.array([10, 300])
    found = rank(rows_of(scores), answers, lengths, protocol="graphcodebert")
    assert found.all.mrr == pytest.approx(0.5 / 2)
    assert found.by_length[">256"].mrr == 0.0
    full = rank(rows_of(scores), answers, lengths)
    assert full.all.mrr == pytest.approx((0.5 + 1 / 1201) / 2)


def test_released_order_repeats_the_whole_of_answers_only():
    rows, starts = released_rows(np.array([0, 1, 4, 5]), [1])
    assert rows.tolist() == [0, 1, 1, 2, 3, 4]
    assert starts.tolist() == [0, 1, 5, 6]


def test_tfidf_splits_identifiers():
    assert terms("parseHTTPResponse_fast2(x)") == ["parse", "http", "response", "fast"]
    pool = [
        "def readFile(path): open(path)",
        "def add_numbers(a, b): return a",
        "class Nothing: pass",
    ]
    scores = TfIdf(pool).scores(["how to read a file", "numbers to add", "zzz"])
    assert scores.argmax(1)[:2].tolist() == [0, 1]
    assert scores[2].tolist() == [0.0, 0.0, 0.0]
    assert TfIdf(pool).scores(pool).diagonal() == pytest.approx(np.ones(3), abs=1e-6)
