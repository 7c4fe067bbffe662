"""What a call of the pipeline asks for, checked and completed before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from polyzoo.core.errors import ConfigError, DataError
from polyzoo.core.log import get_logger
from polyzoo.pixart_delta.buckets import RESOLUTIONS, nearest_bucket
from polyzoo.pixart_delta.config import PixArtConfig
from polyzoo.pixart_delta.pictures import Picture
from polyzoo.pixart_delta.scheduler import SchedulerName, check_steps

_log = get_logger(__name__)
GUIDANCE = 4.5
DEFAULT_STEPS: dict[str, int] = {"lcm": 4, "dpm": 20, "ddim": 25}

ControlType = Literal["hed", "edges", "raw"]
Uncond = Literal["negative_prompt", "learned_null"]


@dataclass(frozen=True, kw_only=True)
class ControlRequest:
    """How a control image steers."""

    image: Picture | Sequence[Picture]
    """One for all, or one for each prompt."""
    kind: ControlType = "hed"
    """hed: find edges by network; edges: by colour differences; raw: the image is a map."""
    scale: float = 1.0
    """0 to 2."""
    start: float = 0.0
    """Share of the steps after which control sets in."""
    end: float = 1.0
    """Share of the steps after which it ends."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 <= self.scale <= 2:
            raise ConfigError(f"control_scale={self.scale} must be 0 to 2")
        if not 0 <= self.start < self.end <= 1:
            raise ConfigError(
                f"control_start={self.start} and control_end={self.end} must satisfy "
                "0 <= start < end <= 1"
            )

    def active(self, index: int, steps: int) -> bool:
        """Whether it steers step `index`."""
        return self.start <= index / steps and (index + 1) / steps <= self.end + 1e-9


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Which size is drawn, and which is given back."""

    height: int
    width: int
    """Drawn."""
    out_height: int
    out_width: int
    """Given back."""
    size: tuple[float, float]
    """Size condition."""
    ratio: float
    """Aspect-ratio condition."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A call, complete."""

    prompts: tuple[str, ...]
    """One for each image; empty where embeddings were given."""
    negatives: tuple[str, ...]
    seeds: tuple[int, ...]
    sizes: Sizes
    steps: int
    guidance: float
    scheduler: SchedulerName
    spacing: Literal["even", "skip"] | None
    strength: float
    uncond: Uncond
    control: ControlRequest | None = None
    warnings: tuple[str, ...] = field(default=())

    @property
    def guided(self) -> bool:
        """Whether the network is asked twice a step."""
        return self.guidance > 1.0


def plan_sizes(
    shape: PixArtConfig,
    factor: int,
    *,
    height: int | None,
    width: int | None,
    binning: bool,
    original_size: tuple[float, float] | None = None,
    aspect_ratio: float | None = None,
) -> Sizes:
    """Find the size to draw.

    Args:
        shape: Of the transformer.
        factor: Image pixels to a latent pixel.
        height: Wanted; the model's own where not given.
        width: The same.
        binning: Draw the trained size of the nearest ratio and resize; only multi-scale models of
            256, 512 and 1024 pixels have such sizes.
        original_size: Size condition other than what is drawn.
        aspect_ratio: Ratio condition other than height over width.

    Raises:
        DataError: A side the model cannot draw; names the nearest ones it can.
    """
    own = shape.sample_size * factor
    height, width = height or own, width or own
    for name, side in (("height", height), ("width", width)):
        if side < 1:
            raise DataError(f"{name}={side} must be at least 1")
    drawn = (height, width)
    if not shape.multi_scale and drawn != (own, own):
        raise DataError(
            f"{height} x {width}: this model draws only {own} x {own}; for other sizes use a "
            "multi-scale (MS) model"
        )
    if binning and shape.multi_scale and own in RESOLUTIONS:
        bucket = nearest_bucket(height, width, own)
        drawn = (bucket.height, bucket.width)
    else:
        unit = factor * shape.patch_size
        for name, side in (("height", height), ("width", width)):
            if side % unit:
                low = side // unit * unit
                raise DataError(
                    f"{name}={side} is not a multiple of {unit}: use {low or unit} or "
                    f"{low + unit}, or leave resolution binning on"
                )
    size = original_size or (float(drawn[0]), float(drawn[1]))
    return Sizes(
        height=drawn[0],
        width=drawn[1],
        out_height=height,
        out_width=width,
        size=size,
        ratio=drawn[0] / drawn[1] if aspect_ratio is None else aspect_ratio,
    )


def plan_steps(
    name: SchedulerName, steps: int | None, guidance: float | None, *, lcm_weights: bool | None
) -> tuple[int, float, tuple[str, ...]]:
    """Steps and guidance, and warnings where they do not suit the weights.

    Args:
        name: Scheduler.
        steps: Wanted.
        guidance: Wanted.
        lcm_weights: Whether the weights are a consistency student's; None if unknown.
    """
    chosen = DEFAULT_STEPS[name] if steps is None else steps
    check_steps(name, chosen)
    scale = (1.0 if name == "lcm" else GUIDANCE) if guidance is None else guidance
    if scale < 0:
        raise ConfigError(f"guidance_scale={scale} must not be negative")
    warnings: list[str] = []
    if name == "lcm" and lcm_weights is False:
        warnings.append(
            "the LCM scheduler with base weights gives poor images: load LCM weights or an "
            "LCM-LoRA, or choose scheduler='dpm'"
        )
    if name != "lcm" and lcm_weights:
        warnings.append(
            f"LCM weights with scheduler={name!r} give poor images: choose scheduler='lcm'"
        )
    if name == "lcm" and scale > 1:
        warnings.append(
            f"guidance_scale={scale} with LCM: its weights contain guidance already; leave it at 1"
        )
    return chosen, scale, tuple(warnings)


def plan_seeds(seed: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """A seed for each image: the ones given, or counted up from one.

    Raises:
        DataError: Not one for each image, or not a seed.
    """
    if seed is None:
        seed = int(torch.randint(0, 2**31, ()).item())
    if isinstance(seed, Sequence):
        seeds = tuple(seed)
        if len(seeds) != count:
            raise DataError(f"{len(seeds)} seeds for {count} images: give one for each, or one")
    else:
        seeds = tuple(range(seed, seed + count))
    for value in seeds:
        if not isinstance(value, int) or not 0 <= value < 2**63:
            raise DataError(f"seed={value!r} must be a whole number from 0 to 2**63 - 1")
    return seeds
