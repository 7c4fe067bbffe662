"""The `prepare` and `embed` commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from polyzoo.core.errors import ConfigError, DataError, UsageError
from polyzoo.core.io import atomic_write
from polyzoo.sea.model_sources import encoder_folder
from polyzoo.sea.options import EmbedConfig, PrepareConfig
from polyzoo.sea.pipeline import SeaPipeline
from polyzoo.sea.prepare import Preparation, prepare_file
from polyzoo.sea.presets import PRESETS
from polyzoo.sea.records import Record, parse_record, read_records


@dataclass(frozen=True)
class PrepareReport:
    """A prepared file."""

    out: str
    functions: int
    blocks: int
    several_blocks: float
    """Percent of the functions with more than one block."""
    pieces: int
    cut_queries: int
    split_fallbacks: int
    dropped_blocks: int
    megabytes: float


def prepare(config: PrepareConfig) -> PrepareReport:
    """Run the command."""
    if config.out.suffix != ".npz":
        raise UsageError(f"--out {config.out}: the name must end in .npz")
    model = config.model or PRESETS[config.like]().model
    preparation = Preparation(
        tokenizer_folder=str(encoder_folder(model.encoder)),
        split=replace(
            model.split, keep_docstrings=model.split.keep_docstrings or config.keep_docstrings
        ),
        max_query_tokens=model.max_query_tokens,
        split_identifiers=model.split_identifiers,
    )
    prepared = prepare_file(
        config.data,
        preparation,
        need_query=not config.unpaired,
        language=config.language,
        workers=config.workers,
        limit=config.limit,
        several_queries=config.several_queries,
    )
    prepared.save(config.out)
    counts = np.diff(prepared.first_block)
    return PrepareReport(
        out=str(config.out),
        functions=len(prepared),
        blocks=len(prepared.blocks),
        several_blocks=float((counts > 1).mean() * 100),
        pieces=int(prepared.lengths.sum()),
        cut_queries=prepared.origin.cut_queries,
        split_fallbacks=prepared.origin.split_fallbacks,
        dropped_blocks=prepared.origin.dropped_blocks,
        megabytes=round(config.out.stat().st_size / 2**20, 2),
    )


@dataclass(frozen=True)
class EmbedReport:
    """Vectors on disk, or on stdout."""

    out: str | None
    count: int
    dim: int
    model_id: str


def embed(config: EmbedConfig) -> EmbedReport | None:
    """Run the command: a .npy file, or a JSON object per line on stdout."""
    if config.batch_size < 1:
        raise ConfigError(f"batch_size={config.batch_size} must be at least 1")
    if config.out is not None and config.out.suffix != ".npy":
        raise UsageError(f"--out {config.out}: the name must end in .npy")
    pipeline = SeaPipeline.from_pretrained(config.model, device=config.device)
    items = _items(config)
    vectors: list[np.ndarray] = []
    count = 0
    while batch := list(islice(items, config.batch_size)):
        found = _vectors(pipeline, config, [record for _, record in batch])
        count += len(batch)
        if config.out is not None:
            vectors.append(found)
            continue
        for (name, _), vector in zip(batch, found, strict=True):
            row = {"url": name, "vector": [round(float(x), 7) for x in vector]}
            sys.stdout.write(json.dumps(row) + "\n")
    if not count:
        raise DataError("nothing to embed: the input is empty")
    if config.out is None:
        return None
    with atomic_write(config.out) as file:
        np.save(file, np.concatenate(vectors), allow_pickle=False)
    return EmbedReport(str(config.out), count, pipeline.dim, pipeline.model_id)


def _vectors(pipeline: SeaPipeline, config: EmbedConfig, records: list[Record]) -> np.ndarray:
    if config.kind == "query":
        return pipeline.embed_queries([record.query or "" for record in records])
    return pipeline.embed_code(
        [record.text for record in records], language=[record.language for record in records]
    ).vectors


def _items(config: EmbedConfig) -> Iterator[tuple[str, Record]]:
    """Name and record of everything to embed."""
    records = config.data is not None and ".jsonl" in config.data.suffixes
    if records:
        assert config.data is not None  # noqa: S101 - our own promise
        need = config.kind == "query"
        for record in read_records(config.data, need_query=need, language=config.language):
            yield record.url, record
        return
    lines = _text_lines(config.data)
    for number, line in enumerate(lines, start=1):
        where = f"{config.data or 'stdin'}, line {number}"
        if config.kind == "query":
            name = str(number)
            yield name, Record(url=name, text="", language="python", query=line.rstrip("\n"))
        else:
            record = parse_record(line, where=where, need_query=False, language=config.language)
            yield record.url, record


def _text_lines(path: Path | None) -> Iterator[str]:
    if path is None:
        yield from (line for line in sys.stdin if line.strip())
        return
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from (line for line in file if line.strip())
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason})") from error
