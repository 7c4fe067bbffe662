"""Batches in an order that depends on the seed and the epoch alone, resumable at any sample."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from polyzoo.core.errors import ConfigError
from polyzoo.core.log import get_logger
from polyzoo.training.config import DataConfig
from polyzoo.training.errors import TrainingError
from polyzoo.training.loader import (
    Batch,
    Collate,
    IterableBatches,
    MapBatches,
    Place,
    epoch_order,
    place_of,
    settle_worker,
    take_as_is,
)
from polyzoo.training.movement import to_device
from polyzoo.training.signals import held_back

logger = get_logger(__name__)


@dataclass(slots=True)
class DataPosition:
    """How far the data has been consumed."""

    epoch: int = 0
    """From 0."""
    samples: int = 0
    """Consumed in this epoch; a map-style order is entered at exactly this index."""
    dataset: Any = None
    """What an iterable dataset's own `state_dict` said after the last consumed batch."""


class DataStream:
    """An endless stream of micro-batches over epochs, on one device.

    A dataset with `__len__` and `__getitem__` is read in the order of `loader.epoch_order`;
    whatever workers do, resuming at sample i gives the samples from i on. Any other iterable is
    read as it comes, by at most one worker: with `state_dict` and `load_state_dict` it resumes by
    them, without it is read again up to its position. `set_epoch(epoch)` is called where the
    dataset has it. With several processes (`rank` of `world`) each takes `batch_size` neighbouring
    samples of a joint micro-batch; positions count the samples of all.

    Example:
        >>> stream = DataStream(dataset, DataConfig(), batch_size=8, collate=None, seed=0)
        >>> step_batches = stream.take(4)
    """

    def __init__(
        self,
        dataset: Any,
        config: DataConfig,
        *,
        batch_size: int,
        collate: Collate | None,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.rank = rank
        self.world = world
        self.dataset = dataset
        self.config = config
        self.batch_size = batch_size
        self.collate = collate
        self.seed = seed
        self.device = torch.device(device)
        self.position = DataPosition()
        self.is_map = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        self._held: Batch | None = None
        self._batches: Iterator[Batch] | None = None
        if self.is_map:
            self._check_length(len(dataset))
        elif config.workers > 1:
            raise ConfigError(
                f"data.workers={config.workers}: an iterable dataset is read by 0 or 1 worker, "
                "because an order over several cannot be resumed exactly"
            )

    def _check_length(self, length: int) -> None:
        left_out = length % (self.batch_size * self.world) if self.config.drop_last else 0
        if length == left_out:
            raise TrainingError(
                "E-DATA-EMPTY",
                "an epoch has no batch",
                f"{length} samples, batch_size={self.batch_size} in {self.world} processes, "
                f"drop_last={self.config.drop_last}",
                "give more samples, a smaller batch_size, or set data.drop_last to false",
            )
        if left_out:
            logger.info("data.drop_last leaves out %d of %d samples per epoch", left_out, length)

    def steps_per_epoch(self, grad_accum: int) -> int:
        """Return the optimizer steps in one pass over the data."""
        if not self.is_map:
            raise ConfigError("epochs: the dataset has no length; set steps instead")
        batches, rest = divmod(len(self.dataset), self.batch_size * self.world)
        batches += 1 if rest and not self.config.drop_last else 0
        return -(-batches // grad_accum)

    def take(self, count: int) -> list[Batch]:
        """Return up to `count` micro-batches; fewer only at the end of an epoch."""
        taken: list[Batch] = []
        while len(taken) < count:
            batch = self._next()
            if taken and batch.epoch != taken[0].epoch:
                self._held = batch
                break
            taken.append(batch)
        last = taken[-1]
        self.position = DataPosition(last.epoch, last.start + last.samples, last.state)
        return [batch.with_data(to_device(batch.data, self.device)) for batch in taken]

    def fetch_again(self, epoch: int, start: int, samples: int) -> tuple[list[int], Any]:
        """Return sample indices and the very batch of a former position; map-style only."""
        order = epoch_order(len(self.dataset), self.seed, epoch, self.config.shuffle)
        indices = order[start : start + samples].tolist()
        reader = MapBatches(self.dataset, self.collate, self.seed)
        place = Place(epoch, start, samples, 0, samples, indices)
        return indices, reader[place].data

    def move_to(self, position: DataPosition) -> None:
        """Go on behind a position, as saved from `position`."""
        self.close()
        self.position = copy.deepcopy(position)

    def close(self) -> None:
        """Stop the workers."""
        self._batches = None
        self._held = None

    def _next(self) -> Batch:
        if self._held is not None:
            batch, self._held = self._held, None
            return batch
        if self._batches is None:
            self._batches = self._start()
        return next(self._batches)

    def _start(self) -> Iterator[Batch]:
        if self.is_map:
            reader: Any = MapBatches(self.dataset, self.collate, self.seed)
            order: Any = _Positions(self)
        else:
            reader = IterableBatches(
                self.dataset,
                self.collate,
                self.seed,
                batch_size=self.batch_size,
                drop_last=self.config.drop_last,
                start=(self.position.epoch, self.position.samples, self.position.dataset),
                rank=self.rank,
                world=self.world,
            )
            order = None
        loader = DataLoader(
            reader,
            batch_size=None,
            sampler=order,
            num_workers=self.config.workers,
            prefetch_factor=self.config.prefetch if self.config.workers else None,
            collate_fn=take_as_is,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=settle_worker,
            # Its own generator: starting the loader must not draw from the training's random state.
            generator=torch.Generator().manual_seed(self.seed),
        )
        # A signal that falls between a worker's start and its settling would end it.
        with held_back():
            return iter(loader)


class _Positions:
    """Walks this process's places from the stream's position on, without end."""

    def __init__(self, stream: DataStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Place]:
        stream = self.stream
        epoch, start = stream.position.epoch, stream.position.samples
        length = len(stream.dataset)
        everybody = stream.batch_size * stream.world
        while True:
            order = epoch_order(length, stream.seed, epoch, stream.config.shuffle)
            while start < length:
                place = place_of(
                    order, epoch, start,
                    batch_size=stream.batch_size, rank=stream.rank, world=stream.world,
                )  # fmt: skip
                if stream.config.drop_last and place.samples < everybody:
                    break
                yield place
                start += place.samples
            epoch, start = epoch + 1, 0
