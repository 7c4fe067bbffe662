"""From units without vectors to vectors in the store, batch by batch, nothing done twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from polyzoo.core.errors import DataError
from polyzoo.core.log import get_logger, progress
from polyzoo.sea.search import sketch
from polyzoo.sea.search.embedder import Embedder
from polyzoo.sea.search.index import IndexSettings, check_model
from polyzoo.sea.search.staging import BlockInfo, Staging, WaitingUnit
from polyzoo.sea.search.stores import Ids, Points, Vectors, VectorStore

logger = get_logger(__name__)

_UNITS_PER_BATCH = 128
_FEW_UNITS = 48
"""With more, loading torch pays."""
_BLOCK_BITS = 12
"""A block's number is its unit's, shifted by this, plus its place: room for 4,096 blocks."""


class PendingEmbedder:
    """A model that loads while files are read, or only once it is known to be worth it.

    An update mostly has a few units to encode, which the light version has done before the full one
    is loaded.
    """

    def __init__(self, load: Callable[[], Embedder], *, light: Embedder | None = None) -> None:
        """Begin to load, unless there is a light version to begin with.

        Args:
            load: Gives the full version.
            light: The same model, ready, for at most a few units.
        """
        self._load, self._light = load, light
        self._future: Future[Embedder] | None = None
        if light is None:
            self._begin()

    def get(self, units: int | None = None) -> Embedder:
        """Return the model, waiting for it; raises what loading it raised.

        Args:
            units: How many are to be encoded; where not given, whichever version is there will do.
        """
        if self._light is not None and (units is None or units <= _FEW_UNITS):
            return self._light
        return (self._future or self._begin()).result()

    def check(self, settings: IndexSettings, folder: Path) -> None:
        """Refuse a model other than the index's."""
        check_model(settings, self.get(), folder=folder)

    def _begin(self) -> Future[Embedder]:
        pool = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._future = pool.submit(self._load)
        pool.shutdown(wait=False)
        return self._future


EXTRA_ENTRIES = 2
"""Entries beside the blocks, numbered after them: the truncated whole and the head."""


def unit_of_block(numbers: Ids) -> Ids:
    """Return the units that blocks belong to."""
    return numbers >> _BLOCK_BITS


def place_of_block(numbers: Ids) -> Ids:
    """Return which block of its unit each one is, counted from 0."""
    return numbers & ((1 << _BLOCK_BITS) - 1)


def numbers_of_blocks(unit: int, count: int) -> Ids:
    """Return the numbers of a unit's blocks."""
    return (unit << _BLOCK_BITS) + np.arange(count, dtype=np.int64)


def embed_waiting(
    staging: Staging, stores: Sequence[VectorStore], embedder: PendingEmbedder
) -> tuple[int, int]:
    """Give every unit without a vector one; each batch is on disk before the next begins.

    Args:
        staging: Where the units wait.
        stores: The store of units, and the one of blocks if blocks are kept.
        embedder: Asked only if there is anything to do.

    Returns:
        Units that went through the model, and units that got the vector of one with the same text.

    Raises:
        DataError: the model gave NaN or infinity; names the function.
    """
    encoded = copied = 0
    total = staging.count_waiting()
    if not total:
        return 0, 0
    model = embedder.get(total)
    with progress(total=total, description="Embedding", unit="unit") as bar:
        while batch := staging.waiting(_UNITS_PER_BATCH):
            twins = staging.twins({unit.hash for unit in batch})
            old = [unit for unit in batch if unit.hash in twins]
            new = [unit for unit in batch if unit.hash not in twins]
            blocks: dict[int, BlockInfo | None] = {}
            if old:
                blocks |= _copy(old, twins, stores)
                copied += len(old)
            if new:
                # Equal texts within the batch are encoded once; the rest find it as their twin.
                first = list({unit.hash: unit for unit in reversed(new)}.values())
                encoded += len(first)
                blocks |= _encode(first, stores, model)
            staging.mark_embedded(blocks)
            bar.update(len(blocks))
    return encoded, copied


