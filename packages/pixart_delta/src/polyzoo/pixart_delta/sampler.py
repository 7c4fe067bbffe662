"""The order of training samples: one aspect-ratio bucket a batch, resumable, sharded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from polyzoo.core.errors import DataError
from polyzoo.core.log import get_logger
from polyzoo.core.seeding import item_generator

_log = get_logger(__name__)


class BucketSampler:
    """Batches of indices, each out of one bucket; a pure function of seed and epoch.

    Every sample comes at most once an epoch; what does not fill a batch is left out.

    Example:
        >>> BucketSampler(["1.0", "1.0", "0.5"], batch_size=2, seed=0).batches(epoch=0)
        [[1, 0]]
    """

    def __init__(
        self,
        keys: Sequence[str],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        min_per_bucket: int = 1,
        balanced: bool = False,
    ) -> None:
        """Sort samples into buckets.

        Args:
            keys: Bucket of each sample.
            batch_size: Samples of a batch.
            seed: Of the run.
            rank: Of this process; each gets the same number of other batches.
            world_size: Processes.
            min_per_bucket: Buckets with fewer samples are left out.
            balanced: Each bucket gives as many batches as the smallest one.

        Raises:
            DataError: No bucket fills a batch.
        """
        self.batch_size = batch_size
        self.seed = seed
        self.rank, self.world_size = rank, world_size
        self.balanced = balanced
        found: dict[str, list[int]] = defaultdict(list)
        for index, key in enumerate(keys):
            found[key].append(index)
        least = max(min_per_bucket, batch_size)
        self.buckets = {key: rows for key, rows in sorted(found.items()) if len(rows) >= least}
        left_out = len(keys) - sum(map(len, self.buckets.values()))
        if left_out:
            _log.info("%d of %d images are in buckets of fewer than %d", left_out, len(keys), least)
        if not self.per_rank:
            largest = max(map(len, found.values()), default=0)
            raise DataError(
                f"no batch can be made: batch_size={batch_size} on {world_size} processes, and the "
                f"largest of {len(found)} buckets has {largest} images; lower the batch size"
            )

    @property
    def per_rank(self) -> int:
        """Batches of an epoch in one process."""
        counts = [len(rows) // self.batch_size for rows in self.buckets.values()]
        if self.balanced and counts:
            counts = [min(counts)] * len(counts)
        return sum(counts) // self.world_size

    def batches(self, epoch: int) -> list[list[int]]:
        """The batches of this process in an epoch."""
        generator = item_generator(self.seed, epoch)
        made: list[list[int]] = []
        least = min(map(len, self.buckets.values()), default=0) // self.batch_size
        for rows in self.buckets.values():
            order = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
            count = least if self.balanced else len(rows) // self.batch_size
            made += [order[i * self.batch_size : (i + 1) * self.batch_size] for i in range(count)]
        order = torch.randperm(len(made), generator=generator).tolist()
        own = [made[i] for i in order][self.rank :: self.world_size]
        return own[: self.per_rank]


class BucketStream:
    """A dataset read in a sampler's order: an iterable that the training engine resumes exactly."""

    def __init__(self, dataset: Any, sampler: BucketSampler) -> None:
        self.dataset = dataset
        self.sampler = sampler
        self.epoch = 0
        self._next = 0

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch."""
        if epoch != self.epoch:
            self.epoch, self._next = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """How far this epoch has been read."""
        return {"epoch": self.epoch, "next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.epoch, self._next = state["epoch"], state["next"]

    def __iter__(self) -> Iterator[Any]:
        order = [index for batch in self.sampler.batches(self.epoch) for index in batch]
        start, self._next = self._next, self._next
        for position in range(start, len(order)):
            self._next = position + 1
            yield self.dataset[order[position]]
        self._next = 0
