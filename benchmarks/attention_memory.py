"""Peak memory of one call at 32,768 queries and keys beside what the score matrix would take.

    python benchmarks/attention_memory.py > attention_memory.jsonl

One JSON line per kind of call: bytes beyond inputs and gradients' own size, forward and backward.
"""

from __future__ import annotations

import json
import sys

import torch

from polyzoo.attention import CuSeqlens, DecomposedBias, attention

N = 32768
HEADS, CHANNELS = 2, 64


def drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers with a gradient."""
    return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()


def kinds(dtype: torch.dtype):
    """Name and options of every way a call describes what is seen."""
    lengths = torch.tensor([20000], device="cuda", dtype=torch.int32)
    yield "plain", {}
    yield "causal", {"causal": True}
    yield "window", {"window": (256, 256)}
    yield "kv_lens", {"kv_lens": lengths}
    yield (
        "packed",
        {"cu_seqlens": CuSeqlens.from_lengths([N // 2, N // 4, N // 4], device="cuda")},
    )
    rel_h = drawn(1, HEADS, N, 256, dtype=dtype)
    rel_w = drawn(1, HEADS, N, 128, dtype=dtype)
    yield "relative position", {"bias": DecomposedBias(rel_h, rel_w)}
    yield "bias per key", {"bias": drawn(1, 1, 1, N, dtype=dtype)}
    yield "mask per key", {"mask": torch.rand(1, 1, 1, N, device="cuda") < 0.5}
    yield "dropout", {"dropout": 0.1}


def main() -> None:
    """Measure every kind on every backend that has it."""
    if not torch.cuda.is_available():
        print("attention_memory needs a CUDA device: nothing measured", file=sys.stderr)
        return
    for backend, dtype in (("triton", torch.bfloat16), ("cuda", torch.float16)):
        for kind, options in kinds(dtype):
            q, k, v = (drawn(1, HEADS, N, CHANNELS, dtype=dtype) for _ in range(3))
            dout = torch.randn_like(q)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            try:
                out = attention(q, k, v, backend=backend, **options)
                forward = torch.cuda.max_memory_allocated() - before
                out.backward(dout)
            except ValueError as error:
                print(f"{backend} {kind}: {str(error)[:90]}", file=sys.stderr)
                continue
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
            row = {
                "backend": backend,
                "kind": kind,
                "n": N,
                "heads": HEADS,
                "channels": CHANNELS,
                "forward_bytes": forward,
                "peak_bytes": peak,
                "in_tensors_of_q": round(peak / (q.numel() * q.element_size()), 2),
                "score_matrix_bytes": HEADS * N * N * 2,
                "device": torch.cuda.get_device_name(),
            }
            print(json.dumps(row), flush=True)
            del out, q, k, v, dout


if __name__ == "__main__":
    main()
