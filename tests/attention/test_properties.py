"""Properties of attention over random shapes, strides and mask combinations."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyzoo.attention import CuSeqlens, DecomposedBias, attention, merge_states

SMALL = settings(max_examples=60, derandomize=True, deadline=None)
LAYOUTS = ["dense", "heads inside", "sliced", "offset", "expanded"]


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def laid_out(shape: tuple[int, ...], layout: str, seed: int) -> Tensor:
    """A random tensor of a shape, stored in some other way."""
    b, h, n, d = shape
    if layout == "heads inside":
        return random((b, n, h, d), seed).transpose(1, 2)
    if layout == "sliced":
        return random((b, h, 2 * n, d + 8), seed)[:, :, ::2, 4 : 4 + d][:, :, :n]
    if layout == "offset":
        return random((b * h * n * d + 7,), seed)[7:].view(shape)
    if layout == "expanded":
        return random((1, h, n, d), seed).expand(shape)
    return random(shape, seed)


@st.composite
def calls(draw: st.DrawFn) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    b, hk, group = draw(st.integers(0, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    n, m = draw(st.integers(0, 20)), draw(st.integers(0, 24))
    d, dv = (8 * draw(st.integers(1, 9)) for _ in range(2))
    d, dv = (d, d) if draw(st.booleans()) else (d, dv)
    seed = draw(st.integers(0, 1000))
    layout = draw(st.sampled_from(LAYOUTS))
    tensors = (
        laid_out((b, hk * group, n, d), layout, seed),
        laid_out((b, hk, m, d), layout, seed + 1),
        laid_out((b, hk, m, dv), layout, seed + 2),
    )
    options: dict[str, Any] = {"scale": draw(st.sampled_from([None, 1.0, 0.25]))}
    reach = st.integers(-1, 12)
    rule = draw(st.sampled_from(["all", "causal", "window", "causal window"]))
    if "causal" in rule:
        options["causal"] = True
    if "window" in rule:
        options["window"] = (draw(reach), 0 if "causal" in rule else draw(reach))
    chance = torch.Generator().manual_seed(seed)
    if draw(st.booleans()):
        dtype = draw(st.sampled_from([torch.int32, torch.int64]))
        options["kv_lens"] = torch.randint(0, m + 1, (b,), generator=chance, dtype=dtype)
    axes = tuple(draw(st.sampled_from([1, size])) for size in (b, hk * group, n, m))
    if draw(st.booleans()):
        options["mask"] = torch.rand(axes, generator=chance) < 0.7
    if draw(st.booleans()):
        options["bias"] = random(axes, seed + 3)
    elif draw(st.booleans()) and m % 2 == 0:
        shape = tensors[0].shape[:3]
        parts = random((*shape, 2), seed + 4), random((*shape, m // 2), seed + 5)
        options["bias"] = DecomposedBias(*parts)
    if draw(st.integers(0, 3)) == 0:
        options["dropout"] = draw(st.sampled_from([0.1, 0.5]))
        options["generator"] = torch.tensor([seed, 3])
    return tensors, options


def results(
    tensors: tuple[Tensor, Tensor, Tensor], options: dict[str, Any], backend: str
) -> list[Tensor]:
    """Output, lse and every gradient."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    bias = options.get("bias")
    parts = [bias] if isinstance(bias, Tensor) else []
    if isinstance(bias, DecomposedBias):
        parts = [bias.rel_h, bias.rel_w]
    extra = [part.clone().requires_grad_() for part in parts]
    if extra:
        rebuilt = DecomposedBias(*extra) if len(extra) == 2 else extra[0]
        options = {**options, "bias": rebuilt}
    out, lse = attention(*leaves, **options, return_lse=True, backend=backend)
    weights = random(tuple(out.shape), 99)
    grads = torch.autograd.grad((out * weights).sum(), [*leaves, *extra])
    return [out, lse, *grads]


@given(calls())
@SMALL
def test_sdpa_equals_reference(call: tuple[Any, Any]):
    tensors, options = call
    expected = results(tensors, options, "reference")
    found = results(tensors, options, "sdpa")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@given(calls())
@SMALL
def test_results_are_the_same_without_gradients(call: tuple[Any, Any]):
    tensors, options = call
    with torch.no_grad():
        out = attention(*tensors, **options)
    torch.testing.assert_close(out, results(tensors, options, "sdpa")[0], rtol=1e-9, atol=1e-9)


