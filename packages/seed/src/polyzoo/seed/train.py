"""The two train commands: parts from a recipe, handed to the training engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polyzoo.core.seeding import seed_everything
from polyzoo.seed import language_training, tokenizer_stages
from polyzoo.seed.asset_tower import load_dino
from polyzoo.seed.language_training import LanguageTrainReport
from polyzoo.seed.material import Material, PictureBatches, gather
from polyzoo.seed.presets import LanguageTrainConfig, TokenizerTrainConfig
from polyzoo.seed.tokenizer_stages import At, TokenizerTrainReport
from polyzoo.training import StepContext, StepOutput, Trainer


def train_tokenizer(config: TokenizerTrainConfig) -> TokenizerTrainReport:
    """Run `train-tokenizer`; the same call resumes an interrupted run."""
    return train_stage(config, gather(config))


def train_stage(config: TokenizerTrainConfig, material: Material) -> TokenizerTrainReport:
    """Train one stage on pictures that are in memory already."""
    seed_everything(config.train.seed)
    parts = tokenizer_stages.start(config, material)
    frozen: dict[str, nn.Module] = {}
    # These stages look at DINOv2: as the teacher, in the generator's target, or as the tower.
    if tokenizer_stages.needs_target(config):
        frozen["target"] = target = tokenizer_stages.generator_target(config)
        tower = target.teacher
    elif parts.model.vision is None:
        frozen["tower"] = tower = load_dino()
    else:
        tower = None
    if parts.model.vision is None:
        assert tower is not None  # noqa: S101 - loaded just now
        parts.model.use_tower(tower)
    batches = PictureBatches(material, texts=config.stage == "stage1")
    stage, step = tokenizer_stages.STAGES[config.stage](config, parts)
    evaluate = tokenizer_stages.evaluation(config, material.valid, material)

    def step_fn(model: Any, batch: dict[str, Tensor], ctx: StepContext) -> StepOutput:
        loss, metrics = step(model, batch, _at(ctx))
        return StepOutput(loss=loss, metrics=metrics)

    result = Trainer(config.train).fit(
        model=stage,
        step_fn=step_fn,
        train_data=batches,
        collate=batches.collate,
        eval_fn=None
        if config.train.eval_every is None
        else lambda model, ctx: evaluate(model, _at(ctx)),
        frozen=frozen,
    )
    return tokenizer_stages.finish(
        config,
        material,
        parts,
        module=result.model,
        run_dir=result.run_dir,
        steps=result.step,
        metrics=result.metrics,
    )


def train_language(config: LanguageTrainConfig) -> LanguageTrainReport:
    """Run `train-lm`; the same call resumes an interrupted run."""
    seed_everything(config.train.seed)
    parts = language_training.prepare(config)

    def step_fn(model: Any, batch: dict[str, Tensor], ctx: StepContext) -> StepOutput:  # noqa: ARG001
        counted = (batch["labels"][:, 1:] != language_training.IGNORED).sum()
        loss = language_training.loss_of(model, batch)
        metrics = {"images_cut": batch["cut"].float(), "filtered": batch["filtered"].float()}
        return StepOutput(
            loss=loss, metrics=metrics, weight=counted, tokens=batch["attention_mask"].sum()
        )

    recipe = config.train
    if parts.valid is None:
        recipe = replace(recipe, eval_every=None)
    result = Trainer(recipe).fit(
        model=parts.language.model,
        step_fn=step_fn,
        train_data=parts.train,
        collate=parts.collate,
        eval_fn=None
        if parts.valid is None
        else lambda model, ctx: language_training.validate(model, parts, ctx.device),
    )
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return language_training.finish(
        config,
        parts,
        model=result.model,
        run_dir=result.run_dir,
        steps=result.step,
        metrics=result.metrics,
        memory=memory,
    )


def _at(ctx: StepContext) -> At:
    return At(step=ctx.step, generator=ctx.generator, frozen=ctx.frozen)
