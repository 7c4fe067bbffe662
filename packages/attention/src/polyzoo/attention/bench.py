"""`polyzoo attention bench`: every backend that serves a call here, timed in turn."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from polyzoo.attention.api import attention
from polyzoo.attention.cli import BenchConfig
from polyzoo.attention.explaining import explain
from polyzoo.attention.registry import backends
from polyzoo.attention.types import DecomposedBias
from polyzoo.core.errors import UsageError

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_TARGET_MS = 1.0
"""Runs shorter than this are timed several at a time."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call by its sizes."""

    name: str
    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    channels: int
    causal: bool = False
    filled: float = 1.0
    """Mean share of valid keys; below 1 there are kv_lens."""
    grid: int = 0
    """Side of the grid of a decomposed bias; 0 is none."""


CASES = (
    Case(
        name="image-self", batch=2, heads=16, key_heads=16, queries=4096, keys=4096, channels=72
    ),
    Case(
        name="image-text", batch=2, heads=16, key_heads=16, queries=4096, keys=120, channels=72,
        filled=0.5,
    ),
    Case(name="vit", batch=32, heads=16, key_heads=16, queries=257, keys=257, channels=88),
    Case(
        name="sam-global", batch=1, heads=16, key_heads=16, queries=4096, keys=4096, channels=80,
        grid=64,
    ),
    Case(
        name="encoder-padded", batch=64, heads=12, key_heads=12, queries=512, keys=512,
        channels=64, filled=0.35,
    ),
    Case(
        name="llm-train", batch=4, heads=32, key_heads=8, queries=2048, keys=2048, channels=128,
        causal=True,
    ),
    Case(
        name="llm-decode", batch=8, heads=32, key_heads=8, queries=1, keys=8192, channels=128,
        causal=True,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class BenchRow:
    """One backend on one call."""

    case: str
    backend: str
    chosen: bool
    """`auto` takes this one."""
    forward_ms: float | None = None
    tflops: float | None = None
    """Of the forward pass, counting valid keys and true channels."""
    backward_ms: float | None = None
    difference: float | None = None
    """Largest difference of the output from the reference in fp32, where that fits."""
    refused: str | None = None


@dataclass(frozen=True)
class Report:
    """What was measured, and where."""

    device: str
    torch: str
    dtype: str
    threads: int
    rows: tuple[BenchRow, ...]


def bench_calls(config: BenchConfig) -> Report:
    """Time the cases that the flags name.

    Raises:
        UsageError: A case, device or number is not known.
    """
    if config.seconds <= 0:
        raise UsageError(f"--seconds {config.seconds}: give more than 0")
    device = _device(config.device)
    dtype = _DTYPES[config.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    rows: list[BenchRow] = []
    for case in _cases(config, device):
        rows += _rows(case, device, dtype, config)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type} {platform.processor() or platform.machine()}"
    return Report(
        device=name,
        torch=torch.__version__,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        rows=tuple(rows),
    )


def render_report(report: Report) -> str:
    """Show a table."""
    lines = [f"{report.device}, torch {report.torch}, {report.dtype}, {report.threads} threads"]
    case = ""
    for row in report.rows:
        if row.case != case:
            case = row.case
            lines.append(case)
        mark = "*" if row.chosen else " "
        if row.refused is not None:
            lines.append(f"  {mark} not {row.refused}")
            continue
        text = f"  {mark} {row.backend:<10} forward {row.forward_ms:>9.3f} ms"
        text += f"  {row.tflops:>7.2f} TFLOP/s"
        if row.backward_ms is not None:
            text += f"  backward {row.backward_ms:>9.3f} ms"
        if row.difference is not None:
            text += f"  difference {row.difference:.1e}"
        lines.append(text)
    lines.append("* is what auto takes")
    return "\n".join(lines)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(
            name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        )
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {error}") from error
    return device


def _cases(config: BenchConfig, device: torch.device) -> list[Case]:
    if config.q is not None:
        sizes = _sizes(config.q, "q")
        keys = sizes if config.k is None else _sizes(config.k, "k")
        if keys[0] != sizes[0] or keys[3] != sizes[3] or not keys[1] or sizes[1] % keys[1]:
            raise UsageError(
                f"--k {config.k}: batch and channels must be those of --q {config.q}, and its "
                "heads must divide those of --q"
            )
        case = Case(
            name="yours", batch=sizes[0], heads=sizes[1], key_heads=keys[1], queries=sizes[2],
            keys=keys[2], channels=sizes[3], causal=config.causal, filled=config.filled,
        )  # fmt: skip
        return [case]
    known = {case.name: case for case in CASES}
    names = list(known) if config.cases == "all" else config.cases.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"--cases {unknown[0]}: there are {', '.join(known)}, and all")
    found = [known[name] for name in names]
    return found if device.type == "cuda" else [_smaller(case) for case in found]


def _smaller(case: Case) -> Case:
    """Shrink a case to what a CPU does in tens of milliseconds."""
    grid = case.grid // 4
    return Case(
        name=case.name,
        batch=max(1, case.batch // 8),
        heads=case.heads,
        key_heads=case.key_heads,
        queries=case.queries // 4
        if case.queries > 256 and not grid
        else grid * grid or case.queries,
        keys=case.keys // 4 if case.keys > 257 and not grid else grid * grid or case.keys,
        channels=case.channels,
        causal=case.causal,
        filled=case.filled,
        grid=grid,
    )


def _sizes(text: str, flag: str) -> tuple[int, int, int, int]:
    try:
        b, h, n, d = (int(part) for part in text.split(","))
    except ValueError:
        b = h = n = d = 0
    if min(b, h, n, d) < 1:
        raise UsageError(
            f"--{flag} {text}: give 4 sizes of 1 or more with commas between, as in 2,16,4096,72"
        )
    return b, h, n, d


def _rows(
    case: Case, device: torch.device, dtype: torch.dtype, config: BenchConfig
) -> list[BenchRow]:
    tensors, options, pairs = _inputs(case, device, dtype)
    lengths = options.get("kv_lens")
    described = {
        "causal": case.causal,
        "kv_lens": None if lengths is None else (case.batch,),
        "bias": options.get("bias"),
        "backward": config.backward,
        "device": device,
        "dtype": dtype,
    }
    shapes = [tuple(tensor.shape) for tensor in tensors]
    auto = explain(*shapes, **described).backend
    served: list[str] = []
    rows: list[BenchRow] = []
    for backend in backends():
        if backend.devices is not None and device.type not in backend.devices:
            continue
        choice = explain(*shapes, **described, backend=backend.name)
        if choice.backend is None:
            rows.append(BenchRow(case.name, backend.name, False, refused=choice.reasons[0]))
        else:
            served.append(backend.name)
    expected = _expected(tensors, options) if "reference" in served else None
    flops = 4.0 * pairs * case.heads * case.channels
    forward = _in_turn(
        {name: partial(attention, *tensors, **options, backend=name) for name in served},
        config.seconds,
        device,
    )
    backward: dict[str, float] = {}
    if config.backward:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        runs = {name: _backward(leaves, options, name) for name in served}
        backward = _in_turn(runs, config.seconds, device)
    for name in served:
        difference = None
        if expected is not None:
            out = attention(*tensors, **options, backend=name)
            difference = float((out.float() - expected).abs().max())
        rows.append(
            BenchRow(
                case=case.name,
                backend=name,
                chosen=auto is not None and auto.name == name,
                forward_ms=round(forward[name], 4),
                tflops=round(flops / forward[name] / 1e9, 3),
                backward_ms=round(backward[name], 4) if name in backward else None,
                difference=difference,
            )
        )
    return rows


def _inputs(
    case: Case, device: torch.device, dtype: torch.dtype
) -> tuple[list[Tensor], dict[str, Any], float]:
    """Make tensors as projections leave them, and count the pairs of query and valid key."""
    chance = torch.Generator().manual_seed(0)

    def draw(heads: int, length: int, channels: int) -> Tensor:
        made = torch.randn(case.batch, length, heads, channels, generator=chance)
        return made.to(device, dtype).transpose(1, 2)

    tensors = [
        draw(case.heads, case.queries, case.channels),
        draw(case.key_heads, case.keys, case.channels),
        draw(case.key_heads, case.keys, case.channels),
    ]
    options: dict[str, Any] = {"causal": case.causal}
    valid = [case.keys] * case.batch
    if case.filled < 1:
        spread = torch.linspace(0.5, 1.5, case.batch) if case.batch > 1 else torch.ones(1)
        lengths = (spread * case.filled * case.keys).round().clamp(1, case.keys).int()
        valid = lengths.tolist()
        options["kv_lens"] = lengths.to(device)
    if case.grid:
        parts = [draw(case.heads, case.queries, case.grid) for _ in range(2)]
        options["bias"] = DecomposedBias(*parts)
    pairs = 0.0
    for length in valid:
        if not case.causal:
            pairs += case.queries * length
            continue
        first = length - case.queries  # the key of the first query, seen with all before it
        hidden = max(0, -first - 1)
        seen = case.queries - hidden
        pairs += seen * (max(0, first + 1) + min(length, first + case.queries)) / 2
    return tensors, options, pairs


def _expected(tensors: list[Tensor], options: dict[str, Any]) -> Tensor:
    bias = options.get("bias")
    if bias is not None:
        options = {**options, "bias": DecomposedBias(bias.rel_h.float(), bias.rel_w.float())}
    return attention(*(tensor.float() for tensor in tensors), **options, backend="reference")


def _backward(leaves: list[Tensor], options: dict[str, Any], name: str) -> Callable[[], object]:
    out = attention(*leaves, **options, backend=name)
    weights = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, leaves, weights, retain_graph=True)


def _in_turn(
    runs: dict[str, Callable[[], object]], seconds: float, device: torch.device
) -> dict[str, float]:
    """Return the median milliseconds of each, all of them run once a round."""
    repeats: dict[str, int] = {}
    for name, run in runs.items():
        run()
        repeats[name] = max(1, int(_TARGET_MS / max(_milliseconds(run, 1, device), 1e-4)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    while not all(times.values()) or (
        time.perf_counter() - started < seconds * len(runs) or len(next(iter(times.values()))) < 3
    ):
        for name, run in runs.items():
            times[name].append(_milliseconds(run, repeats[name], device))
    return {name: statistics.median(found) for name, found in times.items()}


def _milliseconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / repeats
    before = time.perf_counter()
    for _ in range(repeats):
        run()
    return 1e3 * (time.perf_counter() - before) / repeats