@st.composite
def packed_calls(draw: st.DrawFn) -> tuple[list[tuple[int, int]], dict[str, Any], int]:
    lengths = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6))
    options = draw(st.sampled_from([{}, {"causal": True}, {"window": (2, 1)}, {"window": (3, -1)}]))
    dropout = draw(st.sampled_from([{}, {"dropout": 0.3, "generator": torch.tensor([5, 0])}]))
    return lengths, {**options, **dropout}, draw(st.integers(1, 2))


@given(packed_calls())
@SMALL
def test_packed_equals_separate_sequences(case: tuple[Any, Any, int]):
    lengths, options, group = case
    total_q, total_k = (sum(pair[side] for pair in lengths) for side in (0, 1))
    tensors = (
        random((1, 2 * group, total_q, 16), 0),
        random((1, 2, total_k, 16), 1),
        random((1, 2, total_k, 16), 2),
    )
    cu_seqlens = CuSeqlens.from_lengths([q for q, _ in lengths], [k for _, k in lengths])
    packed = {**options, "cu_seqlens": cu_seqlens}
    expected = results(tensors, packed, "reference")
    for one, other in zip(results(tensors, packed, "sdpa"), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    if "dropout" in options:
        return
    q0 = k0 = 0
    for q_length, k_length in lengths:
        q1, k1 = q0 + q_length, k0 + k_length
        alone = attention(
            tensors[0][:, :, q0:q1], *(t[:, :, k0:k1] for t in tensors[1:]), **options
        )
        torch.testing.assert_close(expected[0][:, :, q0:q1], alone, rtol=1e-9, atol=1e-9)
        q0, k0 = q1, k1


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return random((2, 4, 30, 24), 1), random((2, 4, 40, 24), 2), random((2, 4, 40, 24), 3)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
class TestIdentities:
    def test_uniform_scores_give_the_mean(self, qkv, backend):
        q, k, v = qkv
        out, lse = attention(torch.zeros_like(q), k, v, return_lse=True, backend=backend)
        mean = v.mean(dim=2, keepdim=True).expand_as(out)
        torch.testing.assert_close(out, mean, rtol=1e-12, atol=1e-12)
        assert torch.allclose(lse, torch.tensor(40.0, dtype=lse.dtype).log())

    def test_one_key_gives_its_value(self, qkv, backend):
        q, k, v = qkv
        out = attention(q, k[:, :, :1], v[:, :, :1], backend=backend)
        torch.testing.assert_close(out, v[:, :, :1].expand_as(out))

    def test_huge_diagonal_selects_rows(self, qkv, backend):
        _, k, v = qkv
        k = torch.nn.functional.normalize(k, dim=-1)
        out = attention(k, k, v, scale=1e5, backend=backend)
        torch.testing.assert_close(out, v)

    def test_keys_can_be_permuted_with_their_mask(self, qkv, backend):
        q, k, v = qkv
        order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
        mask = torch.rand(2, 1, 30, 40, generator=torch.Generator().manual_seed(1)) < 0.6
        out = attention(q, k, v, mask=mask, backend=backend)
        moved = attention(q, k[:, :, order], v[:, :, order], mask=mask[..., order], backend=backend)
        torch.testing.assert_close(out, moved, rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize("cuts", [[13], [0, 40], [5, 6, 30]])
    def test_split_keys_merge_to_the_whole(self, qkv, backend, cuts):
        q, k, v = qkv
        mask = torch.rand(2, 1, 30, 40, generator=torch.Generator().manual_seed(2)) < 0.3
        mask[0, 0, 3] = False  # dead everywhere
        whole = attention(q, k, v, mask=mask, return_lse=True, backend=backend)
        bounds = [0, *cuts, 40]
        parts = [
            attention(
                q, k[:, :, a:b], v[:, :, a:b], mask=mask[..., a:b], return_lse=True, backend=backend
            )
            for a, b in pairwise(bounds)
        ]
        merged = merge_states([out for out, _ in parts], [lse for _, lse in parts])
        torch.testing.assert_close(merged[0], whole[0], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(merged[1], whole[1], rtol=1e-11, atol=1e-11)

    def test_a_constant_added_to_a_bias_row_changes_nothing(self, qkv, backend):
        q, k, v = qkv
        bias = random((2, 4, 30, 40), 5)
        shifted = bias + random((2, 4, 30, 1), 6)
        out = attention(q, k, v, bias=bias, backend=backend)
        torch.testing.assert_close(
            out, attention(q, k, v, bias=shifted, backend=backend), rtol=1e-11, atol=1e-11
        )

    def test_output_is_linear_in_the_values(self, qkv, backend):
        q, k, v = qkv
        out = attention(q, k, v, causal=True, backend=backend)
        torch.testing.assert_close(
            attention(q, k, 3 * v, causal=True, backend=backend), 3 * out, rtol=1e-11, atol=1e-11
        )

    @pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (4, 4)}])
    def test_batch_items_do_not_touch_each_other(self, qkv, backend, options):
        q, k, v = (tensor.float() for tensor in qkv)
        out = attention(q, k, v, **options, backend=backend)
        alone = attention(q[1:], k[1:], v[1:], **options, backend=backend)
        assert torch.equal(out[1:], alone)

    def test_later_keys_leave_earlier_causal_rows_alone(self, qkv, backend):
        _, k, v = (tensor.float() for tensor in qkv)
        out = attention(k, k, v, causal=True, backend=backend)
        k2, v2 = k.clone(), v.clone()
        k2[:, :, 25:] = 7.0
        v2[:, :, 25:] = -7.0
        changed = attention(k, k2, v2, causal=True, backend=backend)
        assert torch.equal(out[:, :, :25], changed[:, :, :25])
        assert not torch.equal(out, changed)

    @pytest.mark.parametrize("options", [{}, {"causal": True}, {"kv_lens": torch.tensor([9, 40])}])
    @pytest.mark.parametrize("n", [1, 5, 30])
    def test_grouped_heads_equal_repeated_heads(self, qkv, backend, options, n):
        q, k, v = qkv
        q, k, v = q[:, :, :n], k[:, :2], v[:, :2]
        out, lse = attention(q, k, v, **options, return_lse=True, backend=backend)
        repeated = (tensor.repeat_interleave(2, dim=1) for tensor in (k, v))
        expected = attention(q, *repeated, **options, return_lse=True, backend=backend)
        torch.testing.assert_close(out, expected[0], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(lse, expected[1], rtol=1e-11, atol=1e-11)

    def test_a_window_wider_than_the_keys_is_no_window(self, qkv, backend):
        q, k, v = qkv
        out = attention(q, k, v, window=(40, 40), backend=backend)
        assert torch.equal(out, attention(q, k, v, backend=backend))

    def test_three_runs_are_bit_equal(self, qkv, backend):
        tensors = tuple(tensor.float() for tensor in qkv)
        options = {"kv_lens": torch.tensor([17, 40]), "causal": True}
        runs = []
        for _ in range(3):
            leaves = [tensor.clone().requires_grad_() for tensor in tensors]
            out = attention(*leaves, **options, backend=backend)
            runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("window", [(40, 40), (3, 0), (0, 0), (200, 5), (-1, 3)])
def test_long_windows_are_served_in_blocks(window: tuple[int, int]):
    """More rows than a block holds, so that blocks of keys are cut out and joined."""
    q, k = random((1, 2, 700, 16), 1), random((1, 2, 900, 16), 2)
    expected = attention(q, k, k, window=window, return_lse=True, backend="reference")
    found = attention(q, k, k, window=window, return_lse=True, backend="sdpa")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_long_causal_prefill_is_served_in_blocks():
    q, k = random((1, 1, 1500, 8), 1), random((1, 1, 3000, 8), 2)
    expected = attention(q, k, k, causal=True, backend="reference")
    torch.testing.assert_close(
        attention(q, k, k, causal=True, backend="sdpa"), expected, rtol=1e-11, atol=1e-11
    )


def test_fp16_decoding_over_a_long_cache_widens_piece_by_piece():
    q = random((2, 8, 1, 64), 1).half()
    k, v = (random((2, 2, 3000, 64), seed).half() for seed in (2, 3))
    out, lse = attention(q, k, v, causal=True, return_lse=True, backend="sdpa")
    exact = attention(
        q.double(), k.double(), v.double(), causal=True, return_lse=True, backend="reference"
    )
    torch.testing.assert_close(out.double(), exact[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-6, atol=1e-6)


def test_unequal_lengths_are_cut_item_by_item():
    """Enough waste that padding is cut off rather than masked."""
    q = random((4, 2, 300, 32), 1)
    k, v = random((4, 2, 900, 32), 2), random((4, 2, 900, 32), 3)
    options = {"kv_lens": torch.tensor([900, 1, 0, 450]), "causal": True}
    expected = results((q, k, v), options, "reference")
    for one, other in zip(results((q, k, v), options, "sdpa"), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
