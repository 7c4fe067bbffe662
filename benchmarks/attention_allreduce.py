"""Tensor-parallel attention: tiling-AllReduce against one step after the other.

    torchrun --nproc-per-node 2 benchmarks/attention_allreduce.py [--lengths 4096,8192]

Every rank holds its share of 32 query and 8 key heads of 128 channels (bf16, causal, batch 1) and
of the output projection (hidden 4096). In turn in one process: `attention_linear_allreduce` with
several chunks, and the same attention, then the projection, then the all-reduce. Times are the
slowest rank's, medians of CUDA graph replays (`eager_*`: without graphs), each round running every
way once. One JSON line a length from rank 0; `overlap` is the share of the transfer kernels' time
during which another kernel ran, from a profile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from polyzoo.attention import attention, attention_linear_allreduce, overlap_group

H, HK, D, HIDDEN = 32, 8, 128, 4096
CHUNKS: tuple[Any, ...] = ("auto", 2, 3, 4, 6)


class Layer:
    """This rank's shard of one layer."""

    def __init__(self, n: int, rank: int, ranks: int, device: str, dtype: torch.dtype) -> None:
        chance = torch.Generator(device).manual_seed(17 + rank)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=chance, device=device, dtype=dtype)

        self.q = draw(1, n, H // ranks, D).transpose(1, 2)
        self.k = draw(1, n, HK // ranks, D).transpose(1, 2)
        self.v = draw(1, n, HK // ranks, D).transpose(1, 2)
        self.weight = draw(HIDDEN, H // ranks * D) * (H * D) ** -0.5

    def in_sequence(self, group: Any) -> Tensor:
        """Attention, then the projection, then the all-reduce."""
        out = attention(self.q, self.k, self.v, causal=True)
        y = F.linear(out.transpose(1, 2).flatten(2), self.weight)
        dist.all_reduce(y, group=group)
        return y

    def overlapped(self, group: Any, chunks: Any) -> Tensor:
        """The same, ours."""
        return attention_linear_allreduce(
            self.q, self.k, self.v, self.weight, group=group, chunks=chunks, causal=True
        )


def captured(run: Callable[[], Tensor]) -> Callable[[], object]:
    """The same work as a graph replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


def medians(ways: dict[str, Callable[[], object]], seconds: float, device: str) -> dict[str, float]:
    """Milliseconds of each way, all ways once a round; every rank runs as many rounds."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    rounds, spent = 3, 0.0
    for attempt in ("warm", "estimate", "timed"):
        before = time.perf_counter()
        for _ in range(rounds):
            for name, run in ways.items():
                times[name].append(timed(run, device))
        spent = time.perf_counter() - before
        if attempt != "timed":
            wanted = torch.tensor(
                float(max(5, min(100, int(seconds / max(spent / rounds, 1e-4))))), device=device
            )
            dist.all_reduce(wanted, op=dist.ReduceOp.MIN)
            rounds = 3 if attempt == "warm" else int(wanted)
            times = {name: [] for name in ways}
    slowest = torch.tensor([statistics.median(times[name]) for name in ways], device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return dict(zip(ways, slowest.tolist(), strict=True))


def timed(run: Callable[[], object], device: str) -> float:
    """Milliseconds of one run; the all-reduce before it lets all ranks start together."""
    ready = torch.zeros(1, device=device)
    dist.all_reduce(ready)
    if device == "cpu":
        before = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - before)
    torch.cuda._sleep(200_000)  # the host is ahead of the device while it is timed
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def overlap(run: Callable[[], object]) -> dict[str, float]:
    """Share of the transfers' time during which another kernel ran."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in profile.events() or []:
        name = event.name.lower()
        if event.device_type != torch.autograd.DeviceType.CUDA or name.startswith("mem"):
            continue
        if "nccl" not in name or "devkernel" in name:  # not the ranges that annotate them
            spans["nccl" in name].append((event.time_range.start, event.time_range.end))
    sending = sum(end - start for start, end in spans[True])
    both = sum(
        max(0.0, min(a1, b1) - max(a0, b0)) for a0, a1 in spans[True] for b0, b1 in spans[False]
    )
    return {
        "transfer_ms": round(sending / 3e3, 4),
        "hidden_ms": round(both / 3e3, 4),
        "overlap": round(both / sending, 3) if sending else 0.0,
    }


def measure(n: int, groups: dict[str, Any], a: argparse.Namespace) -> dict[str, Any]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    dtype = torch.bfloat16 if a.device == "cuda" else torch.float32
    layer = Layer(n, rank, ranks, a.device, dtype)
    ways: dict[str, Callable[[], Tensor]] = {
        f"sequence, {name}": lambda group=group: layer.in_sequence(group)
        for name, group in groups.items()
    }
    for name, group in groups.items():
        for chunks in CHUNKS:
            ways[f"ours, {name}, chunks {chunks}"] = lambda group=group, chunks=chunks: (
                layer.overlapped(group, chunks)
            )
    expected = layer.in_sequence(None)
    largest, worst = float(expected.abs().max()), 0.0
    for name, run in ways.items():
        difference = float((run() - expected).abs().max())
        if difference > 0.02 * largest:
            raise SystemExit(f"{name}: the results differ by {difference}")
        worst = max(worst, difference)
    line: dict[str, Any] = {"n": n, "ranks": ranks, "heads": f"{H}/{HK} x {D}", "hidden": HIDDEN}
    line |= {"largest_difference": worst, "largest_value": largest}
    eager = medians(ways, a.seconds, a.device)
    line["eager_ms"] = {name: round(value, 4) for name, value in eager.items()}
    line["eager_ratio"] = ratio(eager)
    if a.device == "cuda" and not a.no_graphs:
        replays = {name: captured(run) for name, run in ways.items()}
        found = medians(replays, a.seconds, a.device)
        line["ms"] = {name: round(value, 4) for name, value in found.items()}
        line["ratio"] = ratio(found)
    if a.device == "cuda":
        line["profile"] = {
            name: overlap(ways[name])
            for name in ("sequence, default", f"ours, {a.profiled}, chunks auto")
        }
    return line


def ratio(times: dict[str, float]) -> dict[str, float]:
    """Best sequence over ours: by the plan, and with the best of the chunks tried."""
    sequence = min(value for name, value in times.items() if name.startswith("sequence"))
    ours = {name: value for name, value in times.items() if name.startswith("ours")}
    planned = min(value for name, value in ours.items() if name.endswith("auto"))
    return {
        "planned": round(sequence / planned, 3),
        "best_chunks": round(sequence / min(ours.values()), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", default="4096,8192,16384,32768")
    parser.add_argument("--seconds", type=float, default=0.7, help="of timing, each way of timing")
    parser.add_argument("--ctas", default="8,16", help="groups of at most so many blocks")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--out", help="append rank 0's lines to this file")
    a = parser.parse_args()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if a.device == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if a.device == "cuda" else "gloo")
    groups: dict[str, Any] = {"default": None}
    if a.device == "cuda":
        for ctas in map(int, a.ctas.split(",")):
            groups[f"{ctas} blocks"] = overlap_group(max_ctas=ctas)
    a.profiled = list(groups)[-1]
    with torch.no_grad():
        for n in map(int, a.lengths.split(",")):
            line = measure(n, groups, a)
            line |= {
                "device": torch.cuda.get_device_name() if a.device == "cuda" else "cpu",
                "torch": torch.__version__,
                "nvls": os.environ.get("NCCL_NVLS_ENABLE", "unset"),
            }
            if dist.get_rank() == 0:
                print(json.dumps(line), flush=True)
                if a.out:
                    with Path(a.out).open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
