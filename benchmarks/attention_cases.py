"""Shapes that the models of this repository send through attention, as benchmark cases."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from polyzoo.attention import CuSeqlens
from polyzoo.attention.kernels.problem import Problem


@dataclass(frozen=True)
class Case:
    """One shape with its rules; `build` allocates it on the GPU."""

    name: str
    what: str
    build: Callable[[], Problem]
    flops: float
    """Multiply-adds twice, forward, with the true head dimension and true lengths."""
    bytes: float
    """Least traffic of the forward pass: each input and output once."""
    backward: bool = True


def tensors(b, h, hk, n, m, d, dtype=torch.bfloat16):
    """Random q, k, v laid out with the heads last, as projections leave them."""
    return {
        name: torch.randn(b, length, heads, d, device="cuda", dtype=dtype).transpose(1, 2)
        for name, heads, length in (("q", h, n), ("k", hk, m), ("v", hk, m))
    }


def plain(name, what, b, h, hk, n, m, d, *, right=-1, left=-1, pairs=None, backward=True, **more):
    """A case without tensors of its own beyond q, k, v."""
    pairs = n * m if pairs is None else pairs

    def build() -> Problem:
        made = {key: value() for key, value in more.items()}
        return Problem(**tensors(b, h, hk, n, m, d), scale=d**-0.5, left=left, right=right, **made)

    traffic = 2.0 * d * b * (2 * h * n + 2 * hk * m)
    return Case(name, what, build, 4.0 * b * h * pairs * d, traffic, backward)


def lengths(values):
    """kv_lens on the GPU."""
    return lambda: torch.tensor(values, dtype=torch.int32, device="cuda")


def normal(*shape):
    """A random bf16 tensor on the GPU, made when asked for."""
    return lambda: torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def packed_case(name, what, h, d, lengths, *, right=-1):
    """Sequences of these lengths behind each other, queries and keys alike."""
    total = sum(lengths)

    def build() -> Problem:
        made = CuSeqlens.from_lengths(lengths, device="cuda")
        return Problem(
            **tensors(1, h, h, total, total, d), scale=d**-0.5, right=right,
            cu_q=made.q, cu_k=made.k, max_q=made.max_q, max_k=made.max_k,
        )  # fmt: skip

    pairs = sum(n * n if right < 0 else n * (n + 1) / 2 for n in lengths)
    return Case(name, what, build, 4.0 * h * pairs * d, 8.0 * d * h * total)


LONG = [256 * (1 + (i * 7) % 16) for i in range(16)]
ROBERTA = [60 + (i * 241) // 64 for i in range(64)]  # 60..297, mean 179.6
CASES = (
    plain("P1", "PIXART 1024 self", 2, 16, 16, 4096, 4096, 72),
    plain("P2", "PIXART 512 self", 8, 16, 16, 1024, 1024, 72),
    plain(
        "P3a", "PIXART cross, 120 keys, half padded", 2, 16, 16, 4096, 120, 72,
        pairs=4096 * 60, kv_lens=lengths([60, 60]),
    ),
    plain(
        "P3b", "PIXART cross, 300 keys, half padded", 2, 16, 16, 4096, 300, 72,
        pairs=4096 * 150, kv_lens=lengths([150, 150]),
    ),
    plain("T1", "T5 bias", 2, 64, 64, 300, 300, 64, bias=normal(1, 64, 300, 300)),
    plain("V1", "ViT-g", 32, 16, 16, 257, 257, 88),
    plain("Q1a", "Q-Former self", 32, 12, 12, 32, 32, 64, right=0, pairs=32 * 33 / 2),
    plain("Q1b", "Q-Former cross", 32, 12, 12, 32, 257, 64),
    plain(
        "S1", "SAM global", 1, 16, 16, 4096, 4096, 80,
        rel_h=normal(1, 16, 4096, 64), rel_w=normal(1, 16, 4096, 64),
    ),
    plain(
        "S2", "SAM window", 100, 16, 16, 196, 196, 80,
        rel_h=normal(100, 16, 196, 14), rel_w=normal(100, 16, 196, 14),
    ),
    plain(
        "S1b", "SAM ViT-B global", 1, 12, 12, 4096, 4096, 64,
        rel_h=normal(1, 12, 4096, 64), rel_w=normal(1, 12, 4096, 64),
    ),
    plain(
        "S2b", "SAM ViT-B window, one image", 25, 12, 12, 196, 196, 64,
        rel_h=normal(25, 12, 196, 14), rel_w=normal(25, 12, 196, 14),
    ),
    plain(
        "R1", "RoBERTa", 64, 12, 12, 512, 512, 64,
        pairs=512 * sum(ROBERTA) / 64, kv_lens=lengths(ROBERTA),
    ),
    packed_case("R1p", "RoBERTa, packed", 12, 64, ROBERTA),
    packed_case("R2p", "packed causal, 16 of 256 to 4096", 16, 128, LONG, right=0),
    plain("L1", "LLM train", 4, 32, 8, 2048, 2048, 128, right=0, pairs=2048 * 2049 / 2),
    plain("L2", "LLM decode", 8, 32, 8, 1, 8192, 128, backward=False),
    plain(
        "W1", "window 512", 2, 16, 16, 16384, 16384, 64, left=256, right=256,
        pairs=16384 * 513 - 256 * 257,
    ),
    plain("C1", "CLIP L/14-336", 16, 16, 16, 577, 577, 64),
    plain("C2", "d 64, many short", 256, 12, 12, 256, 256, 64),
    plain("D1", "d 128", 1, 32, 32, 4096, 4096, 128, right=0, pairs=4096 * 4097 / 2),
)  # fmt: skip
BY_NAME = {case.name: case for case in CASES}


def floor_ms(case: Case, *, tflops: float = 751.0, gigabytes: float = 3020.0) -> float:
    """No version runs faster forward: the ceilings are a matrix product's and a copy's."""
    return max(case.flops / (tflops * 1e9), case.bytes / (gigabytes * 1e6))


def median_ms(run: Callable[[], object], *, target_ms: float = 40.0, graph: bool = True) -> float:
    """Median over repeats of CUDA events, each with other data in the L2 cache.

    That data is read, not written: modified lines would be written back during what is timed. With
    `graph` the calls are replayed from a CUDA graph, so that the time is the GPU's alone.
    """
    run()
    torch.cuda.synchronize()
    if graph:
        run = captured(run)
    flush = torch.ones(32 << 20, dtype=torch.float32, device="cuda")
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(3):
        run()
    stop.record()
    torch.cuda.synchronize()
    once = max(start.elapsed_time(stop) / 3, 1e-3)
    repeats = max(10, min(200, math.ceil(target_ms / once)))
    for _ in range(max(1, repeats // 4)):
        run()
    pairs = []
    for _ in range(repeats):
        flush.sum()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        pairs.append((start, stop))
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in pairs)
    return times[len(times) // 2]


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The same work as a graph replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    # A collection during the capture could free memory, which a capture forbids.
    gc.collect()
    gc.disable()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="relaxed"):
            run()
    finally:
        gc.enable()
    return graph.replay
