"""The `train` command: parts from a recipe, handed to the training engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from polyzoo.core.assets.cache import cache_home
from polyzoo.core.device import resolve_device
from polyzoo.core.errors import ConfigError
from polyzoo.core.log import get_logger
from polyzoo.core.seeding import seed_everything
from polyzoo.core.weights import load_into
from polyzoo.regionspot import scene_folder
from polyzoo.regionspot.cache import CachedData
from polyzoo.regionspot.clip import input_size, map_width, text_width
from polyzoo.regionspot.data import OnlineData, collate, read_annotations
from polyzoo.regionspot.folders import fill_tower, save_integration, tokenizer_of
from polyzoo.regionspot.integration import Integration
from polyzoo.regionspot.model import RegionSpot
from polyzoo.regionspot.paper_objective import PaperStep, vocabulary_of
from polyzoo.regionspot.presets import RegionSpotTrainConfig
from polyzoo.regionspot.scene_material import SceneMaterial, read_material
from polyzoo.regionspot.scene_model import SceneSpot
from polyzoo.regionspot.scene_objective import SceneBank, SceneStep, evaluate
from polyzoo.regionspot.text import build_classifier, fingerprint
from polyzoo.regionspot.words import WordTable
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
    return _train_scenes(config) if config.kind == "scenes" else _train_paper(config)


def _train_paper(config: RegionSpotTrainConfig) -> RegionSpotTrainReport:
    seed_everything(config.train.seed)
    model, recipe = RegionSpot(config.model), config.paper
    for path, tower, name in (
        (recipe.sam_weights, model.sam, "sam"), (recipe.clip_weights, model.clip, "clip"),
    ):  # fmt: skip
        if path is None:
            _log.warning("paper.%s_weights is not set: that tower is random", name)
        else:
            fill_tower(tower, path)
    size = input_size(model.clip)[0]
    if recipe.cache is not None:
        data: Any = CachedData(recipe.cache, sam=fingerprint(model.sam), image_size=size)
        names = data.names
    elif recipe.annotations is not None and recipe.images is not None:
        dataset = read_annotations(recipe.annotations, recipe.images)
        names = dataset.names
        data = OnlineData(
            dataset, sam_side=config.model.sam.image_size, clip_side=size,
            antialias=config.model.clip_antialias, augmented=True,
        )  # fmt: skip
    else:
        raise ConfigError(
            "say what to train on: paper.cache (a folder of `polyzoo regionspot cache`), or "
            "paper.annotations and paper.images"
        )
    built = build_classifier(
        model.clip, tokenizer_of(config.model.clip), names,
        kind=recipe.templates, cleaning=recipe.names, cache=cache_home() / "regionspot" / "classes",
    )  # fmt: skip
    classes = vocabulary_of(names, (built.names, built.vectors))
    step = PaperStep(
        classes, built.scale, alpha=recipe.alpha, gamma=recipe.gamma, compat=recipe.compat
    )

    def step_fn(module: Any, batch: Any, ctx: StepContext) -> StepOutput:
        towers = ctx.frozen["towers"]
        assert isinstance(towers, RegionSpot)  # noqa: S101 - our own promise
        out = step(module, towers, batch)
        return StepOutput(loss=out.loss, metrics=out.metrics)

    shape = (config.model.sam.prompt_dim, map_width(model.clip), text_width(model.clip))
    result = Trainer(config.train).fit(
        model=lambda: Integration(*shape, config.model.integration),
        step_fn=step_fn,
        train_data=data,
        collate=collate,
        frozen={"towers": model},
    )
    load_into(model.integration, result.model.state_dict(), source="the trained module")
    save_integration(config.out, model)
    return RegionSpotTrainReport(
        out=str(config.out),
        run_dir=str(result.run_dir),
        steps=result.step,
        trained=sum(p.numel() for p in result.model.parameters()),
        valid={name: float(value) for name, value in result.metrics.items()},
        megabytes=_megabytes(config),
    )


def _train_scenes(config: RegionSpotTrainConfig) -> RegionSpotTrainReport:
    if config.scenes.material is None:
        raise ConfigError(
            "scenes.material is not set: give the folder of `polyzoo regionspot prepare`"
        )
    recipe = config.train
    device = resolve_device(recipe.device)
    material = read_material(config.scenes.material).to(device)
    step = SceneStep(material, config.scenes, side=config.scene_model.side)

    bank: SceneBank | None = None
    samples = (recipe.steps or 1) * recipe.batch_size
    if config.scenes.bank is not None:
        seed_everything(recipe.seed)
        looking = build_scene_model(config, material).to(device)
        bank = SceneBank(step, looking, scenes=config.scenes.bank, seed=recipe.seed)
        samples = bank.count

    def step_fn(model: Any, batch: Tensor, ctx: StepContext) -> StepOutput:
        if bank is None:
            out = step(model, len(batch), ctx.generator)
        else:
            out = bank(model, batch, ctx.generator)
        return StepOutput(loss=out.loss, metrics=out.metrics)

    def eval_fn(model: Any, _: StepContext) -> dict[str, Tensor]:
        return evaluate(model, material, side=config.scene_model.side)

    result = Trainer(recipe).fit(
        model=lambda: build_scene_model(config, material),
        step_fn=step_fn,
        train_data=_Places(samples),
        eval_fn=eval_fn if recipe.eval_every else None,
    )
    model = result.model
    assert isinstance(model, SceneSpot)  # noqa: S101 - our own promise
    scene_folder.save(config.out, model, WordTable.load(config.scenes.material))
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
    """Numbers of scenes; what a scene looks like is decided in the step, from its own seed."""

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
