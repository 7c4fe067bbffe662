"""SAM's ViT-B image encoder: segment_anything's own, and the same modules with our attention.

    python benchmarks/sam_encode.py > sam_encode.jsonl

Random weights (every parameter drawn, the relative-position tables too, which the package starts at
zero); 1024 x 1024 images. One JSON line per way of running it: milliseconds per batch (median,
CUDA events) and the largest difference of the features from the package's in fp32.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
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
    package = build().cuda()
    ours = copy.deepcopy(package)
    use_attention(ours)
    package_half, ours_half = (copy.deepcopy(m).to(torch.bfloat16) for m in (package, ours))
    device = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    for batch in (int(b) for b in options.batches.split(",")):
        image = torch.randn(batch, 3, 1024, 1024, device="cuda")
        half = image.to(torch.bfloat16)
        exact = package(image)
        ways = {
            "package fp32": partial(package, image),
            "ours fp32": partial(ours, image),
            "package bf16": partial(package_half, half),
            "ours bf16": partial(ours_half, half),
        }
        if not options.no_compile:
            compiled = torch.compile(ours_half, fullgraph=True, dynamic=False)
            compiled_package = torch.compile(package_half, fullgraph=True, dynamic=False)
            ways["package bf16, compiled"] = partial(compiled_package, half)
            ways["ours bf16, compiled"] = partial(compiled, half)
        base = None
        for name, run in ways.items():
            try:
                difference = (run().float() - exact).abs().max().item()
                times = [
                    median_ms(run, target_ms=options.target_ms, graph=g) for g in (False, True)
                ]
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
                continue
            base = base or times[0]
            row = {
                "way": name,
                "batch": batch,
                "ms": round(times[0], 3),
                "graph_ms": round(times[1], 3),
                "faster_than_package_fp32": round(base / times[0], 2),
                "largest_difference": difference,
                "largest_feature": exact.abs().max().item(),
                **device,
            }
            print(json.dumps(row), flush=True)
            print(row, file=sys.stderr)


if __name__ == "__main__":
    main()
