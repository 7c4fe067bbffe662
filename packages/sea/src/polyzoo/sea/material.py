"""What a recipe trains on: encoder, prepared files, and a teacher with its own view of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polyzoo.core.errors import ConfigError
from polyzoo.sea.caches import prepared_folder
from polyzoo.sea.config import SeaConfig
from polyzoo.sea.data import PairDataset, collate, read_negatives
from polyzoo.sea.encoding.random_encoder import build_random
from polyzoo.sea.encoding.student import build_student, retokenize
from polyzoo.sea.encoding.tokenizer import SeaTokenizer
from polyzoo.sea.model import SeaModel
from polyzoo.sea.model_sources import encoder_folder
from polyzoo.sea.objective import DistillDataset, collate_both
from polyzoo.sea.pipeline import SeaPipeline
from polyzoo.sea.prepare import Preparation, prepare_file
from polyzoo.sea.prepared import Prepared
from polyzoo.sea.presets import SeaTrainConfig
from polyzoo.sea.records import read_records


@dataclass(frozen=True)
class Material:
    """Everything training reads."""

    encoder: Path
    shape: SeaConfig
    train: Prepared
    valid: Prepared | None
    extra: Prepared | None
    teacher: SeaModel | None = None
    teacher_train: Prepared | None = None
    teacher_extra: Prepared | None = None


def gather(config: SeaTrainConfig) -> Material:
    """Read, and where the recipe says so build, everything the training needs."""
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
    return Material(
        encoder=folder,
        shape=config.model,
        train=read(config.data.train, limit=config.data.limit),
        valid=read(config.data.valid) if config.data.valid else None,
        extra=read(config.data.extra, need_query=False) if config.data.extra else None,
    )


def _gather_for_student(config: SeaTrainConfig) -> Material:
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

    return Material(
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


def build_dataset(
    config: SeaTrainConfig, material: Material
) -> tuple[PairDataset | DistillDataset, Callable[..., Any]]:
    """The pairs, and what makes a batch of them."""
    negatives = None
    if config.data.negatives is not None:
        negatives = read_negatives(config.data.negatives, material.train)

    def pairs(train: Prepared, extra: Prepared | None) -> PairDataset:
        return PairDataset(
            train,
            include_whole=material.shape.whole_entry,
            only_whole=material.shape.aggregator == "first",
            head_pieces=material.shape.head_pieces,
            extra=extra,
            extra_per_pair=config.data.extra_per_pair,
            negatives=negatives,
            negatives_per_pair=config.data.negatives_per_pair,
        )

    own = pairs(material.train, material.extra)
    if material.teacher_train is None:
        return own, collate
    return DistillDataset(own, pairs(material.teacher_train, material.teacher_extra)), collate_both
