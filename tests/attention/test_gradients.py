"""Gradients: checked numerically, only those asked for, and through dropout."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from polyzoo.attention import CuSeqlens, DecomposedBias, attention
from polyzoo.attention.philox import keep_mask, philox
from support.attention import DEVICES, philox_words
from support.cli import run_python

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (2, 1)},
    "kv_lens": {"kv_lens": torch.tensor([0, 3])},
    "mask": {"mask": torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])},
    "dropout": {"dropout": 0.4, "generator": torch.tensor([7, 0])},
}


INTERPRETED = """
import math, torch
from polyzoo.attention import philox
from polyzoo.attention.kernels import dropout_mask
cases = ((0, 0, 0.1), (2**40 + 5, 3, 0.5), (-3, -1, 0.9), (2**63 - 1, 2**33 + 7, 1e-9))
for seed, offset, p in cases:
    rng = torch.tensor([seed, offset])
    where = {"batch": torch.tensor([2, 5]), "heads": 3, "queries": torch.arange(4, 30), "keys": 37}
    fused = dropout_mask.keep_mask(rng, **where, threshold=math.ceil(p * 2.0**32))
    assert torch.equal(fused, philox.keep_mask(rng, **where, dropout=p))
empty = dropout_mask.keep_mask(rng, **{**where, "keys": 0}, threshold=1)
assert empty.shape == (2, 3, 26, 0)
"""


def doubles(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    chance = torch.Generator().manual_seed(3)
    return [
        torch.randn(shape, generator=chance, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_gradients_are_numerically_right(name: str):
    q, k, v = doubles((2, 2, 3, 3), (2, 1, 4, 3), (2, 1, 4, 2))
    assert torch.autograd.gradcheck(
        lambda *t: attention(*t, **OPTIONS[name], backend="reference"), (q, k, v)
    )


def test_reference_bias_gradients_are_numerically_right():
    q, k, v, bias = doubles((2, 2, 3, 3), (2, 2, 4, 3), (2, 2, 4, 2), (1, 2, 1, 4))
    rows, columns = doubles((2, 2, 3, 2), (2, 2, 3, 2))
    assert torch.autograd.gradcheck(
        lambda q, k, v, bias: attention(q, k, v, bias=bias, backend="reference"), (q, k, v, bias)
    )
    assert torch.autograd.gradcheck(
        lambda q, r, c: attention(q, k, v, bias=DecomposedBias(r, c), backend="reference"),
        (q, rows, columns),
    )


def test_reference_packed_gradients_are_numerically_right():
    q, k, v = doubles((1, 2, 5, 3), (1, 1, 6, 3), (1, 1, 6, 2))
    lengths = CuSeqlens.from_lengths([2, 0, 3], [3, 2, 1])
    assert torch.autograd.gradcheck(
        lambda *t: attention(*t, cu_seqlens=lengths, causal=True, backend="reference"), (q, k, v)
    )


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("wanted", ["q", "k", "v", "bias"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_only_the_gradients_asked_for(wanted: str, backend: str, dropout: float):
    names = ("q", "k", "v", "bias")
    shapes = ((2, 2, 5, 8), (2, 2, 6, 8), (2, 2, 6, 8), (1, 2, 5, 6))
    tensors: dict[str, torch.Tensor] = dict(
        zip(names, (t.detach() for t in doubles(*shapes)), strict=True)
    )
    tensors[wanted].requires_grad_()
    q, k, v, bias = tensors.values()
    rng = torch.tensor([1, 0])
    out = attention(q, k, v, bias=bias, dropout=dropout, generator=rng, backend=backend)
    out.sum().backward()
    assert [name for name in names if tensors[name].grad is not None] == [wanted]


@pytest.mark.parametrize("options", [{}, {"kv_lens": torch.tensor([3])}])
def test_double_backward_through_torchs_kernels_is_refused(options: dict[str, Any]):
    q, k, v = doubles((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8))
    out = attention(q, k, v, **options, backend="sdpa")
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative .* is not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("options", [{}, {"mask": torch.ones(4, 4, dtype=torch.bool)}])
def test_the_lse_is_not_differentiable(backend: str, options: dict[str, Any]):
    q, k, v = doubles((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8))
    _, lse = attention(q, k, v, **options, return_lse=True, backend=backend)
    with pytest.raises(RuntimeError, match="does not require grad"):
        lse.sum().backward()


class TestDropout:
    def test_philox_gives_the_known_answer(self):
        zero = torch.zeros(1, dtype=torch.int64)
        assert philox((zero, zero), (zero, zero, zero, zero)).item() == 0x6627E8D5

    @pytest.mark.parametrize("seed", [0, 1, 2**40 + 5, -3])
    def test_kept_positions_match_an_independent_version(self, seed: int):
        rng = torch.tensor([seed, 0])
        kept = keep_mask(
            rng,
            batch=torch.tensor([2, 5]),
            heads=3,
            queries=torch.arange(4, 9),
            keys=7,
            dropout=0.37,
        )
        numbers = np.concatenate([2 * 3 + np.arange(3), 5 * 3 + np.arange(3)])
        words = philox_words(seed % 2**64, numbers, 5, 7, (np.arange(4, 9), np.arange(7))).reshape(
            2, 3, 5, 7
        )
        assert np.array_equal(kept.numpy(), words.astype(np.float64) * 2.0**-32 >= 0.37)

    @pytest.mark.skipif(find_spec("triton") is None, reason="needs triton to be installed")
    def test_the_triton_kernel_draws_the_same(self):
        """In Triton's interpreter, which has to be asked for before the import."""
        done = run_python(INTERPRETED, env={"TRITON_INTERPRET": "1"})
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("device", DEVICES)
    def test_long_calls_are_chunked_without_changing_a_number(self, device: str):
        shapes = (3, 4, 150, 16), (3, 2, 260, 16), (3, 2, 260, 16)
        results = []
        for backend in ("reference", "sdpa"):
            leaves = [t.detach().to(device).requires_grad_() for t in doubles(*shapes)]
            options = {
                "bias": doubles((1, 4, 150, 260))[0].detach().to(device),
                "kv_lens": torch.tensor([260, 7, 100], device=device),
                "generator": torch.tensor([11, 2], device=device),
            }
            out = attention(*leaves, **options, dropout=0.25, backend=backend)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)

    def test_the_share_dropped_is_right_and_the_mean_stays(self):
        q = torch.zeros(1, 2, 400, 8)
        v = torch.ones(1, 2, 300, 8)
        out = attention(q, torch.zeros_like(v), v, dropout=0.3, generator=torch.tensor([1, 0]))
        assert abs(out.mean().item() - 1.0) < 0.01
        assert 0.02 < out.std().item() < 0.06  # sqrt(0.3 / 0.7 / 300) = 0.038

    @pytest.mark.parametrize("backend", ["reference", "sdpa"])
    def test_seeds_come_from_the_generator(self, backend: str):
        q, k, v = (t.detach().float() for t in doubles(*[(1, 2, 8, 8)] * 3))

        def run(generator: torch.Generator | None) -> torch.Tensor:
            return attention(q, k, v, dropout=0.5, generator=generator, backend=backend)

        first = run(torch.Generator().manual_seed(5))
        assert torch.equal(first, run(torch.Generator().manual_seed(5)))
        assert not torch.equal(first, run(torch.Generator().manual_seed(6)))
        going_on = torch.Generator().manual_seed(5)
        assert not torch.equal(run(going_on), run(going_on))
        torch.manual_seed(5)
        default = run(None)
        torch.manual_seed(5)
        assert torch.equal(default, run(None))

    def test_activation_checkpointing_drops_the_same_again(self):
        q, k, v = doubles((2, 2, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8))

        def layer(*tensors: torch.Tensor) -> torch.Tensor:
            return attention(*tensors, dropout=0.5)

        torch.manual_seed(0)
        plain = layer(q, k, v)
        expected = torch.autograd.grad(plain.square().sum(), (q, k, v))
        torch.manual_seed(0)
        saved = checkpoint(layer, q, k, v, use_reentrant=False)
        assert torch.equal(plain, saved)
        found = torch.autograd.grad(saved.square().sum(), (q, k, v))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_autocast_casts_first(kind: str):
    dtype = getattr(torch, kind)
    q, k, v = (t.detach().float() for t in doubles(*[(1, 2, 8, 8)] * 3))
    with torch.autocast("cpu", dtype=dtype):
        out = attention(q, k.to(dtype), v)
    assert out.dtype == dtype
    assert torch.equal(out, attention(*(t.to(dtype) for t in (q, k, v))))


def test_inference_mode():
    q, k, v = (t.detach().float() for t in doubles(*[(1, 2, 8, 8)] * 3))
    expected = attention(q, k, v, causal=True)
    with torch.inference_mode():
        lengths = CuSeqlens.from_lengths([8])
        out = attention(q, k, v, cu_seqlens=lengths, causal=True)
    torch.testing.assert_close(out, expected)
