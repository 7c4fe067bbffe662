"""The vectorised aggregation against a loop over functions."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from polyzoo.core.errors import ConfigError
from polyzoo.sea.aggregation import Aggregation, maxsim, released_kind
from polyzoo.sea.config import Aggregator, SeaConfig
from polyzoo.sea.encoding.segments import inner_products

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
        if module.kind in ("mean", "maxsim"):
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
