"""Child processes by fork: as real as any to kill, without an interpreter's start."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from polyzoo.core.errors import PolyzooError


class Fork:
    """Runs a function in a child that ends as the `polyzoo` command would."""

    def __init__(
        self, function: Callable[[], object], stderr: Path, *, own_group: bool = False
    ) -> None:
        self.stderr = stderr
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            # A fork has none of its parent's OpenMP threads, yet would wait for them.
            torch.set_num_threads(1)
            if own_group:
                os.setsid()
            os._exit(_ending(function, stderr))

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def send_to_group(self, number: signal.Signals) -> None:
        os.killpg(self.pid, number)

    @property
    def running(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is None

    def wait(self, timeout: float = 60) -> int:
        """Return the exit status, or minus the signal that ended it."""
        self.until(lambda: not self.running, timeout, may_end=True)
        assert self.code is not None
        return self.code

    def until(
        self, condition: Callable[[], bool], timeout: float = 60, *, may_end: bool = False
    ) -> None:
        """Wait until something is true of the world."""
        deadline = time.monotonic() + timeout
        while not condition():
            if not may_end and not self.running:
                raise AssertionError(f"the child ended with {self.code}: {self.errors()}")
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"nothing came of it in {timeout} s: {self.errors()}")
            time.sleep(0.002)

    def errors(self) -> str:
        return self.stderr.read_text() if self.stderr.is_file() else ""


def _ending(function: Callable[[], object], stderr: Path) -> int:
    with stderr.open("w") as file:
        sys.stderr = file
        try:
            function()
        except PolyzooError as error:
            file.write(f"{error}\n")
            return error.exit_code
        except KeyboardInterrupt:
            return 130
        except BaseException:
            traceback.print_exc(file=file)
            return 99
    return 0
