"""Identities of attention, each over random shapes, head sizes and rules, on every CPU backend."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyzoo.attention import CuSeqlens, attention, merge_states

SOME = settings(max_examples=25, derandomize=True, deadline=None)
BACKENDS = pytest.mark.parametrize("backend", ["reference", "sdpa"])
Drawn = tuple[list[Tensor], dict[str, Any], torch.Generator]


@st.composite
def calls(
    draw: st.DrawFn,
    *,
    rules: tuple[str, ...] = ("all", "causal", "window"),
    dtype: torch.dtype = torch.float64,
    square: bool = False,
    least: int = 0,
) -> Drawn:
    """Queries, keys and values of random sizes, and who sees whom."""
    b, hk, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    n, m = draw(st.integers(least, 80)), draw(st.integers(least, 80))
    m = n if square else m
    d = 8 * draw(st.integers(1, 17))
    dv = draw(st.sampled_from([d, 8, 40]))
    chance = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def make(heads: int, length: int, channels: int) -> Tensor:
        return torch.randn(b, heads, length, channels, generator=chance, dtype=dtype)

    options: dict[str, Any] = {"scale": draw(st.sampled_from([None, 1.0]))}
    rule = draw(st.sampled_from(rules))
    if rule == "causal":
        options["causal"] = True
    if rule == "window":
        options["window"] = (draw(st.integers(-1, 30)), draw(st.integers(-1, 30)))
    return [make(hk * group, n, d), make(hk, m, d), make(hk, m, dv)], options, chance


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@BACKENDS
@given(drawn=calls(rules=("all",)))
@SOME
def test_keys_can_be_permuted_with_their_mask(drawn: Drawn, backend: str):
    (q, k, v), options, chance = drawn
    n, m = q.shape[2], k.shape[2]
    order = torch.randperm(m, generator=chance)
    mask = torch.rand(q.shape[0], 1, n, m, generator=chance) < 0.6
    out = attention(q, k, v, mask=mask, **options, backend=backend)
    moved = (k[:, :, order], v[:, :, order])
    close(attention(q, *moved, mask=mask[..., order], **options, backend=backend), out)


@BACKENDS
@given(drawn=calls(rules=("all",)), cuts=st.lists(st.floats(0, 1), max_size=4))
@SOME
def test_split_keys_merge_to_the_whole(drawn: Drawn, cuts: list[float], backend: str):
    (q, k, v), options, chance = drawn
    n, m = q.shape[2], k.shape[2]
    mask = torch.rand(q.shape[0], 1, n, m, generator=chance) < 0.4
    whole = attention(q, k, v, mask=mask, **options, return_lse=True, backend=backend)
    bounds = sorted([0, *(round(cut * m) for cut in cuts), m])
    parts = [
        attention(
            q, k[:, :, a:b], v[:, :, a:b], mask=mask[..., a:b], **options, return_lse=True,
            backend=backend,
        )
        for a, b in pairwise(bounds)
    ]  # fmt: skip
    merged = merge_states([out for out, _ in parts], [lse for _, lse in parts])
    for found, expected in zip(merged, whole, strict=True):
        close(found, expected)


@BACKENDS
@given(drawn=calls())
@SOME
def test_a_constant_added_to_a_bias_row_changes_nothing(drawn: Drawn, backend: str):
    (q, k, v), options, chance = drawn
    shape = (q.shape[1], q.shape[2], k.shape[2])
    bias = torch.randn(shape, generator=chance, dtype=q.dtype)
    row = torch.randn(*shape[:2], 1, generator=chance, dtype=q.dtype)
    out = attention(q, k, v, bias=bias, **options, backend=backend)
    close(attention(q, k, v, bias=bias + row, **options, backend=backend), out)


@BACKENDS
@given(drawn=calls(), factor=st.floats(-8, 8))
@SOME
def test_output_is_linear_in_the_values(drawn: Drawn, factor: float, backend: str):
    (q, k, v), options, _ = drawn
    out = attention(q, k, v, **options, backend=backend)
    close(attention(q, k, factor * v, **options, backend=backend), factor * out)


@BACKENDS
@given(drawn=calls(dtype=torch.float32))
@SOME
def test_batch_items_are_independent_to_the_bit(drawn: Drawn, backend: str):
    tensors, options, _ = drawn
    out = attention(*tensors, **options, backend=backend)
    last = attention(*(tensor[-1:] for tensor in tensors), **options, backend=backend)
    assert torch.equal(out[-1:], last)


@BACKENDS
@given(
    drawn=calls(rules=("causal",), dtype=torch.float32, square=True, least=1), at=st.floats(0, 1)
)
@SOME
def test_later_keys_leave_causal_rows_alone_to_the_bit(drawn: Drawn, at: float, backend: str):
    (q, k, v), options, _ = drawn
    cut = round(at * q.shape[2])
    out = attention(q, k, v, **options, backend=backend)
    k, v = k.clone(), v.clone()
    k[:, :, cut:], v[:, :, cut:] = 3.0, -5.0
    changed = attention(q, k, v, **options, backend=backend)
    assert torch.equal(out[:, :, :cut], changed[:, :, :cut])


@BACKENDS
@given(drawn=calls(), lengths=st.booleans())
@SOME
def test_grouped_heads_equal_repeated_heads(drawn: Drawn, lengths: bool, backend: str):
    (q, k, v), options, chance = drawn
    if lengths:
        top = k.shape[2] + 1
        options["kv_lens"] = torch.randint(0, top, (q.shape[0],), generator=chance)
    group = q.shape[1] // k.shape[1]
    out = attention(q, k, v, **options, backend=backend)
    repeated = (tensor.repeat_interleave(group, dim=1) for tensor in (k, v))
    close(attention(q, *repeated, **options, backend=backend), out)


@BACKENDS
@given(drawn=calls(rules=("all",)), extra=st.integers(0, 5))
@SOME
def test_a_window_of_every_key_is_no_window(drawn: Drawn, extra: int, backend: str):
    (q, k, v), options, _ = drawn
    size = max(q.shape[2], k.shape[2]) + extra
    out = attention(q, k, v, **options, backend=backend)
    close(attention(q, k, v, window=(size, size), **options, backend=backend), out)
    causal = attention(q, k, v, causal=True, **options, backend=backend)
    close(attention(q, k, v, window=(size, 0), **options, backend=backend), causal)


@BACKENDS
@given(drawn=calls(), lengths=st.lists(st.floats(0, 1), min_size=3, max_size=3))
@SOME
def test_lengths_equal_cutting_the_keys(drawn: Drawn, lengths: list[float], backend: str):
    (q, k, v), options, _ = drawn
    counts = [round(share * k.shape[2]) for share in lengths[: q.shape[0]]]
    out = attention(q, k, v, kv_lens=torch.tensor(counts), **options, backend=backend)
    for item, count in enumerate(counts):
        one = slice(item, item + 1)
        alone = (q[one], k[one, :, :count], v[one, :, :count])
        close(out[one], attention(*alone, **options, backend=backend))


@BACKENDS
@given(drawn=calls())
@SOME
def test_a_batch_packed_equals_the_batch(drawn: Drawn, backend: str):
    tensors, options, _ = drawn
    b, n, m = tensors[0].shape[0], tensors[0].shape[2], tensors[1].shape[2]
    out = attention(*tensors, **options, backend=backend)
    packed = [tensor.transpose(0, 1).flatten(1, 2).unsqueeze(0) for tensor in tensors]
    lengths = CuSeqlens.from_lengths([n] * b, [m] * b)
    found = attention(*packed, cu_seqlens=lengths, **options, backend=backend)
    close(found[0].unflatten(1, (b, n)).transpose(0, 1), out)


@BACKENDS
@given(drawn=calls(dtype=torch.float32, least=1))
@SOME
def test_runs_are_equal_to_the_bit(drawn: Drawn, backend: str):
    tensors, options, _ = drawn
    runs: list[list[Tensor]] = []
    for _ in range(3):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        out = attention(*leaves, **options, backend=backend)
        runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
