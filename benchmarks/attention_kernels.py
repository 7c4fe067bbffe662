"""Our Triton kernels against every attention torch has, in turn in one process, on one GPU.

    python benchmarks/attention_kernels.py > attention_kernels.jsonl

One JSON line per case and pass: `ours_ms`, `peer_ms` of the fastest peer, `ratio` (peer over ours),
`floor_ms` (arithmetic or traffic, whichever is larger), all peers, and our largest error against
float64 on one head. Times are medians of CUDA graph replays with the L2 cache flushed before each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attention_cases import BY_NAME, CASES, Case, floor_ms, median_ms
from polyzoo.attention import CuSeqlens, DecomposedBias, attention
from polyzoo.attention.kernels.problem import Problem

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def leaves(problem: Problem) -> list[torch.Tensor]:
    """Inputs that get gradients."""
    found = [problem.q, problem.k, problem.v, problem.bias, problem.rel_h, problem.rel_w]
    return [t for t in found if t is not None]


def ours(problem: Problem, backend: str = "triton"):
    """A call through the front door."""
    bias = problem.bias
    if problem.rel_h is not None and problem.rel_w is not None:
        bias = DecomposedBias(problem.rel_h, problem.rel_w)
    window = None if problem.left < 0 else (problem.left, problem.right)
    causal = problem.left < 0 and problem.right == 0
    lengths = None
    if problem.cu_q is not None and problem.cu_k is not None:
        lengths = CuSeqlens(problem.cu_q, problem.cu_k, problem.max_q, problem.max_k)

    def run():
        return attention(
            problem.q,
            problem.k,
            problem.v,
            causal=causal,
            window=window,
            kv_lens=problem.kv_lens,
            cu_seqlens=lengths,
            bias=bias,
            scale=problem.scale,
            backend=backend,
        )

    return run


def peers(problem: Problem):
    """Name and call of every torch kernel that can serve the case."""
    q, k, v, scale = problem.q, problem.k, problem.v, problem.scale
    grouped = problem.group > 1
    causal = problem.left < 0 and problem.right == 0
    described = problem.kv_lens is not None or problem.left >= 0 or problem.width > 0

    def plain(kernel):
        def run():
            with sdpa_kernel(kernel):
                return scaled_dot_product_attention(
                    q, k, v, attn_mask=problem.bias, is_causal=causal, scale=scale,
                    enable_gqa=grouped,
                )  # fmt: skip

        return run

    if problem.cu_q is not None:
        yield "varlen_attn", already_packed(problem)
        return
    if not described:
        for name, kernel in KERNELS.items():
            yield name, plain(kernel)
        return
    mask = None
    if problem.kv_lens is not None:
        keys = torch.arange(problem.keys, device="cuda")
        mask = (keys < problem.kv_lens[:, None])[:, None, None, :]
    if problem.left >= 0:
        i = torch.arange(problem.queries, device="cuda")
        mask = (i - i[:, None] <= problem.right) & (i[:, None] - i <= problem.left)

    def masked():
        bias = mask
        if problem.rel_h is not None and problem.rel_w is not None:
            bias = (problem.rel_h[..., None] + problem.rel_w[..., None, :]).flatten(-2)
        return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)

    yield "sdpa_mask", masked
    if problem.kv_lens is not None or problem.left >= 0:
        yield "varlen_attn", packed(problem)


def already_packed(problem: Problem):
    """Torch's packed kernel on the same packed tensors."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (t[0].transpose(0, 1) for t in (problem.q, problem.k, problem.v))
    q, k, v = (t.detach().contiguous().requires_grad_(t.requires_grad) for t in (q, k, v))

    def run():
        return varlen_attn(
            q, k, v, problem.cu_q, problem.cu_k, problem.max_q, problem.max_k,
            scale=problem.scale, window_size=(-1, problem.right),
        )  # fmt: skip

    run.leaves = [q, k, v]  # pyright: ignore[reportFunctionMemberAccess]
    return run


def packed(problem: Problem):
    """Torch's packed kernel, with the packing done before."""
    from torch.nn.attention.varlen import varlen_attn

    b, h, n, d = problem.q.shape
    lens = [problem.keys] * b if problem.kv_lens is None else problem.kv_lens.tolist()
    square = problem.keys == n
    # Detached: gradient nodes made here would tie a later graph capture to this stream.
    problem = replace(problem, **{x: getattr(problem, x).detach() for x in ("q", "k", "v")})
    lengths = CuSeqlens.from_lengths(lens if square else [n] * b, lens, device="cuda")
    q = problem.q.transpose(1, 2)
    k, v = (t.transpose(1, 2) for t in (problem.k, problem.v))
    if problem.kv_lens is not None:
        k, v = (torch.cat([t[i, : lens[i]] for i in range(b)])[None] for t in (k, v))
        q = torch.cat([q[i, : lens[i]] for i in range(b)]) if square else q.reshape(-1, h, d)
    q, k, v = (t.reshape(-1, h, d).contiguous().requires_grad_() for t in (q, k, v))
    window: dict[str, Any] = (
        {} if problem.left < 0 else {"window_size": (problem.left, problem.right)}
    )

    def run():
        return varlen_attn(
            q, k, v, lengths.q, lengths.k, lengths.max_q, lengths.max_k, scale=problem.scale,
            **window,
        )  # fmt: skip

    run.leaves = [q, k, v]  # pyright: ignore[reportFunctionMemberAccess]
    return run


