"""Losses against closed forms, and batches that cannot teach."""

from __future__ import annotations

import math

import pytest
import torch

from polyzoo.core.errors import ConfigError, DataError
from polyzoo.sea.losses import (
    check_negatives,
    contrastive_loss,
    cosine_distance,
    find_duplicates,
    score_divergence,
)


def test_equal_scores_give_the_logarithm_of_the_candidates():
    assert float(contrastive_loss(torch.zeros(4, 7))) == pytest.approx(math.log(7))
    assert float(contrastive_loss(torch.zeros(4, 4), symmetric=True)) == pytest.approx(math.log(4))


def test_by_hand_with_temperature_and_both_directions():
    scores = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    rows = [math.log(1 + math.exp(-1 / 0.5)), math.log(1 + math.exp(-3 / 0.5))]
    columns = [math.log(1 + math.exp(-2 / 0.5)), math.log(1 + math.exp(-2 / 0.5))]
    one = contrastive_loss(scores, temperature=0.5)
    both = contrastive_loss(scores, temperature=0.5, symmetric=True)
    assert float(one) == pytest.approx(sum(rows) / 2, rel=1e-5)
    assert float(both) == pytest.approx((sum(rows) + sum(columns)) / 4, rel=1e-5)


def test_masked_duplicates_equal_leaving_them_out():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 5, generator=generator)
    duplicates = torch.zeros(3, 5, dtype=torch.bool)
    duplicates[:, 4] = True
    found = contrastive_loss(scores, duplicates=duplicates)
    assert float(found) == pytest.approx(float(contrastive_loss(scores[:, :4])), rel=1e-6)


def test_duplicates_are_same_documentation_or_same_code():
    queries, codes = torch.tensor([1, 2, 1, 4]), torch.tensor([7, 8, 9, 8])
    assert find_duplicates(queries, codes, columns=3).tolist() == [
        [False, False, True, False],
        [False, False, False, True],
        [True, False, False, False],
    ]


def test_batches_without_negatives():
    with pytest.raises(DataError, match="batch of 1 pair has no negatives"):
        contrastive_loss(torch.zeros(1, 1))
    with pytest.raises(DataError, match="all 3 pairs of the batch are duplicates"):
        check_negatives(~torch.eye(3, dtype=torch.bool))
    with pytest.raises(ConfigError, match="temperature=0"):
        contrastive_loss(torch.zeros(2, 2), temperature=0)


def test_distances_to_a_teacher():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert float(cosine_distance(x, 3 * x)) == pytest.approx(0, abs=1e-6)
    assert float(cosine_distance(x, x.flip(1))) == pytest.approx(1, abs=1e-6)
    with pytest.raises(ConfigError, match="differ in shape"):
        cosine_distance(x, torch.zeros(2, 3))
    scores = torch.tensor([[0.2, 0.1, 0.0], [0.3, 0.5, 0.1]])
    assert float(score_divergence(scores, scores, temperature=0.1)) == pytest.approx(0, abs=1e-6)
    wanted, given = scores.softmax(1), scores.flip(1).softmax(1)
    by_hand = (wanted * (wanted / given).log()).sum(1).mean()
    found = score_divergence(scores.flip(1), scores, temperature=1.0)
    assert float(found) == pytest.approx(float(by_hand), rel=1e-5)
    masked = torch.zeros(2, 3, dtype=torch.bool)
    masked[:, 2] = True
    left = score_divergence(scores.flip(1), scores, temperature=1.0, duplicates=masked)
    alone = score_divergence(scores.flip(1)[:, :2], scores[:, :2], temperature=1.0)
    assert float(left) == pytest.approx(float(alone), rel=1e-4)
