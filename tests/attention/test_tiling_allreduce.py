"""Attention, projection and all-reduce over ranks: equal to one process that has every head."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from polyzoo.attention import attention, attention_linear_allreduce, overlap_group
from polyzoo.attention.chunking import (
    RATES,
    Rates,
    Work,
    cut,
    pipeline_seconds,
    plan,
    predicted_seconds,
)
from support.forks import Fork

B, H, HIDDEN, D = 3, 6, 20, 8
MASK = torch.rand(3, 1, 37, 41, generator=torch.Generator().manual_seed(5)) < 0.6
BIAS = torch.randn(1, 1, 37, 41, generator=torch.Generator().manual_seed(6)).double()
SHAPES = {"n < m": (37, 41), "n > m": (37, 30), "n = m": (37, 37)}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("n < m", {}),
    "one chunk": ("n < m", {"chunks": 1}),
    "whole items": ("n < m", {"chunks": [37, 74]}),
    "uneven rows": ("n < m", {"chunks": [3, 30, 4, 37, 36, 1], "causal": True}),
    "as many as items": ("n = m", {"chunks": 3, "causal": True}),
    "by the model": ("n = m", {"chunks": "auto", "causal": True}),
    "causal, further keys": ("n < m", {"causal": True}),
    "causal, fewer keys": ("n > m", {"causal": True}),
    "window": ("n < m", {"window": (5, 3)}),
    "window, fewer keys": ("n > m", {"window": (2, 9)}),
    "open to the left": ("n < m", {"window": (-1, 6)}),
    "open to the right": ("n > m", {"window": (4, -1)}),
    "lengths": ("n < m", {"kv_lens": torch.tensor([41, 0, 7])}),
    "causal lengths": ("n < m", {"kv_lens": torch.tensor([41, 5, 30]), "causal": True}),
    "window over lengths": ("n > m", {"kv_lens": torch.tensor([30, 1, 9]), "window": (3, 8)}),
    "mask": ("n < m", {"mask": MASK}),
    "causal mask": ("n < m", {"mask": MASK[:, :, :1], "causal": True}),
    "bias": ("n < m", {"scores_bias": BIAS, "scale": 0.3, "window": (9, 0)}),
}


def make(name: str, ranks: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every head of every rank, and the options."""
    shape, options = CASES[name]
    n, m = SHAPES[shape]
    chance = torch.Generator().manual_seed(1)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=chance, dtype=torch.float64)

    tensors = {
        "q": draw(B, H, n, D),
        "k": draw(B, H // 2 if ranks == 3 else 2, m, D),
        "v": draw(B, H // 2 if ranks == 3 else 2, m, D + 8),
        "weight": draw(HIDDEN, H * (D + 8)),
        "bias": draw(HIDDEN),
    }
    return tensors, {"chunks": 5, **options}


def shards(tensors: dict[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    axes = {"q": 1, "k": 1, "v": 1, "weight": 1}
    return {
        name: (tensor.chunk(ranks, axes[name])[rank] if name in axes else tensor)
        .clone()
        .requires_grad_()
        for name, tensor in tensors.items()
    }


def work_on_every_case(rank: int, ranks: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )
    group = overlap_group()
    results: dict[str, Any] = {}
    for name in CASES:
        tensors, options = make(name, ranks)
        mine = shards(tensors, rank, ranks)
        y = attention_linear_allreduce(**mine, group=group, **options)
        y.square().sum().backward()
        with torch.no_grad():
            again = attention_linear_allreduce(**mine, group=group, **options)
        results[name] = {"y": y.detach(), "again": again} | {
            f"d{part}": leaf.grad for part, leaf in mine.items()
        }
    results["timeline"] = timeline(rank, ranks)
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def timeline(rank: int, ranks: int) -> dict[str, list[tuple[float, float]]]:
    """When products and transfers start and end; the other ranks come a second late."""
    mine = shards(make("plain", ranks)[0], rank, ranks)
    dist.barrier()
    if rank:
        time.sleep(1.0)
    with torch.no_grad(), torch.profiler.profile() as profile:
        attention_linear_allreduce(**mine, chunks=4)
    names = {"gloo:all_reduce": "transfers", "aten::mm": "products", "aten::addmm": "products"}
    found: dict[str, list[tuple[float, float]]] = {"transfers": [], "products": []}
    for event in profile.events() or []:
        if event.name in names:
            found[names[event.name]].append((event.time_range.start, event.time_range.end))
    return found


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, list[dict[str, Any]]]:
    """What every rank got in every case."""
    ranks: int = request.param
    folder = tmp_path_factory.mktemp("ranks")

    def job(rank: int) -> Callable[[], object]:
        return lambda: work_on_every_case(rank, ranks, folder)

    forks = [Fork(job(rank), folder / f"{rank}.log") for rank in range(ranks)]
    for fork in forks:
        assert fork.wait(100) == 0, fork.errors()
    return ranks, [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process_with_every_head(name: str, finished: tuple[int, list[dict[str, Any]]]):
    ranks, results = finished
    tensors, options = make(name, ranks)
    leaves = {part: tensor.requires_grad_() for part, tensor in tensors.items()}
    options.pop("chunks")
    if "scores_bias" in options:
        options["bias"] = options.pop("scores_bias")
    out = attention(leaves["q"], leaves["k"], leaves["v"], **options, backend="reference")
    y = torch.nn.functional.linear(out.transpose(1, 2).flatten(2), leaves["weight"], leaves["bias"])
    y.square().sum().backward()
    for rank, result in enumerate(results):
        torch.testing.assert_close(result[name]["y"], y.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(result[name]["again"], y.detach(), rtol=1e-9, atol=1e-9)
        for part, leaf in leaves.items():
            wanted = leaf.grad
            assert wanted is not None
            if part != "bias":
                wanted = wanted.chunk(ranks, 1)[rank]
            torch.testing.assert_close(result[name][f"d{part}"], wanted, rtol=1e-9, atol=1e-9)


def test_every_rank_has_the_same_bits(finished: tuple[int, list[dict[str, Any]]]):
    _, results = finished
    for name in CASES:
        assert all(torch.equal(results[0][name]["y"], other[name]["y"]) for other in results[1:])


def test_no_product_waits_for_a_transfer(finished: tuple[int, list[dict[str, Any]]]):
    """Rank 0 has nobody to send to for a second, and computes its chunks meanwhile."""
    _, results = finished
    found = results[0]["timeline"]
    assert len(found["products"]) == 6, "3 items, 2 chunks each"
    assert len(found["transfers"]) == 6
    last_product = max(start for start, _ in found["products"])
    assert last_product < min(end for _, end in found["transfers"])


class TestChunks:
    WORK = Work(
        items=1,
        queries=8192,
        keys=8192,
        heads=16,
        head_dim=128,
        hidden=4096,
        element_size=2,
        left=-1,
        right=0,
        ranks=2,
    )

    @pytest.mark.parametrize("seed", range(20))
    def test_the_pipelines_time_by_events(self, seed: int):
        chance = torch.Generator().manual_seed(seed)
        compute, transfer = (
            torch.rand(6, generator=chance, dtype=torch.float64).tolist() for _ in range(2)
        )
        # step by step: at every instant the link sends the first computed, unsent chunk
        now, free_at, ready = 0.0, 0.0, []
        for seconds in compute:
            now += seconds
            ready.append(now)
        for at, seconds in zip(ready, transfer, strict=True):
            free_at = (at if at > free_at else free_at) + seconds
        assert pipeline_seconds(compute, transfer) == pytest.approx(free_at)
        least = max(compute[0] + sum(transfer), sum(compute) + transfer[-1])
        assert pipeline_seconds(compute, transfer) >= least - 1e-12

    @pytest.mark.parametrize("queries", [1, 100, 4096, 5000, 32768])
    @pytest.mark.parametrize("items", [1, 2, 5])
    def test_plans_cover_every_row_once(self, queries: int, items: int):
        work = replace(self.WORK, queries=queries, keys=queries + 77, items=items)
        chunks = plan(work, RATES["cuda"])
        rows = [(c.last_item - c.item) * (c.last - c.first) for c in chunks]
        assert cut(work, rows) == chunks
        whole = cut(work, [items * queries])
        seconds = predicted_seconds(work, chunks, RATES["cuda"])
        assert seconds <= predicted_seconds(work, whole, RATES["cuda"])

    def test_plans_follow_the_rates(self):
        fast = RATES["cuda"]
        assert len(plan(self.WORK, fast)) > 1
        assert len(plan(replace(self.WORK, ranks=1), fast)) == 1, "nothing to send"
        slow_start = replace(fast, latency=1.0)
        assert len(plan(self.WORK, slow_start)) == 1, "a second for each chunk"
        slow_link = Rates(flops=1e15, units=1, bytes_per_second=1e9, latency=1e-6, launch=0.0)
        rows = [c.last - c.first for c in plan(self.WORK, slow_link)]
        assert rows[0] <= rows[-1], "the first chunk delays the first transfer"


class TestBadInput:
    Q = torch.zeros(2, 4, 6, 8)
    WEIGHT = torch.zeros(5, 32)

    @pytest.fixture(autouse=True)
    def _alone(self, tmp_path: Path):
        if os.environ.get("RANK") is not None:
            pytest.skip("started by torchrun")
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
        yield
        if dist.is_initialized():
            dist.destroy_process_group()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"chunks": 13}, "chunks is 13; give 1 to 12"),
            ({"chunks": [4, 4]}, r"2 items x 6 queries = 12"),
            ({"chunks": [4, 8]}, "ends in the middle of item 1|whole items"),
            ({"chunks": [0, 12]}, "each must be 1 or more"),
            ({"bias": torch.zeros(4)}, r"bias has shape \(4,\); it must be \(5,\)"),
            ({"weight": torch.zeros(5, 31)}, r"must be \(hidden, 32\): this rank's 4 heads x 8"),
            ({"weight": torch.zeros(5, 32, device="meta")}, "weight is on meta and q on cpu"),
            ({"scores_bias": torch.zeros(7, 6)}, r"scores_bias of shape \(7, 6\) does not"),
            ({"causal": True, "window": (1, 1)}, "sees 1 keys ahead"),
        ],
    )
    def test_values(self, options: dict[str, Any], message: str):
        arguments = {"weight": self.WEIGHT, **options}
        with pytest.raises(ValueError, match=message):
            attention_linear_allreduce(self.Q, self.Q, self.Q, **arguments)

    def test_dtypes(self):
        with pytest.raises(TypeError, match=r"weight is torch.bfloat16 and q torch.float32; cast"):
            attention_linear_allreduce(self.Q, self.Q, self.Q, self.WEIGHT.bfloat16())

    def test_torch_distributed_must_be_started(self):
        dist.destroy_process_group()
        with pytest.raises(ValueError, match=r"torch.distributed is not started: call"):
            attention_linear_allreduce(self.Q, self.Q, self.Q, self.WEIGHT)

    def test_one_rank_and_autocast(self):
        q = torch.randn(2, 4, 6, 8, requires_grad=True)
        weight = torch.randn(5, 32, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = attention_linear_allreduce(q, q, q, weight, chunks=2)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert weight.grad is not None
        assert weight.grad.dtype == torch.float32
        expected = torch.nn.functional.linear(attention(q, q, q).transpose(1, 2).flatten(2), weight)
        assert (y.float() - expected).abs().max() < 0.2
