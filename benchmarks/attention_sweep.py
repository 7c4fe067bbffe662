"""Time tile sizes of the Triton kernels on this GPU: JSON lines, and the best per case on stderr.

    python benchmarks/attention_sweep.py --workers 14 > sweep.jsonl

Workers first compile everything in parallel (the disk cache of Triton is shared), then one process
times.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time

import torch

from attention_cases import BY_NAME, CASES, median_ms
from polyzoo.attention.kernels import launch_short
from polyzoo.attention.kernels.launch import forward
from polyzoo.attention.kernels.launch_backward import Wanted, backward
from polyzoo.attention.kernels.launch_decode import decode
from polyzoo.attention.kernels.tuning import TileConfig

FORWARD = [
    (64, 32, 4, 3, False), (64, 32, 4, 4, False), (64, 64, 4, 2, False),
    (64, 64, 4, 3, False), (128, 32, 4, 3, False),
    (128, 64, 8, 2, False), (128, 64, 8, 3, False), (128, 64, 4, 3, False),
    (128, 128, 8, 2, False), (64, 64, 4, 2, True), (64, 64, 4, 3, True), (64, 64, 4, 4, True),
    (128, 64, 4, 3, True), (128, 64, 8, 2, True), (128, 64, 8, 3, True), (128, 64, 8, 4, True),
    (128, 128, 8, 2, True), (128, 128, 8, 3, True),
]  # fmt: skip
FORWARD_SMALL = [
    (16, 64, 4, 2, False), (32, 32, 4, 2, False), (32, 64, 4, 2, False), (32, 128, 4, 2, False),
]  # fmt: skip
BACKWARD_KV = [
    (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2), (64, 128, 8, 3), (32, 64, 4, 2),
    (32, 64, 4, 3), (32, 128, 8, 2), (32, 128, 8, 3),
]  # fmt: skip
BACKWARD_Q = [
    (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 2),
    (128, 32, 8, 3), (64, 32, 4, 3), (128, 128, 8, 2),
]  # fmt: skip
SHORT = [
    (bm, waves, warps, stages)
    for bm, warps in ((64, 4), (128, 8))
    for waves in (2, 3, 5)
    for stages in (2, 3)
]  # fmt: skip
DECODE = [
    (16, bn, warps, stages, splits)
    for bn in (64, 128)
    for warps in (4, 8)
    for stages in (2, 3, 4)
    for splits in (4, 8, 16)
]

KINDS = ("forward", "short", "backward_kv", "backward_q", "quick_kv", "quick_q", "decode")


def jobs(names):
    """Every (case, kind, sizes)."""
    for name in names:
        case = BY_NAME[name]
        if name == "L2":
            yield from ((name, "decode", sizes) for sizes in DECODE)
            continue
        small = name in ("Q1a", "Q1b")
        sizes_forward = FORWARD_SMALL + FORWARD[:4] if small else FORWARD
        if name in ("P3a", "P3b", "S2", "S2b", "C2"):
            yield from ((name, "short", sizes) for sizes in SHORT)
        for sizes in sizes_forward:
            if not (sizes[4] and name in ("S1", "S1b", "P3a", "P3b", "R1", "R1p", "R2p")):
                yield name, "forward", sizes
        if case.backward and name != "D1":
            yield from ((name, "backward_kv", sizes) for sizes in BACKWARD_KV)
            yield from ((name, "backward_q", sizes) for sizes in BACKWARD_Q)
            if name in ("P1", "L1", "S1"):
                yield from ((name, "quick_kv", sizes) for sizes in BACKWARD_KV[:5])
                yield from ((name, "quick_q", sizes) for sizes in BACKWARD_Q[:6])


def runner(kind, sizes, problem, state):
    """A function that launches once."""
    if kind == "decode":
        config = TileConfig(*sizes[:4])
        return lambda: decode(problem, config=config, splits=sizes[4])
    if kind == "short":
        block_m, waves, warps, stages = sizes
        short = TileConfig(block_m, 0, warps, stages)
        return lambda: launch_short.forward(problem, config=short, waves=waves)
    config = TileConfig(*sizes)
    if kind == "forward":
        return lambda: forward(problem, config=config)
    out, lse, dout = state
    careful = kind.startswith("backward")
    if kind.endswith("kv"):
        wanted = Wanted(q=False, bias=False)
        return lambda: backward(
            problem, out, lse, dout, wanted=wanted, config_kv=config, careful=careful
        )
    wanted = Wanted(kv=False, bias=False)
    return lambda: backward(
        problem, out, lse, dout, wanted=wanted, config_q=config, careful=careful
    )


def each(wanted):
    """Yield runners, building every case once."""
    last, problem, state = None, None, None
    for name, kind, sizes in wanted:
        if name != last:
            torch.manual_seed(0)
            problem = BY_NAME[name].build()
            out, lse = forward(problem)
            state, last = (out, lse, torch.randn_like(out)), name
        yield name, kind, sizes, runner(kind, sizes, problem, state)


def compile_share(share):
    """Launch every job of a share once."""
    for _, _, _, run in each(share):
        try:
            run()
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{type(error).__name__}: {str(error)[:200]}", file=sys.stderr)


def main() -> None:
    """Compile in parallel, then time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one case, for half a minute")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--cases", default=",".join(case.name for case in CASES))
    parser.add_argument("--kinds", default="", help="kernels, with commas between; all if empty")
    parser.add_argument("--compile-only", action="store_true", help="fill the compile cache")
    parser.add_argument("--budget", type=float, default=200.0, help="seconds of timing")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("attention_sweep needs a CUDA device: nothing measured", file=sys.stderr)
        return
    names = ["P3"] if options.quick else options.cases.split(",")
    budget = 30.0 if options.quick else options.budget
    kinds = options.kinds.split(",") if options.kinds else KINDS
    wanted = [job for job in jobs(names) if job[1] in kinds]
    context = multiprocessing.get_context("spawn")
    began = time.time()
    shares = [wanted[i :: options.workers] for i in range(options.workers)]
    processes = [context.Process(target=compile_share, args=(share,)) for share in shares]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    print(f"compiled {len(wanted)} in {time.time() - began:.0f} s", file=sys.stderr)
    if options.compile_only:
        return
    rows = []
    began = time.time()
    for name, kind, sizes, run in each(wanted):
        if time.time() - began > budget:
            print(f"stopped at {name} {kind}", file=sys.stderr)
            break
        try:
            ms = median_ms(run, target_ms=15.0)
        except Exception as error:
            ms = float("nan")
            print(f"{name} {kind} {sizes}: {str(error)[:100]}", file=sys.stderr)
        rows.append({"case": name, "kind": kind, "sizes": sizes, "ms": round(ms, 5)})
    for row in rows:
        print(json.dumps(row))
    for name in names:
        for kind in KINDS:
            best = sorted(
                (r for r in rows if (r["case"], r["kind"]) == (name, kind) and r["ms"] == r["ms"]),
                key=lambda row: row["ms"],
            )[:3]
            if best:
                summary = (f"{r['ms']:.4f} {tuple(r['sizes'])}" for r in best)
                print(name, kind, *summary, sep=" | ", file=sys.stderr)


if __name__ == "__main__":
    main()
