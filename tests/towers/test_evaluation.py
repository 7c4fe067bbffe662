"""Distances, maps, recalls and proposals against slow versions written out in full."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from polyzoo.core.errors import DataError
from polyzoo.towers import RidgeMap, image_batch, kernel_distance, propose, recall_at
from polyzoo.towers.proposals import connected_parts
from polyzoo.towers.retrieval import ranks_of
from support.tower_samples import scene, small_dinov2


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_kernel_distance_is_the_sum_it_claims_to_be() -> None:
    a, b = noise(7, 5), noise(4, 5, seed=1) + 0.5

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x @ y / 5 + 1) ** 3)

    aa = [kernel(a[i], a[j]) for i in range(7) for j in range(7) if i != j]
    bb = [kernel(b[i], b[j]) for i in range(4) for j in range(4) if i != j]
    ab = [kernel(x, y) for x in a for y in b]
    expected = sum(aa) / 42 + sum(bb) / 12 - 2 * sum(ab) / 28
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert kernel_distance(b, a) == pytest.approx(expected, rel=1e-5)


def test_kernel_distance_is_unbiased_and_tells_distributions_apart() -> None:
    same = torch.tensor(
        [kernel_distance(noise(40, 6, seed=i), noise(40, 6, seed=100 + i)) for i in range(60)]
    )
    error = same.std() / 60**0.5
    assert abs(same.mean()) < 3 * error
    assert same.min() < 0  # a biased estimate never is
    apart = kernel_distance(noise(40, 6), 1.5 * noise(40, 6, seed=7) + 0.3)
    assert apart > same.mean() + 3 * same.std()


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((4, 3), (4, 2), r"\(4, 3\) and \(4, 2\); they must be"),
        ((4, 3), (3,), "they must be"),
        ((1, 3), (4, 3), "1 and 4 rows of features: two of each are the least"),
    ],
)
def test_bad_sets_are_named(first: tuple, second: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel_distance(torch.zeros(first), torch.zeros(second))


@pytest.mark.parametrize("rows", [6, 40])
def test_ridge_solves_the_penalised_least_squares(rows: int) -> None:
    """The same map as least squares on rows that ask for zero, found another way (by QR)."""
    x, y, penalty = noise(rows, 9), noise(rows, 4, seed=1), 3.0
    ridge = RidgeMap.fit(x, y, penalty=penalty)
    centred = (x - x.mean(0)) / x.std(0)
    longer = torch.cat([centred, penalty**0.5 * torch.eye(9)]).double()
    targets = torch.cat([y - y.mean(0), torch.zeros(9, 4)]).double()
    expected = torch.linalg.lstsq(longer, targets, driver="gelsd").solution
    torch.testing.assert_close(ridge.weight, expected, rtol=1e-4, atol=1e-5)
    new = noise(3, 9, seed=2)
    out = ((new - x.mean(0)) / x.std(0)) @ expected.float() + y.mean(0)
    torch.testing.assert_close(ridge(new), F.normalize(out, dim=1), rtol=1e-4, atol=1e-5)


def test_ridge_finds_a_linear_rule_again() -> None:
    x, rule = noise(300, 12), noise(12, 6, seed=1)
    names = noise(20, 6, seed=2)
    ridge = RidgeMap.fit(x, x @ rule, penalty=1e-3)
    new = noise(50, 12, seed=3)
    scores = F.normalize(new @ rule, dim=1) @ F.normalize(names, dim=1).T
    found = ridge(new) @ F.normalize(names, dim=1).T
    assert recall_at(found, scores.argmax(1))[1] == 1.0


def test_scores_leave_out_what_all_texts_share() -> None:
    x, y = noise(40, 9), noise(40, 4, seed=1) + 5.0
    ridge = RidgeMap.fit(x, y, penalty=2.0)
    new, texts = noise(3, 9, seed=2), noise(6, 4, seed=3) + 5.0
    offsets = ((new.double() - ridge.mean) / ridge.scale) @ ridge.weight
    expected = [
        [F.cosine_similarity(a, t.double() - y.double().mean(0), dim=0).item() for t in texts]
        for a in offsets
    ]
    found = ridge.scores(new, texts)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    again = RidgeMap(**ridge.tensors()).to("cpu")
    torch.testing.assert_close(again.scores(new, texts), found, rtol=0, atol=0)


def test_ridge_bears_features_that_never_change() -> None:
    x = noise(30, 5)
    x[:, 2] = 4.0
    ridge = RidgeMap.fit(x, noise(30, 3, seed=1))
    assert ridge(noise(4, 5, seed=2)).isfinite().all()


@pytest.mark.parametrize(
    ("shapes", "penalty", "message"),
    [
        (((4, 3), (5, 2)), 1.0, r"features are \(4, 3\), targets \(5, 2\)"),
        (((1, 3), (1, 2)), 1.0, "1 rows of features: two are the least"),
        (((4, 3), (4, 2)), 0.0, "penalty=0.0 must be above 0"),
    ],
)
def test_bad_fits_are_named(shapes: tuple, penalty: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RidgeMap.fit(torch.zeros(shapes[0]), torch.zeros(shapes[1]), penalty=penalty)


@given(
    scores=hnp.arrays(
        np.int64, st.tuples(st.integers(1, 8), st.integers(1, 9)), elements=st.integers(0, 3)
    ),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_recall_counts_ties_against(scores: np.ndarray, data: st.DataObject) -> None:
    n, candidates = scores.shape
    truth = data.draw(hnp.arrays(np.int64, n, elements=st.integers(0, candidates - 1)))
    ranks = [
        1 + sum(scores[i, j] >= scores[i, truth[i]] for j in range(candidates) if j != truth[i])
        for i in range(n)
    ]
    values, right = torch.from_numpy(scores).float(), torch.from_numpy(truth)
    assert ranks_of(values, right).tolist() == ranks
    recalls = recall_at(values, right, ks=(1, 2, candidates))
    assert recalls[1] == pytest.approx(sum(r <= 1 for r in ranks) / n)
    assert recalls[candidates] == 1.0


@pytest.mark.parametrize(
    ("scores", "truth", "ks", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0]), (1,), r"\(2, 3\), truth \(1,\)"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), (1,), "truth is 0 to 3; there are 3 candidates"),
        (torch.full((1, 2), float("nan")), torch.tensor([0]), (1,), "scores hold NaN"),
        (torch.zeros(1, 2), torch.tensor([0]), (0,), r"ks=\(0,\): each must be at least 1"),
    ],
)
def test_bad_scores_are_named(
    scores: torch.Tensor, truth: torch.Tensor, ks: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        recall_at(scores, truth, ks=ks)


def flooded(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """Connected parts by filling from each pixel."""
    left = set(map(tuple, np.argwhere(mask).tolist()))
    parts = []
    while left:
        part, border = set(), [min(left)]
        while border:
            y, x = border.pop()
            if (y, x) in left:
                left.remove((y, x))
                part.add((y, x))
                border += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        parts.append(part)
    return parts


@given(mask=hnp.arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 12))))
@settings(max_examples=150, deadline=None)
def test_connected_parts_are_those_of_a_flood(mask: np.ndarray) -> None:
    found = [set(map(tuple, np.argwhere(part).tolist())) for part in connected_parts(mask)]
    assert sorted(map(sorted, found)) == sorted(map(sorted, flooded(mask)))


def test_proposals_lie_around_what_is_salient() -> None:
    """Together they are all pixels above the threshold, where none is dropped."""
    model = small_dinov2()
    picture = scene(200).resize((300, 200))
    found = propose(picture, model, side=140, threshold=0.5, least_share=0.0, limit=1000)
    assert found == sorted(found, key=lambda p: -p.share)
    for proposal in found:
        left, top, right, bottom = proposal.box
        assert 0 <= left < right <= 300
        assert 0 <= top < bottom <= 200
        assert 0.5 < proposal.score <= 1
    whole = sum(proposal.share for proposal in found)
    with torch.no_grad():
        saliency = model.saliency(image_batch([picture], size=(98, 140)))
    assert whole == pytest.approx((saliency > 0.5).float().mean().item(), abs=1e-6)
    assert len(propose(picture, model, side=140, least_share=0.0, limit=1)) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.0}, "threshold=1.0 must be above 0 and below 1"),
        ({"side": 8}, "side=8 must be at least 14"),
        ({"limit": 0}, "limit=0 at least 1"),
    ],
)
def test_bad_proposal_settings_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        propose(scene(60), small_dinov2(), **arguments)