def with_backward(run, inputs):
    """Forward and backward; gradients of every input that takes part."""
    inputs = [t for t in getattr(run, "leaves", inputs) if t.requires_grad]
    dout = torch.randn_like(run())

    def both():
        return torch.autograd.grad(run(), inputs, dout)

    return both


def largest_error(problem: Problem, out: torch.Tensor) -> float:
    """Against float64 on the first batch item and head, at most 2048 queries."""
    if problem.cu_q is not None:
        first = int(problem.cu_q[1])
        q, k, v = (t[:, :, :first] for t in (problem.q, problem.k, problem.v))
        problem, out = replace(problem, q=q, k=k, v=v, cu_q=None, cu_k=None), out[:, :, :first]
    rows = slice(max(0, problem.queries - 2048), problem.queries)
    q = problem.q[:1, :1, rows].double()
    k, v = problem.k[:1, :1].double(), problem.v[:1, :1].double()
    s = problem.scale * q @ k.transpose(-1, -2)
    if problem.bias is not None:
        s += problem.bias[:1, :1, rows].double()
    if problem.rel_h is not None and problem.rel_w is not None:
        rel_h, rel_w = (t[:1, :1, rows].double() for t in (problem.rel_h, problem.rel_w))
        s += (rel_h[..., None] + rel_w[..., None, :]).flatten(-2)
    i = torch.arange(problem.queries, device="cuda")[rows, None] + problem.keys - problem.queries
    j = torch.arange(problem.keys, device="cuda")
    seen = torch.ones_like(s, dtype=torch.bool)
    if problem.kv_lens is not None:
        seen &= j < problem.kv_lens[0]
    if problem.right >= 0:
        seen &= j <= i + problem.right
    if problem.left >= 0:
        seen &= j >= i - problem.left
    exact = torch.softmax(s.masked_fill(~seen, -torch.inf), -1) @ v
    return (out[:1, :1, rows].double() - exact).abs().max().item()


def measure(case: Case, target_ms: float):
    """Rows of one case: forward, then forward and backward."""
    torch.manual_seed(0)
    problem = case.build()
    for name in ("forward", "forward_backward") if case.backward else ("forward",):
        backward = name != "forward"
        tensors = [t.detach().requires_grad_(backward) for t in leaves(problem)]
        fields = [
            f for f in ("q", "k", "v", "bias", "rel_h", "rel_w") if getattr(problem, f) is not None
        ]
        call = replace(problem, **dict(zip(fields, tensors, strict=True)))
        times: dict[str, float] = {}
        runs = [("triton", ours(call)), *peers(call)]
        for label, run in runs:
            try:
                timed = with_backward(run, tensors) if backward else run
                times[label] = round(median_ms(timed, target_ms=target_ms), 5)
            except Exception as error:
                print(f"{case.name} {name} {label}: {str(error)[:120]}", file=sys.stderr)
        peer_times = {k: v for k, v in times.items() if k != "triton"}
        mine = times.get("triton", float("nan"))
        best = min(peer_times, key=peer_times.__getitem__) if peer_times else None
        row = {
            "case": case.name,
            "what": case.what,
            "pass": name,
            "ours_ms": mine,
            "peer": best,
            "peer_ms": peer_times[best] if best else None,
            "ratio": round(peer_times[best] / mine, 3) if best else None,
            "ratios": {k: round(v / mine, 3) for k, v in peer_times.items()},
            "floor_ms": round(floor_ms(case) * (3.5 if backward else 1.0), 5),
            "tflops": round(case.flops * (3.5 if backward else 1.0) / mine / 1e9, 1),
        }
        if not backward:
            row["error"] = largest_error(problem, ours(problem)())
        yield row


def compile_case(name: str) -> None:
    """Fill the compile caches."""
    try:
        case = BY_NAME[name]
        problem = case.build()
        tensors = [t.requires_grad_(case.backward) for t in leaves(problem)]
        out = ours(problem)()
        if case.backward:
            torch.autograd.grad(out, tensors, torch.randn_like(out))
        ours(case.build())()
        torch.cuda.synchronize()
    except Exception as error:
        print(f"{name}: {str(error)[:200]}", file=sys.stderr)


def main() -> None:
    """Run every case; JSON lines on stdout, a table on stderr."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", default=",".join(case.name for case in CASES))
    parser.add_argument("--quick", action="store_true", help="two cases, shortly")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile")
    parser.add_argument("--compile-only", action="store_true", help="fill the compile cache")
    parser.add_argument("--target-ms", type=float, default=20.0, help="GPU time per measurement")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("attention_kernels needs a CUDA device: nothing measured", file=sys.stderr)
        return
    names = ["P1", "P3"] if options.quick else options.cases.split(",")
    began = time.time()
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.workers) as pool:
        pool.map(compile_case, names, chunksize=1)
    print(f"compiled in {time.time() - began:.0f} s", file=sys.stderr)
    if options.compile_only:
        return
    device = torch.cuda.get_device_name()
    for name in names:
        for row in measure(BY_NAME[name], 5.0 if options.quick else options.target_ms):
            print(json.dumps({**row, "device": device, "torch": torch.__version__}), flush=True)
            ratios = " ".join(f"{k} {v:.2f}" for k, v in row["ratios"].items())
            print(
                f"{row['case']:4} {row['pass'][:16]:16} {row['ours_ms']:.4f} ms "
                f"{row['tflops']:6.1f} TFLOP/s | {ratios} | error {row.get('error', 0):.1e}",
                file=sys.stderr,
            )


if __name__ == "__main__":
    main()
