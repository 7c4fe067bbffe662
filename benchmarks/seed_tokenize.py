"""Pictures a second of the full-size SEED tokenizer with random weights, and of its loader.

python benchmarks/seed_tokenize.py [--batch 64] [--quick] [--files 3000 --workers 16]

Prints a JSON object a line: the ViT and the whole tokenizer in bf16 and fp16, plain and fused, with
the share of codes equal to the fp32 path's, and how fast the loader reads real JPEG and WebP files.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from polyzoo.seed.config import QFormerConfig, VisionConfig, v2
from polyzoo.seed.fast_vision import FastVision
from polyzoo.seed.model import SeedModel
from polyzoo.seed.sources import open_source
from polyzoo.seed.tokenizing import picture_loader

BOUND = 989e12 / 533.5e9
"""Pictures a second at the H100's peak (section 6 of the specification)."""


def build(device: torch.device, *, quick: bool) -> SeedModel:
    config = v2()
    if quick:
        config = replace(
            config,
            vision=VisionConfig(image_size=56, width=88, depth=3, heads=1, mlp_hidden=176),
            qformer=QFormerConfig(width=96, layers=2, heads=12, ffn=96),
        )
    torch.manual_seed(0)
    with device:
        model = SeedModel(config).eval().requires_grad_(False)
        # At the default initialisation all pictures look the same to the Q-Former: wider weights,
        # so that codes differ between pictures as they do when trained.
        for parameter in model.qformer.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
        model.queries.normal_()
    return model


def pictures(count: int, size: int, device: torch.device) -> torch.Tensor:
    """Smooth random pictures, normalised: neighbouring pixels agree, as in photographs."""
    generator = torch.Generator(device).manual_seed(1)
    coarse = torch.randn(count, 3, 12, 12, generator=generator, device=device) * 1.5
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")


def milliseconds(call: Callable[[], object], *, repeats: int) -> float:
    for _ in range(3):
        call()
    if not torch.cuda.is_available():  # to see that it runs; not a figure
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(np.median(times))


def show(**values: object) -> None:
    print(json.dumps(values), flush=True)


@torch.no_grad()
def tokenizer(arguments: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(device, quick=arguments.quick)
    pixels = pictures(arguments.batch, model.config.vision.image_size, device)
    z = torch.cat([model.pre_quant(model.embed(model.features(part))) for part in pixels.split(16)])
    # Entries as wide as what is looked up in them.
    model.quantizer.codebook.normal_().mul_(z.std((0, 1))).add_(z.mean((0, 1)))
    exact = model.quantizer.search(z)
    show(what="fp32 codes", distinct=len(exact.unique()), device=str(device),
         name=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
         torch=torch.__version__)  # fmt: skip
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    for dtype in (torch.bfloat16, torch.float16):
        if device.type == "cpu" and dtype == torch.float16:
            continue
        model.load_state_dict(kept)
        for name, child in model.named_children():
            child.to(None if name in ("quantizer", "to_code", "vision_norm") else dtype)
        model.queries.data = kept["queries"].to(dtype)
        half = pixels.to(dtype)
        plain = model.vision
        assert plain is not None
        towers = {
            "plain": plain,
            "fused": FastVision(plain),
            "fused, half residual": FastVision(plain, fp32_residual=False),
        }
        for label, vision in towers.items():
            model.vision = vision  # pyright: ignore[reportAttributeAccessIssue]
            codes = model.encode(half)
            tower = milliseconds(partial(model.features, half), repeats=arguments.repeats)
            whole = milliseconds(partial(model.encode, half), repeats=arguments.repeats)
            rate = arguments.batch / whole * 1e3
            show(
                what="tokenize", dtype=str(dtype)[6:], path=label, batch=arguments.batch,
                vit_ms=round(tower, 2), all_ms=round(whole, 2), images_per_second=round(rate, 1),
                share_of_bound=round(rate / BOUND, 3),
                equal_codes=round(float((codes == exact).float().mean()), 5),
                peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2)
                if device.type == "cuda" else 0,
            )  # fmt: skip
        model.vision = plain
        for child in model.children():
            child.float()


def loader(arguments: argparse.Namespace) -> None:
    """Decode and resize files as `polyzoo seed tokenize` does."""
    draws = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.files):
            coarse = draws.integers(0, 255, (24, 32, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
            grain = draws.normal(0, 6, (480, 640, 1))
            values = np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8)
            kind = "JPEG" if number % 2 else "WEBP"
            data = io.BytesIO()
            Image.fromarray(values).save(data, kind, quality=90)
            Path(folder, f"{number:05d}.{kind.lower()}").write_bytes(data.getvalue())
        source = open_source(folder)
        batches = picture_loader(source, v2(), batch_size=64, workers=arguments.workers)
        start, count, first = time.perf_counter(), 0, 0.0
        for batch in batches:
            count += len(batch.keys)
            if not first:
                first, skipped = time.perf_counter(), count
        seconds = time.perf_counter() - first
        show(what="loader", files=arguments.files, pixels="640x480", kinds="JPEG and WebP",
             workers=arguments.workers, images_per_second=round((count - skipped) / seconds, 1),
             start_seconds=round(first - start, 2))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--files", type=int, default=3000)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--only", choices=("tokenizer", "loader"))
    arguments = parser.parse_args()
    if arguments.only != "loader":
        tokenizer(arguments)
    if arguments.only != "tokenizer":
        loader(arguments)


if __name__ == "__main__":
    main()
