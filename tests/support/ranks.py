"""Several processes that train together, by fork, and what they report."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.forks import Fork

Work = Callable[[int], Any]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ranks:
    """Runs a function of the rank in every process, as torchrun would start them."""

    def __init__(self, work: Work, world: int, folder: Path, *, patience: float = 100) -> None:
        self.patience = patience
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        port = free_port()
        self.forks = [
            Fork(lambda rank=rank: self._run(work, rank, world, port), folder / f"stderr{rank}")
            for rank in range(world)
        ]

    def _run(self, work: Work, rank: int, world: int, port: int) -> None:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        # A process that waits for ever says where.
        faulthandler.dump_traceback_later(self.patience, exit=True, file=sys.stderr)
        (self.folder / f"result{rank}.json").write_text(json.dumps(work(rank)))

    def results(self, timeout: float = 120) -> list[Any]:
        """Wait for all, and return what each one's function returned."""
        codes = self.codes(timeout)
        assert codes == [0] * len(self.forks), [fork.errors()[-3000:] for fork in self.forks]
        return [
            json.loads((self.folder / f"result{rank}.json").read_text())
            for rank in range(len(self.forks))
        ]

    def codes(self, timeout: float = 120) -> list[int]:
        """Wait for all, and return their exit statuses."""
        deadline = time.monotonic() + timeout
        return [fork.wait(max(1.0, deadline - time.monotonic())) for fork in self.forks]


def together(work: Work, world: int, folder: Path, timeout: float = 120) -> list[Any]:
    """Run a function in `world` processes and return their results."""
    return Ranks(work, world, folder, patience=timeout - 20).results(timeout)
