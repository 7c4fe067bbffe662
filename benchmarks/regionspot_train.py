"""Training RegionSpot at full size with SAM's tokens cached, and with SAM in every step.

    python benchmarks/regionspot_train.py [--quick] [--preset paper-bl] [--batch 16] [--boxes 16]

Random weights. A step is what `polyzoo regionspot train PRESET` does on the device: normalise the
small images, run frozen CLIP (and, without the cache, frozen SAM), the module forward and
backward, clip the gradient, AdamW. Batches are on the device already; how fast one process reads
samples from a cache on disk is measured beside it. `--compile` holds for both variants.

One JSON line per figure. `hours` extrapolates the preset's 450,000 steps of 16 images (one stage
over about 3 M images). `bytes_per_image` is what `polyzoo regionspot cache` stores.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyzoo.core.weights import write_weights
from polyzoo.regionspot.cache import FORMAT, HEADER, CachedData
from polyzoo.regionspot.config import ClipConfig, ClipShape, RegionSpotConfig, SamConfig
from polyzoo.regionspot.data import collate
from polyzoo.regionspot.model import RegionSpot
from polyzoo.regionspot.paper_objective import PaperStep
from polyzoo.regionspot.presets import PRESETS
from polyzoo.training.precision import freeze

CLASSES = 365
STEPS, BATCH = 450_000, 16


def small() -> RegionSpotConfig:
    """A model that a CPU trains, to try this script."""
    return RegionSpotConfig(
        sam=SamConfig(image_size=128, width=64, depth=2, heads=2, global_layers=(1,), window=3),
        clip=ClipConfig(shape=ClipShape(vision_width=64, vocab_size=100)),
    )


def show(**row: Any) -> None:
    """One line."""
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


def batches(
    config: RegionSpotConfig, images: int, boxes: int, size: int, device: torch.device
) -> dict[str, dict[str, Tensor]]:
    """The same batch as both variants get it."""
    generator = torch.Generator().manual_seed(0)
    side = config.sam.image_size
    shared = {
        "clip": torch.randint(0, 256, (images, 3, size, size), generator=generator).byte(),
        "labels": torch.randint(0, CLASSES, (images, boxes), generator=generator),
        "present": torch.ones(images, boxes, dtype=torch.bool),
    }
    corner = torch.rand(images, boxes, 2, generator=generator) * side * 0.5
    extent = (0.05 + 0.3 * torch.rand(images, boxes, 2, generator=generator)) * side
    cached = {"tokens": torch.randn(images, boxes, config.sam.prompt_dim, generator=generator)}
    online = {
        "sam": torch.randint(0, 256, (images, 3, side, side), generator=generator).byte(),
        "sizes": torch.full((images, 2), side),
        "boxes": torch.cat([corner, corner + extent], -1),
    }
    return {
        name: {key: value.to(device) for key, value in {**shared, **part}.items()}
        for name, part in (("with cache", cached), ("without cache", online))
    }


def reading(folder: Path, images: int, boxes: int, size: int, width: int) -> tuple[float, float]:
    """Samples a second of one process out of a cache on disk, and its bytes an image."""
    tensors = {
        "tokens": torch.randn(images * boxes, width).half(),
        "mirrored": torch.randn(images * boxes, width).half(),
        "counts": torch.full((images,), boxes),
        "labels": torch.randint(0, CLASSES, (images * boxes,)),
        "boxes": torch.rand(images * boxes, 4),
        "images": torch.randint(0, 256, (images, 3, size, size)).byte(),
        "ids": torch.arange(images),
    }
    path = folder / "tokens-00000.safetensors"
    write_weights(path, tensors)
    header = {
        "format": FORMAT, "sam": "", "sam_side": 1024, "image_size": size, "antialias": False,
        "flips": True, "annotations": "", "names": [], "shard": images, "images": images,
    }  # fmt: skip
    (folder / HEADER).write_text(json.dumps(header))
    start = time.perf_counter()
    data = CachedData(folder)
    for begin in range(0, images, BATCH):
        collate([data[i] for i in range(begin, min(images, begin + BATCH))])
    return images / (time.perf_counter() - start), path.stat().st_size / images


def main(arguments: Sequence[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--small", action="store_true", help="a tiny model, for a CPU")
    parser.add_argument("--compile", action="store_true", help="compile the towers' blocks")
    parser.add_argument(
        "--preset", default="paper-bl", choices=[p for p in PRESETS if "paper" in p]
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--boxes", type=int, default=16)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.small:
        parser.error("no CUDA device here; --small runs a tiny model on the CPU")
    config = small() if options.small else PRESETS[options.preset]().model
    torch.manual_seed(0)
    model = RegionSpot(config).to(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    freeze(model.sam, dtype)
    freeze(model.clip, dtype)
    model.train()
    if options.compile:
        model.compile_blocks()
    clip_side = model.clip.visual.image_size
    size = clip_side if isinstance(clip_side, int) else int(clip_side[0])
    width = model.integration.projector.out_features
    classes = torch.nn.functional.normalize(torch.randn(CLASSES, width), dim=-1).to(device)
    step = PaperStep(classes, 100.0)
    recipe = PRESETS[options.preset]().train
    optimizer = torch.optim.AdamW(
        model.integration.parameters(), lr=recipe.optim.lr,
        weight_decay=recipe.optim.weight_decay, fused=True,
    )  # fmt: skip
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    show(device=name, torch=torch.__version__, preset=options.preset, boxes=options.boxes)

    def train_step(batch: dict[str, Tensor]) -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = step(model.integration, model, batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.integration.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    rates: dict[tuple[int, str], float] = {}
    for images in options.batch:
        for variant, batch in batches(config, images, options.boxes, size, device).items():
            for _ in range(3):
                train_step(batch)
            wait()
            count = 3 if options.quick and variant == "without cache" else 10
            start = time.perf_counter()
            for _ in range(count):
                train_step(batch)
            wait()
            rate = count * images / (time.perf_counter() - start)
            rates[images, variant] = rate
            show(
                batch=images, variant=variant, samples_per_second=round(rate, 1),
                hours=round(STEPS * BATCH / rate / 3600, 2),
            )  # fmt: skip
        ratio = rates[images, "with cache"] / rates[images, "without cache"]
        show(batch=images, cached_over_uncached=round(ratio, 2))
    with tempfile.TemporaryDirectory() as folder:
        count = 64 if options.small else 512
        rate, stored = reading(Path(folder), count, options.boxes, size, config.sam.prompt_dim)
    show(reading_samples_per_second=round(rate), bytes_per_image=round(stored))


if __name__ == "__main__":
    main()