def _copy(
    units: Sequence[WaitingUnit],
    twins: dict[str, tuple[int, BlockInfo]],
    stores: Sequence[VectorStore],
) -> dict[int, BlockInfo]:
    sources = np.array([twins[unit.hash][0] for unit in units], np.int64)
    found, vectors = stores[0].get(sources)
    if len(found) != len(sources):
        missing = np.setdiff1d(sources, found)[0]
        raise DataError(
            f"the vector of unit {missing} is gone; build the index again with --rebuild"
        )
    stores[0].upsert(_points(units, np.array([unit.id for unit in units], np.int64), vectors))
    for store in stores[1:]:
        for unit in units:
            source, info = twins[unit.hash]
            asked = numbers_of_blocks(source, len(info.lines) + EXTRA_ENTRIES)
            there, block_vectors = store.get(asked)
            numbers = numbers_of_blocks(unit.id, len(there))
            store.upsert(_points([unit] * len(there), numbers, block_vectors))
    return {unit.id: twins[unit.hash][1] for unit in units}


def _encode(
    units: Sequence[WaitingUnit], stores: Sequence[VectorStore], model: Embedder
) -> dict[int, BlockInfo | None]:
    """Encode units; one the model has no vector for does not keep the others from theirs."""
    try:
        return _encode_all(units, stores, model)
    except DataError as error:
        if len(units) == 1:
            raise _named(units[0], error) from error
    blocks: dict[int, BlockInfo | None] = {}
    reasons: list[DataError] = []
    for unit in units:
        try:
            blocks |= _encode_all([unit], stores, model)
        except DataError as error:
            reasons.append(_named(unit, error))
            blocks[unit.id] = None
    if len(reasons) == len(units):  # not a matter of single units
        raise reasons[0]
    for reason in reasons:
        logger.warning("%s; only its words can be searched", reason)
    return blocks


def _encode_all(
    units: Sequence[WaitingUnit], stores: Sequence[VectorStore], model: Embedder
) -> dict[int, BlockInfo | None]:
    result = model.embed_code(
        [unit.text for unit in units], language=[unit.language for unit in units]
    )
    vectors = np.asarray(result.vectors, np.float32)
    if not np.isfinite(vectors).all():
        raise DataError("the model's vector holds NaN or infinity; check the weights")
    for store in stores[1:]:
        owners, numbers, rows = [], [], []
        kept = result.entry_vectors if model.config.keeps_entries else result.block_vectors
        for unit, entries in zip(units, kept, strict=True):
            owners += [unit] * len(entries)
            numbers.append(numbers_of_blocks(unit.id, len(entries)))
            rows.append(np.asarray(entries, np.float32))
        store.upsert(_points(owners, np.concatenate(numbers), np.concatenate(rows)))
    stores[0].upsert(_points(units, np.array([unit.id for unit in units], np.int64), vectors))
    blocks: dict[int, BlockInfo | None] = {}
    for unit, split, rows in zip(units, result.splits, result.block_vectors, strict=True):
        lines = [[block.first_line, block.last_line] for block in split.blocks]
        several = len(lines) > 1 and len(rows) == len(lines)
        blocks[unit.id] = BlockInfo(lines, sketch.pack(rows) if several else None)
    return blocks


def _named(unit: WaitingUnit, error: DataError) -> DataError:
    return DataError(f"{unit.language} {unit.kind} {unit.symbol!r} has no vector: {error}")


def _points(units: Sequence[WaitingUnit], numbers: Ids, vectors: Vectors) -> Points:
    return Points(
        ids=numbers,
        vectors=vectors,
        files=np.array([unit.file for unit in units], np.int64),
        languages=[unit.language for unit in units],
        kinds=[unit.kind for unit in units],
    )
