"""The `train` command: parts from a recipe, handed to the training engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from polyzoo.core.log import get_logger
from polyzoo.core.seeding import seed_everything
from polyzoo.sea import evaluation
from polyzoo.sea.config import SeaConfig
from polyzoo.sea.encoding import lowrank
from polyzoo.sea.encoding.encoder import PackedEncoder, set_dropout
from polyzoo.sea.encoding.tokenizer import SeaTokenizer
from polyzoo.sea.folders import load_folder, save_folder
from polyzoo.sea.material import Material, build_dataset, gather
from polyzoo.sea.model import SeaModel
from polyzoo.sea.objective import (
    DistillBatch,
    distill_objective,
    pair_objective,
)
from polyzoo.sea.prepared import Prepared
from polyzoo.sea.presets import SeaTrainConfig
from polyzoo.training import StepContext, StepOutput, Trainer, load_best

_log = get_logger(__name__)


@dataclass(frozen=True)
class SeaTrainReport:
    """A finished training."""

    out: str
    """Folder of the model."""
    run_dir: str
    steps: int
    pairs: int
    best_step: int | None
    """Step whose weights were kept; the last one without a validation file."""
    valid: dict[str, float]
    """Validation figures of the saved folder, read back as a user would."""
    valid_before_saving: dict[str, float]
    """The same before rounding to the stored precision."""
    megabytes: float
    """Size of the folder."""


def main(config: SeaTrainConfig) -> SeaTrainReport:
    """Run the command; the same call resumes an interrupted run."""
    seed_everything(config.train.seed)
    material = gather(config)
    evaluate = _validation(material.valid) if material.valid is not None else None
    recipe = config.train
    if evaluate is None:
        recipe = replace(recipe, best_metric=None, eval_every=None)
    dataset, collate_fn = build_dataset(config, material)
    result = Trainer(recipe).fit(
        model=lambda: _build(config, material),
        step_fn=_step(config),
        train_data=dataset,
        collate=collate_fn,
        eval_fn=None if evaluate is None else lambda model, _: evaluate(lowrank.unwrap(model)),
        frozen={} if material.teacher is None else {"teacher": material.teacher},
    )
    model = result.model
    if result.best is not None:
        model = load_best(result.run_dir, model)
    device = next(model.parameters()).device
    model.eval()
    before = {} if evaluate is None else evaluate(lowrank.unwrap(model))
    _save(config, material, model)
    after: dict[str, float] = {}
    if evaluate is not None:
        saved = load_folder(config.out, local_files_only=True).model.to(device)
        after = evaluate(saved)
    return SeaTrainReport(
        out=str(config.out),
        run_dir=str(result.run_dir),
        steps=result.step,
        pairs=len(material.train),
        best_step=None if result.best is None else int(result.best["step"]),
        valid=after,
        valid_before_saving=before,
        megabytes=round(
            sum(file.stat().st_size for file in config.out.rglob("*") if file.is_file()) / 2**20, 2
        ),
    )


def _build(config: SeaTrainConfig, material: Material) -> SeaModel:
    encoder = PackedEncoder.from_folder(
        material.encoder,
        pooling=material.shape.pooling,
        max_tokens_per_forward=config.loss.max_tokens_per_forward,
    )
    encoder.probe()
    tokenizer = SeaTokenizer.from_folder(
        material.encoder, split_identifiers=material.shape.split_identifiers
    )
    encoder.check(
        budget=material.shape.split.longest,
        special=tokenizer.special.count,
        pad_id=tokenizer.special.pad_id,
        vocab_size=tokenizer.vocab_size,
    )
    set_dropout(encoder.model, hidden=config.dropout, attention=config.attention_dropout)
    return SeaModel(encoder, material.shape)


def _step(config: SeaTrainConfig) -> Callable[[Any, Any, StepContext], StepOutput]:
    def step(model: Any, batch: Any, ctx: StepContext) -> StepOutput:
        pairs = batch.student if isinstance(batch, DistillBatch) else batch
        out = model(pairs, recompute=config.loss.recompute)
        scores = ctx.call(model, "scores", out.queries, out.codes)
        if isinstance(batch, DistillBatch):
            assert config.distill is not None  # noqa: S101 - our own promise
            teacher = ctx.frozen["teacher"]
            assert isinstance(teacher, SeaModel)  # noqa: S101 - our own promise
            objective = distill_objective(out, scores, batch, teacher, config.loss, config.distill)
        else:
            objective = pair_objective(scores, pairs, config.loss)
        return StepOutput(
            loss=objective.loss, metrics=objective.metrics, tokens=sum(pairs.packed.lengths)
        )

    return step


def _validation(valid: Prepared) -> Callable[[SeaModel], dict[str, float]]:
    answers = evaluation.find_answers(valid, valid)

    @torch.no_grad()
    def evaluate(model: SeaModel) -> dict[str, float]:
        embedded = evaluation.embed(model, valid, valid)
        ranking = evaluation.rank(evaluation.model_scores(model, embedded), answers, valid.lengths)
        return {
            "mrr": ranking.all.mrr,
            "recall_1": ranking.all.recall["1"],
            "recall_10": ranking.all.recall["10"],
            "mrr_short": ranking.by_length["<=256"].mrr,
            "mrr_long": ranking.by_length[">256"].mrr,
        }

    return evaluate


def _save(config: SeaTrainConfig, material: Material, model: nn.Module) -> None:
    if config.train.lora is None:
        assert isinstance(model, SeaModel)  # noqa: S101 - our own promise
        model.config = _search_shape(config, model.config)
        save_folder(config.out, model, tokenizer_folder=material.encoder, int8=config.int8)
        return
    clean = _build(config, material)
    clean.config = _search_shape(config, clean.config)
    changes, scale = lowrank.extract(model, clean)
    save_folder(
        config.out,
        clean,
        tokenizer_folder=material.encoder,
        adapter=changes,
        scale=scale,
    )


def _search_shape(config: SeaTrainConfig, shape: SeaConfig) -> SeaConfig:
    """What the saved model says of itself."""
    if config.search_discount is None:
        return shape
    return replace(shape, count_discount=config.search_discount)


def render(report: SeaTrainReport) -> str:
    """The report for people."""
    lines = [
        f"{report.out}: {report.megabytes} MiB after {report.steps} steps on {report.pairs} pairs"
    ]
    if report.valid:
        kept = f"step {report.best_step}" if report.best_step is not None else "the last step"
        lines.append(
            f"validation MRR {report.valid['mrr']:.4f} (of {kept}; before saving "
            f"{report.valid_before_saving['mrr']:.4f}), R@1 {report.valid['recall_1']:.1f}, "
            f"functions above 256 pieces {report.valid['mrr_long']:.4f}"
        )
    else:
        lines.append("no validation file was given: the last step's weights were kept")
    lines.append(f"search with it: polyzoo sea index --model {report.out} ...")
    return "\n".join(lines)
