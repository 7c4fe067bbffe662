"""torch.compile traces every call as one graph, and agrees with eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polyzoo.attention import CuSeqlens, attention, use_backend

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (3, 1)},
    "kv_lens": {"kv_lens": torch.tensor([12, 0])},
    "mask": {"mask": torch.ones(8, 12, dtype=torch.bool).tril()},
    "bias": {"bias": torch.ones(8, 12)},
    "lse": {"return_lse": True},
    "dropout": {"dropout": 0.2, "generator": torch.tensor([3, 0])},
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(n: int = 8) -> list[torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    shapes = (2, 4, n, 16), (2, 2, 12, 16), (2, 2, 12, 16)
    return [torch.randn(shape, generator=chance).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [*((name, False) for name in OPTIONS), *((name, True) for name in ("causal", "kv_lens"))],
)
def test_one_graph_forward_and_backward(name: str, dynamic: bool):
    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return attention(q, k, v, **OPTIONS[name])

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for function in (layer, compiled):
        leaves = tensors()
        out = function(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        out[0].square().sum().backward()
        assert out[0].transpose(1, 2).is_contiguous()
        results.append([*out, *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_other_lengths_need_no_other_graph():
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v), fullgraph=True, backend=counting, dynamic=True
    )
    for n in (20, 21, 33):
        q, k, v = (t.detach() for t in tensors(n))
        torch.testing.assert_close(compiled(q, k, v), attention(q, k, v))
    assert len(graphs) == 1


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"return_lse": True}])
def test_packed_batches(options: dict[str, Any]):
    chance = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, h, 11, 8, generator=chance).requires_grad_() for h in (4, 2))
    lengths = CuSeqlens.from_lengths([3, 0, 8], [5, 2, 4])

    def layer(q: torch.Tensor, k: torch.Tensor, lengths: CuSeqlens) -> Any:
        return attention(q, k, k, cu_seqlens=lengths, **options)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found, expected = compiled(q, k, lengths), layer(q, k, lengths)
    torch.testing.assert_close(found, expected)
    pairs = [(out[0] if isinstance(out, tuple) else out).sum() for out in (found, expected)]
    for one, other in zip(*(torch.autograd.grad(out, (q, k)) for out in pairs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "causal"])
def test_autocast_and_named_backends(name: str):
    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attention(q, k, v, **OPTIONS[name], backend="reference")

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    q, k, v = tensors()
    torch.testing.assert_close(compiled(q, k, v), layer(q, k, v))


def test_the_override_is_part_of_the_graph():
    q, k, v = tensors()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    with use_backend("reference"):
        torch.testing.assert_close(compiled(q, k, v), attention(q, k, v))


def test_broken_rules_are_told_while_tracing():
    q, k, v = tensors()
    compiled = torch.compile(attention, backend="aot_eager")
    with pytest.raises(ValueError, match="sees 1 keys ahead"):
        compiled(q, k, v, causal=True, window=(1, 1))


@pytest.mark.parametrize("options", [{}, {"causal": True}])
def test_export(options: dict[str, Any]):
    class Layer(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attention(q, k, v, **options)

    inputs = tuple(t.detach() for t in tensors())
    program = torch.export.export(Layer(), inputs)
    torch.testing.assert_close(program.module()(*inputs), attention(*inputs, **options))
