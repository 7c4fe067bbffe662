"""What runs inside loader processes: from positions to collated batches, each with its own seed."""

from __future__ import annotations

import copy
import ctypes
import hashlib
import multiprocessing
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from polyzoo.training.errors import TrainingError

Collate = Callable[[list[Any]], Any]


class Batch(NamedTuple):
    """One micro-batch and where it stands. A tuple, so that torch's pinning sees through it."""

    epoch: int
    start: int
    """First sample of the micro-batch, those of all processes counted as one."""
    samples: int
    """Samples of all processes."""
    share: int
    """Samples of this process; 0 where an epoch's end leaves it without, `data` is then a copy."""
    state: Any
    data: Any

    def with_data(self, data: Any) -> Batch:
        """Return the same place with the data elsewhere."""
        return self._replace(data=data)


class Place(NamedTuple):
    """Which samples of an epoch a process reads for a micro-batch."""

    epoch: int
    start: int
    """First sample of the micro-batch over all processes."""
    samples: int
    """Samples of all processes."""
    offset: int
    """First of this process's samples, from `start`."""
    share: int
    """Samples of this process that count."""
    indices: list[int]
    """What it reads: its share, or one sample that does not count where it has none."""


def place_of(
    order: Tensor | range, epoch: int, start: int, *, batch_size: int, rank: int, world: int
) -> Place:
    """Return what a process reads of the micro-batch that begins at `start` of an epoch's order.

    Every process takes `batch_size` neighbours, so that two processes see what one would with twice
    the batch. At the end of an epoch the last ones may have fewer or none.
    """
    samples = min(batch_size * world, len(order) - start)
    offset = min(rank * batch_size, samples)
    share = min(batch_size, samples - offset)
    begin = start + offset if share else start
    chosen = order[begin : begin + max(share, 1)]
    indices = chosen.tolist() if isinstance(chosen, Tensor) else list(chosen)
    return Place(epoch, start, samples, offset, share, indices)


def epoch_order(length: int, seed: int, epoch: int, shuffle: bool) -> Tensor:
    """Return the sample indices of one epoch, in order."""
    if not shuffle:
        return torch.arange(length)
    generator = torch.Generator().manual_seed(_mix("order", seed, epoch))
    return torch.randperm(length, generator=generator)


class MapBatches:
    """Serves the batch of a position from a map-style dataset."""

    def __init__(self, dataset: Sequence[Any], collate: Collate | None, seed: int) -> None:
        self.dataset = dataset
        self.collate = collate or default_collate
        self.seed = seed
        self.epoch = -1

    def __getitem__(self, place: Place) -> Batch:
        epoch, start, indices = place.epoch, place.start, place.indices
        if epoch != self.epoch:
            _announce_epoch(self.dataset, epoch)
            self.epoch = epoch
        with _seeded(_mix("batch", self.seed, epoch, start + place.offset)):
            data = self.collate([self.dataset[index] for index in indices])
        return Batch(epoch, start, place.samples, place.share, None, data)


class IterableBatches(IterableDataset[Batch]):
    """Serves batches from an iterable dataset, epoch after epoch, from a position on."""

    def __init__(
        self,
        dataset: Any,
        collate: Collate | None,
        seed: int,
        *,
        batch_size: int,
        drop_last: bool,
        start: tuple[int, int, Any],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.rank = rank
        self.world = world
        self.dataset = dataset
        self.collate = collate or default_collate
        self.seed = seed
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.start = start

    def __iter__(self) -> Iterator[Batch]:
        first, consumed, state = self.start
        for epoch in count(first):
            _announce_epoch(self.dataset, epoch)
            samples = self._samples(consumed, state)
            yielded = consumed > 0
            for batch in self._batches(samples, epoch, consumed):
                yielded = True
                yield batch
            if not yielded:
                raise TrainingError(
                    "E-DATA-EMPTY",
                    f"epoch {epoch} has no batch",
                    f"the iterable dataset gave fewer than batch_size={self.batch_size} samples"
                    if self.drop_last
                    else "the iterable dataset gave no sample; was it an iterator, used up by now?",
                    "give a dataset that can be iterated once per epoch",
                )
            consumed, state = 0, None

    def _samples(self, consumed: int, state: Any) -> Iterator[Any]:
        if not consumed:
            return iter(self.dataset)
        if hasattr(self.dataset, "load_state_dict"):
            self.dataset.load_state_dict(copy.deepcopy(state))
            return iter(self.dataset)
        samples = iter(self.dataset)
        for done in range(consumed):
            if next(samples, _END) is _END:
                raise TrainingError(
                    "E-CKPT-DATA",
                    "the data position cannot be reached again",
                    f"{consumed} samples were used, the iterable dataset now ends after {done}",
                    "give the same data, or give the dataset state_dict and load_state_dict",
                )
        return samples

    def _batches(self, samples: Iterator[Any], epoch: int, start: int) -> Iterator[Batch]:
        while True:
            with _seeded(_mix("batch", self.seed, epoch, start)):
                # Every process reads all samples and keeps its own: exact for any number of them.
                everybody = self.batch_size * self.world
                items = [item for _, item in zip(range(everybody), samples, strict=False)]
                if not items or (self.drop_last and len(items) < everybody):
                    return
                place = place_of(
                    range(len(items)), epoch, 0,
                    batch_size=self.batch_size, rank=self.rank, world=self.world,
                )  # fmt: skip
                data = self.collate([items[index] for index in place.indices])
            has_state = hasattr(self.dataset, "state_dict")
            state = copy.deepcopy(self.dataset.state_dict()) if has_state else None
            yield Batch(epoch, start, len(items), place.share, state, data)
            start += len(items)


_END = object()


def take_as_is(batch: Any) -> Any:
    """Collate nothing: batches arrive collated."""
    return batch


def settle_worker(worker: int) -> None:
    """Make a loader process leave signals to the training process, and die with it.

    Terminals, `timeout` and Slurm signal the whole process group, but the step in flight still
    needs its data. The worker was started under `signals.held_back`, so nothing has come through.
    """
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGUSR1))
    _end_when_the_parent_asks()
    if sys.platform == "linux":
        # An orphan would hold the run folder's lock for seconds after its parent was killed.
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _end_when_the_parent_asks() -> None:
    """Heed SIGTERM from the training process alone.

    It is how torch ends a worker that is stuck, and how Python ends those left at exit: were it
    ignored, the exit would wait for ever.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not hasattr(signal, "sigwaitinfo"):
        # Without sigwaitinfo (macOS) senders cannot be told apart; a worker must stay mortal.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
        return
    asker = parent.pid

    def wait() -> None:
        # SIGTERM stays blocked in every thread, so that it comes here and nowhere else.
        while signal.sigwaitinfo((signal.SIGTERM,)).si_pid != asker:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    threading.Thread(target=wait, name="ending", daemon=True).start()


def _announce_epoch(dataset: Any, epoch: int) -> None:
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(epoch)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global random states for one batch, so that its draws do not depend on workers.

    In the training process they are put back afterwards: dropout draws from them.
    """
    inside_worker = get_worker_info() is not None
    states = None if inside_worker else _global_states()
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - datasets of third parties draw from it
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        if states is not None:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            torch.set_rng_state(states[2])


def _global_states() -> tuple[Any, Any, Tensor]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


def _mix(purpose: str, *numbers: int) -> int:
    digest = hashlib.blake2b(repr((purpose, *numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
