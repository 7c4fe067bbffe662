"""Recipes: what `polyzoo regionspot train` takes, and the named starting points. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from polyzoo.core.errors import ConfigError
from polyzoo.regionspot.config import ClipConfig, RegionSpotConfig, SceneSpotConfig
from polyzoo.training.config import (
    CheckpointConfig,
    DataConfig,
    EmaConfig,
    LogConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneRecipe:
    """How SceneSpot learns."""

    material: Path | None = None
    """Folder of `polyzoo regionspot prepare`."""
    bank: int | None = None
    """Compose so many scenes once and train on them again and again: for a CPU, where the frozen
    tower takes most of a step. New scenes in every step where not given."""
    photos_per_step: int = 12
    """Unlabelled photographs beside the scenes of a step."""
    boxes_per_photo: int = 8
    """Random boxes on each of them."""
    scale: float = 30.0
    """Multiplies the cosine in the loss of names."""
    names: float = 1.0
    """Weight of naming pasted things."""
    borrowed: float = 4.0
    """Weight of the distance to what the classifier says about cropped boxes of photographs."""
    masks: float = 1.0
    """Weight of outlines."""
    places: float = 0.5
    """Weight of finding things."""
    saliency: float = 1.0
    """Weight of the saliency map."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("photos_per_step", "boxes_per_photo"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("names", "borrowed", "masks", "places", "saliency"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperRecipe:
    """How the module between SAM and CLIP learns."""

    cache: Path | None = None
    """Folder of `polyzoo regionspot cache`: region tokens and small images."""
    annotations: Path | None = None
    """COCO-style JSON, to train without a cache: SAM then runs in every step."""
    images: Path | None = None
    """Folder of its images."""
    sam_weights: Path | None = None
    """SAM's weights as safetensors; random where not given."""
    clip_weights: Path | None = None
    """CLIP's weights as safetensors; random where not given."""
    alpha: float = 0.25
    """Weight of positives in the focal loss."""
    gamma: float = 2.0
    """How much easy entries count less."""
    templates: Literal["imagenet81", "plain"] = "imagenet81"
    """Sentences around each name."""
    names: Literal["official", "readable"] = "official"
    """Cleaning of names."""
    compat: Literal["ours", "official"] = "ours"
    """official repeats boxes to the batch's maximum, as published, where ours pads and masks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionSpotTrainConfig:
    """Training of a RegionSpot model: shape, data, objective, and the run itself."""

    out: Path = Path("models/regionspot")
    """Folder of the finished model."""
    kind: Literal["paper", "scenes"] = "scenes"
    """paper: the module between SAM and CLIP; scenes: the small model of our own."""
    model: RegionSpotConfig = field(default_factory=RegionSpotConfig)
    """Shape, for paper."""
    scene_model: SceneSpotConfig = field(default_factory=SceneSpotConfig)
    """Shape, for scenes."""
    paper: PaperRecipe = field(default_factory=PaperRecipe)
    """Data and objective, for paper."""
    scenes: SceneRecipe = field(default_factory=SceneRecipe)
    """Data and objective, for scenes."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The run."""


def _paper(name: str, image_size: int | None = None) -> RegionSpotTrainConfig:
    return RegionSpotTrainConfig(
        kind="paper",
        model=RegionSpotConfig(clip=ClipConfig(name=name, image_size=image_size)),
        train=TrainConfig(
            run_dir=Path("runs/regionspot"),
            steps=450_000,
            batch_size=16,
            optim=OptimConfig(lr=2.5e-5, weight_decay=1e-4, decay_all=True),
            schedule=ScheduleConfig(kind="wsd", warmup_steps=1000, decay_fraction=0.22),
            checkpoint=CheckpointConfig(every=5000),
            data=DataConfig(drop_last=True, workers=8),
            log=LogConfig(every=50),
        ),
    )


def paper_bb() -> RegionSpotTrainConfig:
    """As published, CLIP ViT-B/16 at 224: 24.2 M trained weights."""
    return _paper("ViT-B-16-quickgelu")


def paper_bl() -> RegionSpotTrainConfig:
    """As published, CLIP ViT-L/14 at 224: 38.9 M trained weights."""
    return _paper("ViT-L-14-quickgelu")


def paper_bl_336() -> RegionSpotTrainConfig:
    """As published, CLIP ViT-L/14 at 336."""
    return _paper("ViT-L-14-336-quickgelu")


def scenes() -> RegionSpotTrainConfig:
    """The model in this package: a frozen EfficientNet-lite0 and 0.85 M trained weights."""
    return RegionSpotTrainConfig(
        kind="scenes",
        train=TrainConfig(
            run_dir=Path("runs/regionspot-scenes"),
            steps=6000,
            batch_size=48,
            optim=OptimConfig(lr=1e-3, weight_decay=0.02),
            schedule=ScheduleConfig(kind="cosine", warmup_steps=200, final_fraction=0.02),
            checkpoint=CheckpointConfig(every=500, keep_last=1),
            ema=EmaConfig(decay=0.999),
            eval_every=1500,
            log=LogConfig(every=50, plots=False),
            data=DataConfig(drop_last=True),
        ),
    )


PRESETS = {
    "paper-bb": paper_bb,
    "paper-bl": paper_bl,
    "paper-bl-336": paper_bl_336,
    "scenes": scenes,
}
