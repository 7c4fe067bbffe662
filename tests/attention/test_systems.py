"""Autocast, activation checkpointing, CUDA graphs and streams around a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from polyzoo.attention import attention
from support.attention import DEVICES

ON = pytest.mark.parametrize("device", DEVICES)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Block(nn.Module):
    """A layer as models write it: projections around attention."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(32, 96), nn.Linear(32, 32)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        heads = self.inner(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        out = attention(*heads.unbind(0), **self.options)
        return x + self.outer(out.transpose(1, 2).flatten(2))


def block(device: str, **options: Any) -> tuple[Block, Tensor]:
    torch.manual_seed(0)
    layer = Block(**options).to(device)
    return layer, torch.randn(2, 12, 32, device=device, requires_grad=True)


def gradients(out: Tensor, layer: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]))


@ON
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"dropout": 0.3}])
def test_activation_checkpointing(options: dict[str, Any], reentrant: bool, device: str):
    """The recomputation sees the same numbers, dropped probabilities included."""
    layer, x = block(device, **options)
    torch.manual_seed(7)
    out = layer(x)
    expected = gradients(out, layer, x)
    torch.manual_seed(7)
    again: Tensor = checkpoint(layer, x, use_reentrant=reentrant)  # pyright: ignore
    assert torch.equal(again, out)
    if reentrant:  # this kind works with backward() alone
        again.square().sum().backward()
        found = [x.grad, *(p.grad for p in layer.parameters())]
    else:
        found = gradients(again, layer, x)
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@ON
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains(dtype: torch.dtype, device: str):
    layer, x = block(device, causal=True)
    exact = gradients(layer(x), layer, x)
    with torch.autocast(device, dtype=dtype):
        out = layer(x)
    found = gradients(out, layer, x)
    limit = 0.05 if dtype == torch.bfloat16 else 0.01
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= limit * other.norm() + 1e-4


@ON
def test_autocast_inside_checkpointing(device: str):
    layer, x = block(device, dropout=0.2)
    with torch.autocast(device, dtype=torch.bfloat16):
        torch.manual_seed(1)
        out = layer(x)
        torch.manual_seed(1)
        again: Tensor = checkpoint(layer, x, use_reentrant=False)  # pyright: ignore
    for one, other in zip(gradients(again, layer, x), gradients(out, layer, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@needs_cuda
class TestGraphs:
    @pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (3, 3)}])
    def test_a_training_step_is_captured_and_replayed(self, options: dict[str, Any]):
        layer, _ = block("cuda", **options)
        x = torch.randn(2, 12, 32, device="cuda")

        def train() -> Tensor:
            out = layer(x)
            out.square().sum().backward()
            return out

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                layer.zero_grad(set_to_none=True)
                train()
        torch.cuda.current_stream().wait_stream(side)
        layer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = train()
        captured = [parameter.grad for parameter in layer.parameters()]
        x.copy_(torch.randn(2, 12, 32, device="cuda"))
        graph.replay()
        torch.cuda.synchronize()
        wanted = layer(x)
        torch.testing.assert_close(out, wanted)
        grads = torch.autograd.grad(wanted.square().sum(), list(layer.parameters()))
        for one, other in zip(captured, grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    def test_decoding_replays_with_new_lengths(self):
        q = torch.randn(2, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
        k, v = torch.randn(2, 2, 2, 300, 64, device="cuda", dtype=torch.bfloat16).unbind(0)
        lengths = torch.tensor([300, 300], device="cuda", dtype=torch.int32)
        attention(q, k, v, kv_lens=lengths)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attention(q, k, v, kv_lens=lengths)
        lengths.copy_(torch.tensor([5, 77]))
        graph.replay()
        torch.cuda.synchronize()
        expected = attention(q, k, v, kv_lens=lengths)
        assert torch.equal(out, expected)

    def test_a_side_stream(self):
        q = torch.randn(2, 4, 2000, 64, device="cuda", dtype=torch.float16)
        expected = attention(q, q, q)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)  # what the call must wait for
            late = q * 1
            out = attention(late, late, late)
        side.synchronize()
        assert torch.equal(out, expected)


@pytest.mark.gpu
@needs_cuda
def test_lengths_on_a_gpu_are_checked_when_asked_for(monkeypatch: pytest.MonkeyPatch):
    q = torch.randn(2, 4, 8, 64, device="cuda", dtype=torch.float16)
    lengths = torch.tensor([8, 9], device="cuda")
    clamped = attention(q, q, q, kv_lens=lengths)
    assert torch.equal(clamped, attention(q, q, q, kv_lens=lengths.clamp(max=8)))
    monkeypatch.setenv("POLYZOO_CHECK", "1")
    with pytest.raises(ValueError, match=r"kv_lens\[1\] is 9; it must be in 0\.\.8"):
        attention(q, q, q, kv_lens=lengths)
