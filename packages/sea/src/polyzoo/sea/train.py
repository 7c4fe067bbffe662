"""The `train` command: parts from a recipe, handed to the training engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyzoo.core.errors import ConfigError
from polyzoo.core.log import get_logger
from polyzoo.core.seeding import seed_everything
from polyzoo.sea import evaluation, lowrank
from polyzoo.sea.caches import prepared_folder
from polyzoo.sea.config import SeaConfig
from polyzoo.sea.data import PairDataset, collate, read_negatives
from polyzoo.sea.encoder import PackedEncoder, set_dropout
from polyzoo.sea.folders import load_folder, save_folder
from polyzoo.sea.model import SeaModel
from polyzoo.sea.model_sources import encoder_folder
from polyzoo.sea.objective import (
    DistillBatch,
    DistillDataset,
    collate_both,
    distill_objective,
    pair_objective,
)
from polyzoo.sea.pipeline import SeaPipeline
from polyzoo.sea.prepare import Preparation, prepare_file
from polyzoo.sea.prepared import Prepared
from polyzoo.sea.presets import SeaTrainConfig
from polyzoo.sea.records import read_records
from polyzoo.sea.student import build_random, build_student, retokenize
from polyzoo.sea.tokenizer import SeaTokenizer
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


@dataclass(frozen=True)
class _Material:
    """Everything training reads."""

    encoder: Path
    shape: SeaConfig
    train: Prepared
    valid: Prepared | None
    extra: Prepared | None
    teacher: SeaModel | None = None
    teacher_train: Prepared | None = None
    teacher_extra: Prepared | None = None


def main(config: SeaTrainConfig) -> SeaTrainReport:
    """Run the command; the same call resumes an interrupted run."""
    seed_everything(config.train.seed)
    material = _gather(config)
    evaluate = _validation(material.valid) if material.valid is not None else None
    recipe = config.train
    if evaluate is None:
        recipe = replace(recipe, best_metric=None, eval_every=None)
    dataset, collate_fn = _dataset(config, material)
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


def _gather(config: SeaTrainConfig) -> _Material:
    if config.data.train is None:
        raise ConfigError("data.train is not set: give a .jsonl, .jsonl.gz or prepared .npz file")
    if config.student is not None:
        return _gather_for_student(config)
    if config.distill is not None:
        raise ConfigError(
            "distill without student: only an encoder cut out of its teacher shares its pieces"
        )
    if config.random is not None:
        folder = _random_encoder(config)
    else:
        folder = encoder_folder(config.model.encoder)
    read = _reader(config, folder, config.model)
    return _Material(
        encoder=folder,
        shape=config.model,
        train=read(config.data.train, limit=config.data.limit),
        valid=read(config.data.valid) if config.data.valid else None,
        extra=read(config.data.extra, need_query=False) if config.data.extra else None,
    )


def _gather_for_student(config: SeaTrainConfig) -> _Material:
    """Files in the teacher's pieces, and the same in the student's."""
    assert config.distill is not None  # noqa: S101 - our own promise
    assert config.student is not None  # noqa: S101 - our own promise
    assert config.data.train is not None  # noqa: S101 - our own promise
    source = SeaPipeline.from_pretrained(config.distill.teacher, device="cpu", dtype="float32")
    source.model.encoder.unfuse()
    old = source.tokenizer
    read = _reader(config, source.tokenizer_folder, source.config)
    train = read(config.data.train, limit=config.data.limit)
    extra = read(config.data.extra, need_query=False) if config.data.extra else None
    valid = read(config.data.valid) if config.data.valid else None

    folder = Path(config.train.run_dir) / "encoder"
    if not (folder / "tokenizer.json").is_file():
        build_student(
            folder,
            teacher_folder=source.tokenizer_folder,
            teacher_weights=source.model.encoder.model.state_dict(),
            prepared=[train] if extra is None else [train, extra],
            config=config.student,
        )
    shape = replace(
        config.model,
        encoder=str(folder),
        split=source.config.split,
        split_identifiers=source.config.split_identifiers,
        max_query_tokens=source.config.max_query_tokens,
        pooling=source.config.pooling,
    )
    new = SeaTokenizer.from_folder(folder, split_identifiers=shape.split_identifiers)
    limit = config.student.max_positions

    def respell(prepared: Prepared) -> Prepared:
        return retokenize(prepared, old=old, new=new, max_length=limit)

    return _Material(
        encoder=folder,
        shape=shape,
        train=respell(train),
        valid=None if valid is None else respell(valid),
        extra=None if extra is None else respell(extra),
        teacher=source.model,
        teacher_train=train,
        teacher_extra=extra,
    )


def _reader(
    config: SeaTrainConfig, tokenizer_folder: Path, shape: SeaConfig
) -> Callable[..., Prepared]:
    preparation = Preparation(
        tokenizer_folder=str(tokenizer_folder),
        split=shape.split,
        max_query_tokens=shape.max_query_tokens,
        split_identifiers=shape.split_identifiers,
    )

    def read(path: Path, *, need_query: bool = True, limit: int | None = None) -> Prepared:
        return prepare_file(
            path,
            preparation,
            need_query=need_query,
            language=config.data.language,
            cache_folder=prepared_folder() if config.data.cache else None,
            workers=config.data.workers,
            limit=limit,
        )

    return read


def _random_encoder(config: SeaTrainConfig) -> Path:
    assert config.random is not None  # noqa: S101 - our own promise
    assert config.data.train is not None  # noqa: S101 - our own promise
    folder = Path(config.train.run_dir) / "encoder"
    if (folder / "tokenizer.json").is_file():
        return folder
    if config.data.train.suffix == ".npz":
        raise ConfigError(
            f"{config.data.train}: a random encoder learns its vocabulary from text, which a "
            "prepared file does not hold; give the .jsonl"
        )
    records = read_records(
        config.data.train, language=config.data.language, limit=config.data.limit
    )
    return build_random(
        folder,
        texts=[text for record in records for text in (record.query or "", record.code)],
        vocab_size=config.random.vocab_size,
        layers=config.random.layers,
        hidden=config.random.hidden,
        max_positions=config.random.max_positions,
        seed=config.train.seed,
    )


def _dataset(
    config: SeaTrainConfig, material: _Material
) -> tuple[PairDataset | DistillDataset, Callable[..., Any]]:
    negatives = None
    if config.data.negatives is not None:
        negatives = read_negatives(config.data.negatives, material.train)

    def pairs(train: Prepared, extra: Prepared | None) -> PairDataset:
        return PairDataset(
            train,
            include_whole=material.shape.whole_entry,
            only_whole=material.shape.aggregator == "first",
            extra=extra,
            extra_per_pair=config.data.extra_per_pair,
            negatives=negatives,
            negatives_per_pair=config.data.negatives_per_pair,
        )

    own = pairs(material.train, material.extra)
    if material.teacher_train is None:
        return own, collate
    return DistillDataset(own, pairs(material.teacher_train, material.teacher_extra)), collate_both


def _build(config: SeaTrainConfig, material: _Material) -> SeaModel:
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
        budget=material.shape.split.budget,
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


def _save(config: SeaTrainConfig, material: _Material, model: nn.Module) -> None:
    if config.train.lora is None:
        assert isinstance(model, SeaModel)  # noqa: S101 - our own promise
        save_folder(config.out, model, tokenizer_folder=material.encoder, int8=config.int8)
        return
    clean = _build(config, material)
    changes, scale = lowrank.extract(model, clean)
    save_folder(
        config.out,
        clean,
        tokenizer_folder=material.encoder,
        adapter=changes,
        scale=scale,
    )


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
