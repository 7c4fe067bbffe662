"""What torch's CPU kernels are slow at does not reach them: seen in the operators that run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from polyzoo.attention import attention
from support.operators import Recorder


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def record(*tensors: Tensor, **options: Any) -> tuple[Tensor, Recorder]:
    with Recorder() as seen:
        out = attention(*tensors, **options)
    exact = attention(*(t.detach().double() for t in tensors), **options, backend="reference")
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[out.dtype]
    assert (out.double() - exact).abs().max() < limit
    return out, seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [1, 4])
def test_grouped_heads_of_one_query_become_rows(dtype: torch.dtype, n: int):
    """torch takes eight times as long for 32 heads over 8 as for 8 heads of 4 rows."""
    q = random(1, 32, n, 64, dtype=dtype)
    k, v = (random(1, 8, 600, 64, dtype=dtype, seed=seed) for seed in (1, 2))
    _, seen = record(q, k, v)
    assert seen.kernels == [(dtype, (1, 8, 4 * n, 64), (1, 8, 600, 64))]


def test_an_fp16_cache_is_widened_piece_by_piece():
    q = random(1, 8, 1, 64, dtype=torch.float16)
    k, v = (random(1, 2, 5000, 64, dtype=torch.float16, seed=seed) for seed in (1, 2))
    with torch.no_grad():
        _, seen = record(q, k, v)
    assert {dtype for dtype, _, _ in seen.kernels} == {torch.float32}
    assert [keys[2] for _, _, keys in seen.kernels] == [1024, 1024, 1024, 1024, 904]
    assert seen.largest < k.numel(), "no fp32 copy of the whole cache"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_trains_in_fp32(dtype: torch.dtype):
    q, k, v = (random(1, 2, 40, 32, dtype=dtype, seed=seed).requires_grad_() for seed in range(3))
    with Recorder() as seen:
        attention(q, k, v).float().square().sum().backward()
    assert seen.backward == [torch.float32]
    assert q.grad is not None
    assert q.grad.dtype == dtype


def test_bf16_without_gradients_stays_bf16():
    q = random(1, 2, 40, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        _, seen = record(q, q, q)
    assert [dtype for dtype, _, _ in seen.kernels] == [torch.bfloat16]


def test_unequal_lengths_are_cut_and_not_masked():
    """A float mask makes training three quarters slower, and needs n x m numbers."""
    q = random(4, 4, 400, 64)
    k, v = random(4, 4, 900, 64, seed=1), random(4, 4, 900, 64, seed=2)
    _, seen = record(q, k, v, kv_lens=torch.tensor([900, 10, 0, 300]))
    assert seen.masks == []
    assert [keys[2] for _, _, keys in seen.kernels] == [900, 10, 300]


def test_equal_lengths_are_one_call_without_a_mask():
    q, k = random(3, 2, 50, 32), random(3, 2, 80, 32, seed=1)
    _, seen = record(q, k, k, kv_lens=torch.tensor([60, 60, 60]))
    assert seen.masks == []
    assert [keys[2] for _, _, keys in seen.kernels] == [60]


def test_a_mask_of_padding_has_no_rows():
    q, k = random(3, 2, 50, 32), random(3, 2, 80, 32, seed=1)
    _, seen = record(q, k, k, kv_lens=torch.tensor([60, 61, 62]))
    assert all(shape[2] == 1 for shape in seen.masks)


def test_a_narrow_window_reads_only_its_keys():
    q = random(1, 1, 2000, 32)
    _, seen = record(q, q, q, window=(64, 0))
    assert max(keys[2] for _, _, keys in seen.kernels) <= 200
    assert seen.largest < 2000 * 400, "no 2000 x 2000 mask"
