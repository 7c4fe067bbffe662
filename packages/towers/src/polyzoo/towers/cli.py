"""`polyzoo towers distance | retrieve | fit-judge`. Torch-free until a command runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from polyzoo.core.cli import Command, CommandGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class DistanceConfig:
    """Which folders to compare."""

    first: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A folder of pictures."""
    second: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Another one."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrieveConfig:
    """Which pictures, and what they should show."""

    prompts: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """Lines of {"image": FILE, "prompt": TEXT}; the images' paths count from the file's folder."""
    candidates: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Texts to choose among, one a line; the prompts themselves where not given."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FitConfig:
    """What to fit the judge to."""

    icons: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """An icon pack, best of 128 pixels (polyzoo icons build)."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """Where the map goes (.safetensors)."""
    penalty: float = 100.0
    """Weight of the squared map."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


GROUP = CommandGroup(
    summary="Evaluation nets: distance of picture sets, retrieval of prompts",
    commands={
        "distance": Command(
            summary="Kernel distance of two folders of pictures, by DINOv2",
            config=DistanceConfig,
            run="polyzoo.towers.commands:distance",
        ),
        "retrieve": Command(
            summary="How often a picture's prompt is found among all, by DINOv2 and MiniLM",
            config=RetrieveConfig,
            run="polyzoo.towers.commands:retrieve",
        ),
        "fit-judge": Command(
            summary="Fit the map from pictures to texts on an icon pack's training pictures",
            config=FitConfig,
            run="polyzoo.towers.commands:fit_judge",
        ),
    },
)
