"""Edges: nothing to see, nothing to do, numbers that overflow, garbage in padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from polyzoo.attention import CuSeqlens, attention
from support.attention import DEVICES

BACKENDS = pytest.mark.parametrize("backend", ["reference", "sdpa"])
ON = pytest.mark.parametrize("device", DEVICES)


def leaves(
    device: str, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    chance = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=chance).to(device, dtype).requires_grad_() for shape in shapes
    ]


@BACKENDS
@ON
@pytest.mark.parametrize(
    "dead",
    [
        {"mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool)},
        {"mask": torch.zeros(2, 1, 6, 5, dtype=torch.bool)},
        {"kv_lens": torch.tensor([0, 0])},
        {"bias": torch.full((6, 5), -torch.inf)},
        {"kv_lens": torch.tensor([0, 0]), "causal": True},
    ],
    ids=["mask", "full mask", "kv_lens", "bias", "causal kv_lens"],
)
def test_rows_that_see_nothing(dead: dict[str, Any], backend: str, device: str):
    q, k, v = leaves(device, (2, 2, 6, 8), (2, 2, 5, 8), (2, 2, 5, 8))
    rule: dict[str, Any] = {
        n: a.to(device) if isinstance(a, Tensor) else a for n, a in dead.items()
    }
    out, lse = attention(q, k, v, **rule, return_lse=True, backend=backend)
    out.backward(torch.ones_like(out))
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.isneginf(lse).all()
    for leaf in (q, k, v):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@BACKENDS
@ON
@pytest.mark.parametrize(("b", "n", "m"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)], ids=str)
def test_empty_axes(b: int, n: int, m: int, backend: str, device: str):
    q, k, v = leaves(device, (b, 4, n, 8), (b, 2, m, 8), (b, 2, m, 16))
    out, lse = attention(q, k, v, return_lse=True, backend=backend)
    out.sum().backward()
    assert out.shape == (b, 4, n, 16)
    assert lse.shape == (b, 4, n)
    assert not out.any()
    assert torch.isneginf(lse).all()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in (q, k, v))


@BACKENDS
@ON
def test_more_queries_than_keys_under_causal(backend: str, device: str):
    q, k, v = leaves(device, (1, 1, 6, 8), (1, 1, 4, 8), (1, 1, 4, 8))
    out, lse = attention(q, k, v, causal=True, return_lse=True, backend=backend)
    out.sum().backward()
    assert torch.isneginf(lse[0, 0, :2]).all()
    assert not out[0, 0, :2].any()
    assert q.grad is not None
    assert not q.grad[0, 0, :2].any()
    torch.testing.assert_close(out[0, 0, 2], v[0, 0, 0])  # the first living row sees one key


@BACKENDS
@ON
@pytest.mark.parametrize("d", [1, 3, 8, 72, 130, 264])
def test_any_head_size(d: int, backend: str, device: str):
    q, k, v = leaves(device, (1, 2, 5, d), (1, 2, 7, d), (1, 2, 7, d))
    scores = (q @ k.transpose(-1, -2)) * d**-0.5
    torch.testing.assert_close(
        attention(q, k, v, backend=backend), scores.softmax(-1) @ v, rtol=1e-5, atol=1e-5
    )


@BACKENDS
@ON
@pytest.mark.parametrize("rows", ["mask", "kv_lens"])
def test_large_logits_in_fp16(rows: str, backend: str, device: str):
    q, k, v = leaves(device, (1, 2, 6, 64), (1, 2, 9, 64), (1, 2, 9, 64), dtype=torch.float16)
    options: dict[str, Any] = {
        "mask": {"mask": torch.ones(6, 9, dtype=torch.bool, device=device)},
        "kv_lens": {"kv_lens": torch.tensor([8], device=device)},
    }[rows]
    out = attention(q * 100, k * 100, v, scale=1.0, **options, backend=backend)
    out.sum().backward()
    for tensor in (out, q.grad, k.grad, v.grad):
        assert tensor is not None
        assert torch.isfinite(tensor).all()


@BACKENDS
@ON
@pytest.mark.parametrize("garbage", [float("inf"), float("nan")])
@pytest.mark.parametrize("lengths", [[3, 5], [3, 3], [0, 6]])
def test_garbage_in_padding_stays_there(
    lengths: list[int], garbage: float, backend: str, device: str
):
    q, k, v = leaves(device, (2, 2, 4, 8), (2, 2, 6, 8), (2, 2, 6, 8))
    kv_lens = torch.tensor(lengths, device=device)
    clean = attention(q, k, v, kv_lens=kv_lens, backend=backend)
    valid = (torch.arange(6, device=device) < kv_lens[:, None])[:, None, :, None]
    dirty = [torch.where(valid, t.detach(), garbage).requires_grad_() for t in (k, v)]
    out = attention(q, *dirty, kv_lens=kv_lens, backend=backend)
    torch.testing.assert_close(out, clean)
    out.sum().backward()
    for leaf in (q, *dirty):
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()


@BACKENDS
@ON
def test_garbage_in_a_neighbouring_sequence_stays_there(backend: str, device: str):
    (tokens,) = leaves(device, (1, 2, 9, 8))
    lengths = CuSeqlens.from_lengths([4, 0, 5], device=device)
    clean = attention(tokens, tokens, tokens, cu_seqlens=lengths, backend=backend)
    dirty = tokens.detach().clone()
    dirty[:, :, 4:] = float("nan")
    out = attention(dirty, dirty, dirty, cu_seqlens=lengths, backend=backend)
    torch.testing.assert_close(out[:, :, :4], clean[:, :, :4])
    assert torch.isnan(out[:, :, 4:]).all()


@BACKENDS
@ON
def test_nan_in_a_query_reaches_its_row_only(backend: str, device: str):
    q, k, v = (t.detach() for t in leaves(device, (1, 2, 5, 8), (1, 2, 6, 8), (1, 2, 6, 8)))
    clean = attention(q, k, v, backend=backend)
    q[0, 0, 2] = float("nan")
    out = attention(q, k, v, backend=backend)
    if backend == "reference":
        assert torch.isnan(out[0, 0, 2]).all()  # torch's CPU kernel gives zeros for such a row
    out[0, 0, 2] = clean[0, 0, 2]
    torch.testing.assert_close(out, clean)


@BACKENDS
@ON
def test_one_query_over_grouped_heads(backend: str, device: str):
    q, k, v = leaves(device, (2, 8, 1, 16), (2, 2, 33, 16), (2, 2, 33, 16))
    options = {"kv_lens": torch.tensor([33, 20], device=device), "causal": True}
    out = attention(q, k, v, **options, backend=backend)
    wide = [t.repeat_interleave(4, dim=1) for t in (k, v)]
    torch.testing.assert_close(out, attention(q, *wide, **options, backend=backend))


@BACKENDS
@ON
def test_packed_with_nothing_to_see(backend: str, device: str):
    q, k, v = leaves(device, (1, 2, 7, 8), (1, 2, 5, 8), (1, 2, 5, 8))
    lengths = CuSeqlens.from_lengths([3, 0, 4], [0, 5, 0], device=device)
    out, lse = attention(q, k, v, cu_seqlens=lengths, return_lse=True, backend=backend)
    out.sum().backward()
    assert not out.any()
    assert torch.isneginf(lse).all()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in (q, k, v))


def test_small_tensors_with_strided_channels_are_copied():
    q, k, v = leaves("cpu", (1, 2, 8, 5), (1, 2, 8, 5), (1, 2, 8, 5))
    turned = [t.transpose(2, 3) for t in (q, k, v)]
    torch.testing.assert_close(
        attention(*turned), attention(*(t.contiguous() for t in turned)), rtol=0, atol=0
    )


def test_lengths_know_their_runs():
    lengths = CuSeqlens.from_lengths(torch.tensor([3, 3, 0, 2]), [1, 1, 4, 4])
    assert lengths.q.tolist() == [0, 3, 6, 6, 8]
    assert lengths.k.tolist() == [0, 1, 2, 6, 10]
    assert (lengths.max_q, lengths.max_k, lengths.sequences) == (3, 4, 4)
    runs = [tuple(run) for run in lengths.runs()]
    assert runs == [(0, 2, 3, 1), (2, 1, 0, 4), (3, 1, 2, 4)]
    assert lengths.runs() is lengths.runs(), "worked out once for all layers"
