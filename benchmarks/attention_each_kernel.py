r"""Launch every kernel once, at small sizes: something for compute-sanitizer to look at.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \
        python benchmarks/attention_each_kernel.py

and again with `--tool racecheck`; `triton` or `cuda` as an argument launches only those. Without
the caching allocator every tensor has bounds of its own.
"""

from __future__ import annotations

import sys

import torch

from polyzoo.attention.kernels import launch_cuda, launch_decode, launch_short
from polyzoo.attention.kernels.launch import forward
from polyzoo.attention.kernels.launch_backward import backward
from polyzoo.attention.kernels.problem import Problem, heads_last
from polyzoo.attention.kernels.tuning import TileConfig


def drawn(*shape: int) -> torch.Tensor:
    """Random bf16 numbers."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def problems():
    """Name and call: together they reach every kernel and every branch with its own loads."""
    q, k, v = drawn(2, 4, 150, 72), drawn(2, 2, 140, 72), drawn(2, 2, 140, 72)
    base = {"q": q, "k": k, "v": v, "scale": 72**-0.5}
    lens = torch.tensor([77, 0], device="cuda", dtype=torch.int32)
    ends = torch.tensor([0, 60, 60, 150], device="cuda", dtype=torch.int32)
    key_ends = torch.tensor([0, 70, 100, 140], device="cuda", dtype=torch.int32)
    yield "plain", Problem(**base)
    yield "window and lengths", Problem(**base, kv_lens=lens, left=40, right=3)
    yield "mask", Problem(**base, mask=torch.rand(2, 1, 150, 140, device="cuda") < 0.5)
    yield "bias", Problem(**base, bias=drawn(1, 4, 150, 140))
    rel = {"rel_h": drawn(2, 4, 150, 10), "rel_w": drawn(2, 4, 150, 14)}
    yield "small grid", Problem(**base, **rel)
    wide = {"rel_h": drawn(2, 4, 150, 2), "rel_w": drawn(2, 4, 150, 70)}
    yield "wide grid", Problem(**base, **wide)
    dropped = torch.tensor([3, 4], device="cuda")
    yield "dropout", Problem(**base, dropout=0.2, rng=dropped)
    packed = {name: base[name][:1] for name in ("q", "k", "v")}
    yield (
        "packed",
        Problem(**packed, scale=0.1, cu_q=ends, cu_k=key_ends, max_q=90, max_k=70, right=0),
    )


def main() -> None:
    """Run them all; prints what ran."""
    if not torch.cuda.is_available():
        print("attention_each_kernel needs a CUDA device: nothing ran", file=sys.stderr)
        return
    which = sys.argv[1] if len(sys.argv) > 1 else "all"
    if which in ("all", "triton"):
        triton_kernels()
    if which in ("all", "cuda"):
        cuda_kernels()


def triton_kernels() -> None:
    """Every Triton kernel."""
    for name, problem in problems():
        low = heads_last(problem.q, problem.v.shape[-1])
        out, lse = forward(problem, low=low)
        backward(problem, out, lse, torch.randn_like(out), low=low)
        torch.cuda.synchronize()
        print(name, flush=True)
    plain = dict(problems())["plain"]
    forward(plain, config=TileConfig(64, 64, 4, 3, tma=True))
    torch.cuda.synchronize()
    print("bulk copies", flush=True)
    few = Problem(q=drawn(1, 4, 300, 72), k=plain.k[:1], v=plain.v[:1], scale=0.1)
    few = Problem(q=few.q, k=few.k[:, :, :120], v=few.v[:, :, :120], scale=0.1)
    for lens in (None, torch.tensor([50], device="cuda"), torch.tensor([100], device="cuda")):
        call = Problem(q=few.q, k=few.k, v=few.v, scale=0.1, kv_lens=lens)
        launch_short.forward(call, low=heads_last(call.q, 72))
    torch.cuda.synchronize()
    print("few keys", flush=True)
    long = Problem(
        q=drawn(2, 4, 1, 128), k=drawn(2, 2, 600, 128), v=drawn(2, 2, 600, 128), scale=0.1
    )
    launch_decode.decode(long, splits=3)
    torch.cuda.synchronize()
    print("decode", flush=True)


def cuda_kernels() -> None:
    """Every CUDA C++ kernel of Turing, for a narrow and a wide head."""
    for d in (72, 128):
        q, k, v = (drawn(2, 4, 150, d).half() for _ in range(3))
        lens = torch.tensor([77, 0], device="cuda", dtype=torch.int32)
        call = Problem(q=q, k=k[:, :2], v=v[:, :2], scale=0.1, kv_lens=lens, left=40, right=3)
        low = heads_last(q, d)
        out, lse = launch_cuda.forward(call, low=low, volta=False)
        launch_cuda.backward(call, out, lse, torch.randn_like(out), low=low, volta=False)
        torch.cuda.synchronize()
        print(f"CUDA C++ kernels, {d} channels", flush=True)


if __name__ == "__main__":
    main()
