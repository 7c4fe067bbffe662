"""The processes that train together: agreement, sums, and what only one of them does."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

from polyzoo.core.errors import PolyzooError
from polyzoo.core.log import get_logger
from polyzoo.training.errors import TrainingError
from polyzoo.training.launch import Launch

Result = TypeVar("Result")
logger = get_logger(__name__)


class World:
    """All processes of a run as seen from one of them; with one process everything is local.

    Example:
        >>> world = World(Launch(), grouped=False)
        >>> world.any(False)
        False
    """

    def __init__(self, launch: Launch, *, grouped: bool) -> None:
        self.launch = launch
        self.rank = launch.rank
        self.size = launch.world_size
        self.grouped = grouped
        """Whether torch's process group is up."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs, plots and manifests."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is set in any process; through host memory, no GPU waits."""
        if self.size == 1:
            return flag
        votes = torch.tensor([int(flag)], dtype=torch.int32)
        with explaining_lost_peers():
            dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item())

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over processes; `values` is on the device and is not changed."""
        return values if self.size == 1 else self.total(values.clone()) / self.size

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over processes, in place."""
        if self.size > 1:
            with explaining_lost_peers():
                dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with explaining_lost_peers():
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return process 0's value."""
        if self.size == 1:
            return value
        box = [value]
        with explaining_lost_peers():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def barrier(self) -> None:
        """Wait for all processes."""
        self.any(False)

    def main_only(self, function: Callable[[], Result]) -> Result:
        """Return what the function returns in process 0, which alone calls it.

        An error of process 0 ends the others quietly, so that one message is printed.
        """
        if self.size == 1:
            return function()
        failure: BaseException | None = None
        outcome: tuple[Any, int | None] = (None, None)
        if self.is_main:
            try:
                outcome = (function(), None)
            except Exception as error:
                failure = error
                outcome = (None, error.exit_code if isinstance(error, PolyzooError) else 1)
        result, code = self.broadcast(outcome)
        if failure is not None:
            raise failure
        if code is not None:
            raise SystemExit(code)
        return result

    def agree(self, error: Exception | None) -> None:
        """Raise in all processes where one has failed; only the first of these says why."""
        if self.size == 1:
            if error is not None:
                raise error
            return
        code = None if error is None else getattr(error, "exit_code", 1)
        codes = self.gather(code)
        first = next((rank for rank, code in enumerate(codes) if code is not None), None)
        if first is None:
            return
        if first == self.rank and error is not None:
            raise error
        raise SystemExit(codes[first])

    def check_same(self, what: str, value: str) -> None:
        """Refuse to go on where the processes hold different values.

        Raises:
            TrainingError: E-WORLD names the values by rank.
        """
        values = self.gather(value)
        if len(set(values)) == 1:
            return
        error = TrainingError(
            "E-WORLD",
            f"the processes disagree about {what}",
            "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(values[:8])),
            "start every process with the same command and the same files",
        )
        if self.is_main:
            raise error
        raise SystemExit(error.exit_code)


@contextmanager
def explaining_lost_peers() -> Iterator[None]:
    """Turn a failed exchange into E-PEER."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not is_lost_peer(error):
            raise
        raise TrainingError(
            "E-PEER",
            "another process of the run is gone or stuck",
            str(error).splitlines()[0][:300],
            "look at the first error of the other processes; the same command resumes from the "
            "last checkpoint",
        ) from error


_LOST = (
    "Connection closed by peer", "Connection reset", "Timed out waiting", "Broken pipe",
    "NCCL", "Socket Timeout", "timed out", "wait timeout", "Application timeout",
)  # fmt: skip


def is_lost_peer(error: BaseException) -> bool:
    """Tell whether an error says that an exchange between processes has failed."""
    return isinstance(error, dist.DistBackendError | dist.DistError) or any(
        text in str(error) for text in _LOST
    )


@contextmanager
def joined(launch: Launch, device: torch.device, *, alone: bool, minutes: float) -> Iterator[World]:
    """Bring up torch's process group where it is needed, and take it down again.

    A group that the caller has brought up is used and left alone.

    Args:
        launch: The place of this process.
        device: Of this process.
        alone: Whether a single process needs a group, too (FSDP2, ZeRO).
        minutes: Longest wait for another process.
    """
    if dist.is_initialized():
        yield World(launch, grouped=True)
        return
    if launch.world_size == 1 and not alone:
        yield World(launch, grouped=False)
        return
    # Sums of host tensors (offloaded gradients, flags) need gloo beside NCCL.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(minutes=minutes)
    if launch.world_size == 1:
        dist.init_process_group(
            backend,
            store=dist.HashStore(),  # pyright: ignore[reportPrivateImportUsage]
            rank=0,
            world_size=1,
            timeout=limit,
        )
    else:
        with explaining_lost_peers():
            dist.init_process_group(
                backend,
                store=_meet(launch, limit),
                rank=launch.rank,
                world_size=launch.world_size,
                timeout=limit,
            )
    try:
        yield World(launch, grouped=True)
    finally:
        if "deepspeed" in sys.modules:
            # It keeps its own references to the group, for as long as the process lives.
            atexit.register(_leave)
        else:
            _leave()


_MEETINGS = count()


def _meet(launch: Launch, limit: timedelta) -> c10d.Store:
    """Return the store where the processes find each other.

    A later run in the same processes meets in the same place, where the former one's addresses are
    still written: each gets a name of its own.
    """
    place = f"tcp://{launch.address}:{launch.port}" if launch.launcher == "slurm" else "env://"
    store, *_ = next(
        dist.rendezvous(place, rank=launch.rank, world_size=launch.world_size, timeout=limit)  # pyright: ignore[reportPrivateImportUsage]
    )
    store.set_timeout(limit)
    return c10d.PrefixStore(f"polyzoo{next(_MEETINGS)}", store)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def share_cores(launch: Launch) -> int:
    """Return the number of cores that are this process's share of its node.

    Launchers set OMP_NUM_THREADS=1 by themselves, so that variable says nothing.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (available or 1) // launch.local_world_size)
