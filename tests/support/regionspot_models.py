"""RegionSpot models small enough to build in a second, with nothing degenerate in them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from polyzoo.regionspot.config import (
    ClipConfig,
    ClipShape,
    IntegrationConfig,
    RegionSpotConfig,
    SamConfig,
)
from polyzoo.regionspot.folders import tokenizer_of
from polyzoo.regionspot.model import RegionSpot
from polyzoo.regionspot.pipeline import RegionSpotPipeline
from polyzoo.regionspot.sam_engine import SamEngine

COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 70, 230)}


def tiny_sam() -> SamConfig:
    return SamConfig(
        image_size=64, patch_size=8, width=32, depth=2, heads=2, window=3, global_layers=(1,),
        prompt_dim=32, decoder_heads=4, decoder_mlp=48, mask_channels=4, iou_hidden=24,
    )  # fmt: skip


def tiny_config() -> RegionSpotConfig:
    return RegionSpotConfig(
        sam=tiny_sam(),
        clip=ClipConfig(shape=ClipShape(text_layers=1)),
        integration=IntegrationConfig(mlp=96),
    )


def vary(module: torch.nn.Module, seed: int = 0) -> None:
    """Give every tensor a part in the result: constructors leave zeros in relative positions."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(0.05 * noise)


def tiny_model(seed: int = 0) -> RegionSpot:
    torch.manual_seed(seed)
    model = RegionSpot(tiny_config())
    scale = model.clip.logit_scale.detach().clone()
    vary(model, seed)
    model.clip.logit_scale.data = scale
    return model.eval()


def tiny_pipeline(cache: Path | None = None) -> RegionSpotPipeline:
    model = tiny_model()
    return RegionSpotPipeline(
        SamEngine(
            model, tokenizer_of(model.config.clip), device=torch.device("cpu"), cache=cache,
            templates="plain", points_per_side=4,
        )
    )  # fmt: skip


def picture(width: int = 80, height: int = 60, seed: int = 0) -> Image.Image:
    """Noise with a few coloured rectangles."""
    generator = np.random.default_rng(seed)
    image = Image.fromarray(generator.integers(0, 80, (height, width, 3), dtype=np.uint8))
    pen = ImageDraw.Draw(image)
    for place, colour in enumerate(COLOURS.values()):
        x, y = 8 + 24 * place, 10 + 9 * place
        pen.rectangle((x, y, x + 15, y + 17), fill=colour)
    return image


def boxes() -> torch.Tensor:
    """Of the rectangles of `picture`."""
    corners = [[8 + 24 * i, 10 + 9 * i] for i in range(3)]
    return torch.tensor([[x, y, x + 16, y + 18] for x, y in corners], dtype=torch.float32)


def write_coco(folder: Path, count: int = 6) -> tuple[Path, Path]:
    """A COCO file and its images: coloured squares on noise."""
    images = folder / "images"
    images.mkdir(parents=True)
    rows, annotations = [], []
    for index in range(count):
        generator = np.random.default_rng(index)
        image = Image.fromarray(generator.integers(0, 80, (48, 64, 3), dtype=np.uint8))
        pen = ImageDraw.Draw(image)
        for place in range(1 + index % 3):
            side = int(generator.integers(10, 16))
            x, y = 2 + 20 * place, int(generator.integers(2, 30))
            label = int(generator.integers(0, 3))
            pen.rectangle((x, y, x + side - 1, y + side - 1), fill=list(COLOURS.values())[label])
            annotations.append(
                {"id": len(annotations) + 1, "image_id": index + 10, "iscrowd": 0,
                 "category_id": label * 7 + 3, "bbox": [x, y, side, side], "area": side * side}
            )  # fmt: skip
        image.save(images / f"{index}.png")
        rows.append({"id": index + 10, "file_name": f"{index}.png", "width": 64, "height": 48})
    rows.append({"id": 99, "file_name": "none.png", "width": 64, "height": 48})
    categories = [{"id": i * 7 + 3, "name": f"{name}_square"} for i, name in enumerate(COLOURS)]
    path = folder / "coco.json"
    path.write_text(
        json.dumps({"images": rows, "annotations": annotations, "categories": categories})
    )
    return path, images
