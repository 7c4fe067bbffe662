"""The vectorised aggregation against a loop over functions."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyzoo.core.errors import ConfigError
from polyzoo.sea.aggregation import Aggregation, maxsim, released_kind, soft_maxsim
from polyzoo.sea.config import Aggregator, SeaConfig, SplitConfig
from polyzoo.sea.encoding.segments import inner_products
from polyzoo.sea.entries import entry_score

COUNTS = (1, 4, 2, 7, 1)


def entries() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(COUNTS), 12, generator=generator, requires_grad=True)
    return x, torch.tensor([0, *COUNTS]).cumsum(0)


def by_loop(module: Aggregation, x: torch.Tensor) -> torch.Tensor:
    """Each function on its own, straight from the definitions."""
    rows, first = [], 0
    for count in COUNTS:
        part = x[first : first + count]
        first += count
        raw = {"mean": part.mean(0), "max": part.amax(0), "whole": part[0]}[module.raw]
        if module.kind in ("mean", "maxsim", "soft_maxsim"):
            rows.append(part.mean(0))
        elif module.kind == "max":
            rows.append(part.amax(0))
        elif module.kind == "first":
            rows.append(part[0])
        else:
            assert module.score is not None
            share = module.score(part)[:, 0].softmax(0)
            att = (share[:, None] * part).sum(0)
            if module.kind.endswith("_mean"):
                att = (att + raw) / 2
            elif module.kind.endswith("_sum"):
                att = att / 2 + count * raw / 2
            rows.append(att)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", get_args(Aggregator))
@pytest.mark.parametrize("raw", ["mean", "max", "whole"])
def test_equals_loop_in_values_and_gradients(kind: Aggregator, raw):
    torch.manual_seed(1)
    module = Aggregation(12, kind=kind, raw=raw)
    x, starts = entries()
    found = module(x, starts).vectors
    wanted = by_loop(module, x)
    assert torch.allclose(found, wanted, atol=1e-5)
    parameters = [x, *module.parameters()]
    one = torch.autograd.grad(found.square().sum(), parameters, retain_graph=True)
    two = torch.autograd.grad(wanted.square().sum(), parameters)
    for a, b in zip(one, two, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("kind", get_args(Aggregator))
def test_weights_sum_to_one_per_function(kind: Aggregator):
    module = Aggregation(12, kind=kind)
    x, starts = entries()
    weights = module(x, starts).weights.detach()
    total = 2.0 if kind.endswith("_sum") else 1.0
    sums = [float(part.sum()) for part in weights.split(COUNTS)]
    assert sums == pytest.approx([total] * len(COUNTS), abs=1e-5)


def test_untrained_attention_is_the_mean():
    module = Aggregation(12, kind="attn2_mean")
    module.reset()
    x, starts = entries()
    mean = Aggregation(12, kind="mean")(x, starts).vectors
    assert torch.allclose(module(x, starts).vectors, mean, atol=1e-6)


def test_order_of_functions_does_not_matter():
    module = Aggregation(12, kind="attn1_mean", raw="whole")
    x, starts = entries()
    found = module(x, starts).vectors
    parts = list(x.split(COUNTS))[::-1]
    turned = module(torch.cat(parts), torch.tensor([0, *COUNTS[::-1]]).cumsum(0)).vectors
    assert torch.allclose(turned.flip(0), found, atol=1e-6)


def test_extreme_scores_stay_finite():
    module = Aggregation(12, kind="attn1")
    x, starts = entries()
    assert torch.isfinite(module(x * 1e4, starts).vectors).all()


def test_maxsim_takes_the_best_block():
    x, starts = entries()
    queries = torch.randn(3, 12)
    wanted = torch.stack([(queries @ part.T).amax(1) for part in x.split(COUNTS)], dim=1)
    assert torch.allclose(maxsim(queries, x, starts), wanted, atol=1e-6)


def test_names_of_the_published_variants():
    assert released_kind("one_layer+maxpooling", with_ave=True) == ("attn1_sum", "max")
    with pytest.raises(ConfigError, match="common_type='three_layer'"):
        released_kind("three_layer", with_ave=True)


def test_configuration_without_the_whole_cannot_use_it():
    with pytest.raises(ConfigError, match="raw='whole' needs include_whole"):
        SeaConfig(raw="whole", include_whole=False)
    with pytest.raises(ConfigError, match="aggregator='first'"):
        SeaConfig(aggregator="first", include_whole=False)


def test_scores_keep_float32_inside_autocast():
    torch.manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(40, 64), dim=1) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ b.T).dtype == torch.bfloat16  # what would happen by itself
        found = inner_products(a, b)
        best = maxsim(a, b, torch.arange(41))
    assert torch.equal(found, a @ b.T)
    assert torch.allclose(best, a @ b.T, atol=1e-6)


class TestSoftMaxsim:
    """The smooth maximum over entries, against a loop and in its limits."""

    @given(
        st.lists(st.integers(1, 6), min_size=1, max_size=5),
        st.floats(0.005, 2.0),
        st.floats(0.0, 2.0),
        st.integers(0, 1000),
    )
    @settings(deadline=None, max_examples=60)
    def test_equals_a_loop(self, counts: list[int], t: float, discount: float, seed: int):
        generator = torch.Generator().manual_seed(seed)
        x = torch.nn.functional.normalize(torch.randn(sum(counts), 8, generator=generator), dim=1)
        queries = torch.nn.functional.normalize(torch.randn(3, 8, generator=generator), dim=1)
        starts = torch.tensor([0, *itertools.accumulate(counts)])
        found = soft_maxsim(queries, x, starts, temperature=t, discount=discount)
        for column, rows in enumerate(x.split(counts)):
            s = (queries @ rows.T).double()
            wanted = t * (torch.logsumexp(s / t, 1) - discount * math.log(len(rows)))
            assert torch.allclose(found[:, column].double(), wanted, atol=1e-5)
            shape = SeaConfig(aggregator="soft_maxsim", soft_temperature=t, count_discount=discount)
            again = entry_score((queries @ rows.T).T.numpy(), shape)
            np.testing.assert_allclose(again, wanted.numpy(), atol=1e-5)

    def test_equal_entries_are_no_advantage(self):
        x = torch.nn.functional.normalize(torch.randn(1, 8), dim=1)
        starts = torch.tensor([0, 1, 6])
        scores = soft_maxsim(torch.eye(8), x.expand(6, 8), starts, temperature=0.05)
        assert torch.allclose(scores[:, 0], scores[:, 1], atol=1e-6)
        more = soft_maxsim(torch.eye(8), x.expand(6, 8), starts, temperature=0.05, discount=0.5)
        assert (more[:, 1] > more[:, 0]).all()

    def test_between_mean_and_maximum(self):
        x, starts = entries()
        x, queries = x / 10, torch.randn(4, x.shape[1]) / 10
        mean = Aggregation(x.shape[1], kind="mean")(x, starts).vectors
        best = maxsim(queries, x, starts)
        soft = soft_maxsim(queries, x, starts, temperature=0.1)
        assert (soft <= best + 1e-6).all()
        assert (soft >= queries @ mean.T - 1e-6).all()
        sharp = soft_maxsim(queries, x, starts, temperature=1e-4)
        assert torch.allclose(sharp, best, atol=1e-3)
        flat = soft_maxsim(queries, x, starts, temperature=1e4)
        assert torch.allclose(flat, queries @ mean.T, atol=5e-3)

    def test_gradients_do_not_depend_on_the_scale(self):
        x, starts = entries()
        x = (x.detach() * 100).requires_grad_()  # exp of it alone would overflow
        soft_maxsim(torch.randn(2, x.shape[1]), x, starts, temperature=0.01).sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()

    def test_settings_are_checked(self):
        with pytest.raises(ConfigError, match=r"soft_temperature=0\.0 must be above 0"):
            SeaConfig(soft_temperature=0.0)
        with pytest.raises(ConfigError, match="count_discount=3 must be from 0 to 2"):
            SeaConfig(count_discount=3)
        with pytest.raises(ConfigError, match="head_pieces=-1 is too small"):
            SeaConfig(head_pieces=-1)
        with pytest.raises(ConfigError, match="whole_budget=0 is too small"):
            SplitConfig(whole_budget=0)
