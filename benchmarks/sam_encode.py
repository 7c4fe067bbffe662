"""SAM's ViT-B image encoder: segment_anything's own, and the same modules with our attention.

    python benchmarks/sam_encode.py > sam_encode.jsonl

Random weights (every parameter drawn, the relative-position tables too, which the package starts at
zero); 1024 x 1024 images. One JSON line per way of running it: milliseconds per batch (median,
CUDA events) and the largest error of the features against the package in float64.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from functools import partial

import torch
from segment_anything import sam_model_registry

from attention_cases import median_ms
from polyzoo.attention.integrations.segment_anything import use_attention


def build() -> torch.nn.Module:
    """The ViT-B encoder with drawn weights."""
    torch.manual_seed(0)
    encoder = sam_model_registry["vit_b"]().image_encoder.eval().requires_grad_(False)
    for name, parameter in encoder.named_parameters():
        if "rel_pos" in name or name == "pos_embed":
            parameter.normal_(std=0.2)
    return encoder


def main() -> None:
    """Time every way; JSON lines on stdout."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--target-ms", type=float, default=200.0)
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("sam_encode needs a CUDA device: nothing measured", file=sys.stderr)
        return
    torch.set_grad_enabled(False)
    torch.backends.cudnn.allow_tf32 = False  # its convolutions would hide what attention differs by
    package = build().cuda()
    exact_model = copy.deepcopy(package).double()
    ours = copy.deepcopy(package)
    use_attention(ours)
    package_half, ours_half = (copy.deepcopy(m).to(torch.bfloat16) for m in (package, ours))
    for batch in (int(b) for b in options.batches.split(",")):
        image = torch.randn(batch, 3, 1024, 1024, device="cuda")
        half = image.to(torch.bfloat16)
        exact = exact_model(image[:1].double())
        torch.cuda.empty_cache()
        ways = {
            "package fp32": partial(package, image),
            "ours fp32": partial(ours, image),
            "package bf16": partial(package_half, half),
            "ours bf16": partial(ours_half, half),
        }
        if not options.no_compile:
            for name, model in (("package", package_half), ("ours", ours_half)):
                compiled = torch.compile(model, fullgraph=True, dynamic=False)
                ways[f"{name} bf16, compiled"] = partial(compiled, half)
        base: float | None = None
        for name, run in ways.items():
            row = one(name, run, exact, options.target_ms)
            base = base or row["ms"]
            row |= {"batch": batch, "faster_than_package_fp32": round(base / row["ms"], 2)}
            if row["graph_ms"]:
                row["faster_replayed"] = round(base / row["graph_ms"], 2)
            print(json.dumps(row), flush=True)
            print(row, file=sys.stderr)


def one(name: str, run: Callable[[], torch.Tensor], exact: torch.Tensor, target_ms: float) -> dict:
    """Time one way, as it is called and replayed from a CUDA graph, and compare it with float64."""
    error = (run()[:1].double() - exact).abs().max().item()
    milliseconds = median_ms(run, target_ms=target_ms, graph=False)
    try:
        replayed: float | None = round(median_ms(run, target_ms=target_ms, graph=True), 3)
    except RuntimeError as problem:  # the package makes its tables on the CPU in every call
        print(f"{name} cannot be captured: {str(problem)[:80]}", file=sys.stderr)
        replayed = None
        torch.cuda.synchronize()
    return {
        "way": name,
        "ms": round(milliseconds, 3),
        "graph_ms": replayed,
        "error_against_fp64": error,
        "largest_feature": exact.abs().max().item(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
