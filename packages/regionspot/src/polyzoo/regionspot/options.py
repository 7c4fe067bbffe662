"""What the commands take. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from polyzoo.core.errors import ConfigError, UsageError
from polyzoo.regionspot.config import BoxFormat, OnInvalid


@dataclass(frozen=True, kw_only=True, slots=True)
class InferConfig:
    """Name the regions of an image, or of every image in a folder."""

    image: Annotated[Path, tyro.conf.Positional]
    """Image file, or a folder of them."""
    names: str = ""
    """Names, separated by commas."""
    names_file: Path | None = None
    """Names, one a line."""
    boxes: Path | None = None
    """Boxes: JSON list of [x1, y1, x2, y2], or a COCO file with this image in it."""
    point: tuple[tuple[float, float], ...] = ()
    """Points x y, one region each."""
    auto: bool = False
    """Find regions automatically; the default where neither boxes nor points are given."""
    box_format: BoxFormat = "xyxy"
    """Of a JSON list: xyxy, xywh or xyxyn."""
    on_invalid: OnInvalid = "error"
    """What happens to boxes that are empty or outside the image."""
    model: str = "embedded"
    """embedded, minilm (the same with a sentence encoder), a model folder, or a hub id."""
    sam_weights: Path | None = None
    """SAM's safetensors, for a model on SAM and CLIP."""
    clip_weights: Path | None = None
    """CLIP's safetensors, likewise."""
    overlay: Path | None = None
    """Write a PNG with boxes, masks and names; a folder where several images are given."""
    out: Path | None = None
    """Write results: .json (this command's), .coco.json, or .csv."""
    top: int = 5
    """Names listed for each region."""
    limit: int = 20
    """Most regions found automatically."""
    masks: bool = True
    """Outline regions."""
    negative: str = ""
    """Names, separated by commas, that reject a region when they fit best."""
    min_similarity: float | None = None
    """Reject regions whose best cosine is lower."""
    flip: bool = False
    """Average with the mirrored image."""
    independent: bool = False
    """Embed each box as if it were alone."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        """Check the relations between fields."""
        if not self.names and self.names_file is None:
            raise UsageError('give --names "cat,dog" or --names-file FILE: what may it be?')
        given = [self.boxes is not None, bool(self.point), self.auto]
        if sum(given) > 1:
            raise UsageError("--boxes, --point and --auto exclude one another")
        if self.top < 1 or self.limit < 1:
            raise ConfigError("top and limit must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Measure names on annotated images."""

    annotations: Path
    """COCO or LVIS JSON."""
    images: Path
    """Folder of the images."""
    proposals: Path | None = None
    """Boxes with scores by image id, as JSON; ground-truth boxes where not given."""
    protocol: Literal["coco", "lvis", "top"] = "top"
    """coco and lvis compute AP with their libraries; top only top-1 and top-5 given boxes."""
    model: str = "embedded"
    """embedded, minilm (the same with a sentence encoder), a model folder, or a hub id."""
    sam_weights: Path | None = None
    """SAM's safetensors, for a model on SAM and CLIP."""
    clip_weights: Path | None = None
    """CLIP's safetensors, likewise."""
    names: Literal["readable", "official"] = "readable"
    """Cleaning of the annotations' names."""
    masks: bool = False
    """Mask AP beside box AP."""
    baseline: bool = False
    """Also measure crops named by the classifier and MiniLM (needs both assets)."""
    limit: int | None = None
    """Only so many images."""
    flip: bool = False
    """Average with the mirrored image."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """Compute SAM's region tokens and small images once, to train from them."""

    annotations: Path
    """COCO, LVIS or Objects365 JSON."""
    images: Path
    """Folder of the images."""
    out: Path
    """Folder of the cache; the same call goes on where it stopped."""
    sam: Literal["vit_b", "vit_l", "vit_h"] = "vit_b"
    """Size of SAM."""
    sam_weights: Path | None = None
    """SAM's safetensors; random where not given, for timing only."""
    image_size: int = 224
    """Side of CLIP's input."""
    antialias: bool = False
    """As in the model's clip_antialias."""
    flips: bool = True
    """Also cache the mirrored image's tokens, so that training may flip."""
    shard: int = 512
    """Images a file."""
    limit: int | None = None
    """Only so many images."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.shard < 1 or self.image_size < 1:
            raise ConfigError("shard and image_size must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """Convert published weights."""

    source: Annotated[Path, tyro.conf.Positional]
    """RegionSpot, SAM or CLIP checkpoint (.pth, .pt or .safetensors)."""
    out: Path
    """Folder for RegionSpot, file for a tower."""
    what: Literal["regionspot", "sam", "clip"] = "regionspot"
    """What the checkpoint is."""
    clip_name: str | None = None
    """open_clip name of RegionSpot's CLIP; needed where 224 and 336 cannot be told apart."""
    sam: Literal["vit_b", "vit_l", "vit_h"] = "vit_b"
    """RegionSpot's SAM."""
    sam_weights: Path | None = None
    """SAM's safetensors: compared with the checkpoint's, and remembered."""
    clip_weights: Path | None = None
    """CLIP's safetensors, likewise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """Make the material of which scenes are composed."""

    icons: Path
    """Icon pack with 96 pixels a side or more (polyzoo icons build)."""
    backgrounds: Path
    """Folder of photographs (polyzoo icons backgrounds)."""
    out: Path
    """Folder to write."""
    side: int = 448
    """Side of the backgrounds, in pixels."""
    cutout: int = 96
    """Side of the cut-outs."""
    text_dim: int = 192
    """Channels of the text space."""
    words: int = 10600
    """Words in the text table."""
    fit_steps: int = 120
    """Steps with which the table is fitted to MiniLM."""
