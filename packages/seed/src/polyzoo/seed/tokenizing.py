"""The `tokenize` command: many pictures to token shards, resumable, bad pictures counted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from polyzoo.core.config import dump
from polyzoo.core.errors import DataError, UsageError
from polyzoo.core.images import open_image
from polyzoo.core.log import get_logger, progress
from polyzoo.seed.config import SeedConfig
from polyzoo.seed.options import TokenizeConfig
from polyzoo.seed.pipeline import SeedPipeline
from polyzoo.seed.preprocessing import square
from polyzoo.seed.shards import TokenWriter
from polyzoo.seed.sources import Source, open_source

_log = get_logger(__name__)
_FLUSH = 1024


@dataclass(frozen=True)
class TokenizeReport:
    """What a run of `tokenize` did."""

    out: str
    pictures: int
    """Records in the folder, those of earlier runs included."""
    new: int
    failed: int
    """Pictures that could not be read; failed.jsonl says why."""
    seconds: float
    per_second: float


class _Read(NamedTuple):
    key: str
    pixels: Tensor | None
    """uint8 (S, S, 3)."""
    error: str


class _Batch(NamedTuple):
    keys: list[str]
    pixels: Tensor
    """uint8 (b, S, S, 3)."""
    failures: list[tuple[str, str]]


class Pictures(Dataset[_Read]):
    """Decoded, upright, resized pictures of a source, still as bytes."""

    def __init__(self, source: Source, config: SeedConfig) -> None:
        self.source, self.config = source, config

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> _Read:
        """Read a picture; what is broken comes back with the reason instead of pixels."""
        key = self.source.items[index].key
        try:
            image = open_image(self.source.read(index))
        except DataError as error:
            return _Read(key, None, str(error))
        values = np.asarray(square(image, self.config), dtype=np.uint8)
        return _Read(key, torch.from_numpy(values.copy()), "")


def main(config: TokenizeConfig) -> TokenizeReport:
    """Run the command; the same call goes on where it was stopped."""
    if config.batch_size < 1:
        raise UsageError(f"--batch-size {config.batch_size} must be at least 1")
    number, parts = _part(config.part)
    source = open_source(config.images)
    pipeline = SeedPipeline.from_pretrained(config.model, device=config.device, dtype=config.dtype)
    source = source.part(number, parts)
    return tokenize(source, pipeline, config)


def tokenize(source: Source, pipeline: SeedPipeline, config: TokenizeConfig) -> TokenizeReport:
    """Tokenise what is not yet in the folder."""
    shape = pipeline.config
    meta = {
        "format": 1,
        "tokens_per_image": shape.tokens_per_image,
        "codes": shape.codes,
        "tokenizer": config.model,
        "image_size": shape.vision.image_size,
        "preprocess": dump(shape.preprocess),
    }
    start = time.perf_counter()
    with TokenWriter(config.out, meta=meta) as writer:
        rest = source.without(writer.done)
        before, failed = writer.written, writer.failed
        bar = progress(total=len(rest), description="Tokenising", unit="image")
        with bar:
            for keys, codes, failures in _encoded(rest, pipeline, config):
                if keys:
                    writer.add(keys, codes)
                for key, why in failures:
                    writer.fail(key, why)
                bar.update(len(keys) + len(failures))
        new = writer.written - before
        seconds = time.perf_counter() - start
        if len(rest) and not new:
            raise DataError(
                f"{config.images}: none of {len(rest)} pictures could be read; see "
                f"{config.out / 'failed.jsonl'}"
            )
        if writer.failed > failed:
            _log.warning("%d pictures could not be read", writer.failed - failed)
        return TokenizeReport(
            out=str(config.out),
            pictures=writer.written,
            new=new,
            failed=writer.failed,
            seconds=round(seconds, 3),
            per_second=round(new / seconds, 1) if new else 0.0,
        )


Encoded = tuple[list[str], NDArray[np.int64], list[tuple[str, str]]]


def _encoded(source: Source, pipeline: SeedPipeline, config: TokenizeConfig) -> Iterator[Encoded]:
    """Codes of about `_FLUSH` pictures at a time."""
    loader = picture_loader(
        source,
        pipeline.config,
        batch_size=config.batch_size,
        workers=config.workers,
        pin=pipeline.device.type == "cuda",
    )
    group = max(1, _FLUSH // config.batch_size)
    batches = iter(loader)
    while chunk := list(islice(batches, group)):
        keys = [key for batch in chunk for key in batch.keys]
        failures = [failure for batch in chunk for failure in batch.failures]
        # Codes of a chunk are fetched together: the device need not wait for each batch.
        found = [pipeline.encode_bytes(batch.pixels) for batch in chunk if len(batch.pixels)]
        codes = torch.cat(found).cpu().numpy() if found else np.zeros((0, 0), np.int64)
        yield keys, codes, failures


def picture_loader(
    source: Source, config: SeedConfig, *, batch_size: int, workers: int, pin: bool = False
) -> DataLoader[Any]:
    """Return a loader of decoded batches, in the source's order whatever the workers do."""
    return DataLoader(
        Pictures(source, config),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_one_thread,
    )


def _collate(reads: list[_Read]) -> _Batch:
    good = [read for read in reads if read.pixels is not None]
    pixels = [read.pixels for read in good if read.pixels is not None]
    return _Batch(
        [read.key for read in good],
        torch.stack(pixels) if pixels else torch.zeros(0, 0, 0, 3, dtype=torch.uint8),
        [(read.key, read.error) for read in reads if read.pixels is None],
    )


def _one_thread(worker: int) -> None:
    del worker
    torch.set_num_threads(1)


def _part(text: str) -> tuple[int, int]:
    number, _, parts = text.partition("/")
    if not (number.isdigit() and parts.isdigit()) or not 1 <= int(number) <= int(parts):
        raise UsageError(f"--part {text}: expected NUMBER/PARTS, such as 1/4")
    return int(number) - 1, int(parts)


def render(report: TokenizeReport) -> str:
    """The report for people."""
    return (
        f"{report.out}: {report.pictures} records, {report.new} of them new in "
        f"{report.seconds:.1f} s ({report.per_second:.0f}/s), {report.failed} pictures failed"
    )
