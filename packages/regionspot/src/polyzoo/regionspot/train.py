"""The `train` command: parts from a recipe, handed to the training engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from polyzoo.core.device import resolve_device
from polyzoo.core.errors import ConfigError
from polyzoo.core.log import get_logger
from polyzoo.core.weights import load_into
from polyzoo.regionspot import scene_folder
from polyzoo.regionspot.presets import RegionSpotTrainConfig
from polyzoo.regionspot.scene_material import SceneMaterial, read_material
from polyzoo.regionspot.scene_model import SceneSpot
from polyzoo.regionspot.scene_objective import SceneStep, evaluate
from polyzoo.training import StepContext, StepOutput, Trainer

_log = get_logger(__name__)


@dataclass(frozen=True)
class RegionSpotTrainReport:
    """A finished training."""

    out: str
    """Folder of the model."""
    run_dir: str
    steps: int
    trained: int
    """Weights that were trained."""
    valid: dict[str, float]
    """Figures of the last evaluation."""
    megabytes: float
    """Size of the folder."""


def main(config: RegionSpotTrainConfig) -> RegionSpotTrainReport:
    """Run the command; the same call resumes an interrupted run."""
    return _train_scenes(config)


def _train_scenes(config: RegionSpotTrainConfig) -> RegionSpotTrainReport:
    if config.scenes.material is None:
        raise ConfigError(
            "scenes.material is not set: give the folder of `polyzoo regionspot prepare`"
        )
    recipe = config.train
    device = resolve_device(recipe.device)
    material = read_material(config.scenes.material).to(device)
    step = SceneStep(material, config.scenes, side=config.scene_model.side)

    def step_fn(model: Any, batch: Tensor, ctx: StepContext) -> StepOutput:
        out = step(model, len(batch), ctx.generator)
        return StepOutput(loss=out.loss, metrics=out.metrics)

    def eval_fn(model: Any, _: StepContext) -> dict[str, Tensor]:
        return evaluate(model, material, side=config.scene_model.side)

    result = Trainer(recipe).fit(
        model=lambda: build_scene_model(config, material),
        step_fn=step_fn,
        train_data=_Places((recipe.steps or 1) * recipe.batch_size),
        eval_fn=eval_fn if recipe.eval_every else None,
    )
    model = result.model
    assert isinstance(model, SceneSpot)  # noqa: S101 - our own promise
    scene_folder.save(config.out, model)
    return RegionSpotTrainReport(
        out=str(config.out),
        run_dir=str(result.run_dir),
        steps=result.step,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        valid={name: float(value) for name, value in result.metrics.items()},
        megabytes=_megabytes(config),
    )


def build_scene_model(config: RegionSpotTrainConfig, material: SceneMaterial) -> SceneSpot:
    """Build the model with its frozen tower and its class names."""
    shape = replace(config.scene_model, text_dim=material.classes.shape[1])
    model = SceneSpot(shape)
    load_into(model.tower, material.tower, source="the tower of the scene material")
    model.class_names.copy_(material.classes)
    return model


class _Places:
    """As many samples as scenes: each scene is made in the step, from the step's own seed."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index)


def _megabytes(config: RegionSpotTrainConfig) -> float:
    files = [file for file in config.out.rglob("*") if file.is_file()]
    return round(sum(file.stat().st_size for file in files) / 2**20, 2)


def render(report: RegionSpotTrainReport) -> str:
    """The report for people."""
    lines = [
        f"{report.out}: {report.megabytes} MiB, {report.trained:,} weights trained in "
        f"{report.steps} steps"
    ]
    lines += [f"{name}: {value:.4f}" for name, value in sorted(report.valid.items())]
    lines.append(f"use it: polyzoo regionspot infer IMAGE --model {report.out} --names cat,dog")
    return "\n".join(lines)
