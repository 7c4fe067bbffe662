"""Few queries over many keys on the host: as fast as its memory, compiled for the CPU at hand.

Where a C++ compiler is installed, `host_decode.cpp` is compiled once and kept; elsewhere torch
does the same, several times slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyzoo.attention.api import attention
from polyzoo.attention.merge import merge_states
from polyzoo.core.io import atomic_path
from polyzoo.core.log import get_logger

logger = get_logger(__name__)

_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-w")
_CHANNELS = 16
_CHANNEL_LIMIT = 256
_TORCH_KEYS = 2048
_TASK_KEYS = 4096
"""Keys of one task of a thread: small against what a call has, so that all threads end together."""

State = tuple[Tensor, Tensor]


class _Job(ctypes.Structure):
    _fields_ = (  # as in the source
        ("q", ctypes.c_void_p),
        ("keys", ctypes.POINTER(ctypes.c_void_p)),
        ("values", ctypes.POINTER(ctypes.c_void_p)),
        ("lengths", ctypes.POINTER(ctypes.c_long)),
        ("strides", ctypes.POINTER(ctypes.c_long)),
        ("blocks", ctypes.c_long),
        ("pairs", ctypes.c_long),
        ("rows", ctypes.c_long),
        ("out", ctypes.c_void_p),
        ("top", ctypes.c_void_p),
        ("sum", ctypes.c_void_p),
        ("next", ctypes.c_long),
    )


@dataclass(frozen=True)
class KeyBlock:
    """Some keys and their values on the host."""

    k: Tensor
    """`(b, hk, m, d)`; the keys of a head are dense, and heads evenly spaced."""
    v: Tensor
    """`(b, hk, m, d)`, strided alike."""


class Pending:
    """A result that threads are working on."""

    def __init__(self, futures: Sequence[Future[Any]], finish: Callable[[], State]) -> None:
        self._futures = futures
        self._finish = finish

    def result(self) -> State:
        """Wait; returns the output `(b, h, n, d)` and the lse `(b, h, n)`, both fp32."""
        for future in self._futures:
            future.result()
        return self._finish()


class HostDecoder:
    """Attends on the CPU with threads of its own.

    Example:
        >>> decoder = HostDecoder()
        >>> out, lse = decoder.start(q, [KeyBlock(k, v)]).result()
    """

    def __init__(
        self, threads: int | None = None, *, native: bool | None = None, march: str = "native"
    ) -> None:
        """Start no thread yet.

        Args:
            threads: As many as the process has cores if left out.
            native: Use the compiled kernel; where possible if left out.
            march: What the compiler's option of that name gets; the CPU at hand.

        Raises:
            ValueError: `native=True` and there is no C++ compiler.
        """
        self.threads = threads or _cores()
        if native and _compiler() is None:
            raise ValueError(
                "native=True needs a C++ compiler (c++, g++ or clang++, or one named by the "
                "environment variable CXX), and there is none; install one or use native=None"
            )
        self._native = native
        self._march = march
        self._pool: ThreadPoolExecutor | None = None
        self._owner = os.getpid()

    def start(
        self, q: Tensor, blocks: Sequence[KeyBlock], *, scale: float | None = None
    ) -> Pending:
        """Begin to attend to every key of every block.

        Args:
            q: `(b, h, n, d)` on the CPU.
            blocks: At least one; of q's dtype.
            scale: Multiplies the scores; `d ** -0.5` if left out.

        Returns:
            Wait on its `result()`. The blocks must not change before.
        """
        if self._pool is None or self._owner != os.getpid():  # a fork has none of the threads
            self._owner = os.getpid()
            self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="host-decode")
        factor: float = q.shape[3] ** -0.5 if scale is None else scale
        library = None
        if self._native is not False and serves(q, blocks):
            library = _library(_ELEMENTS[q.dtype], q.shape[3], self._march)
        if library is None:
            future = self._pool.submit(_attend_with_torch, q, blocks, factor)
            return Pending([], future.result)
        blocks = [
            KeyBlock(k, v)
            for block in blocks
            for k, v in zip(
                block.k.split(_TASK_KEYS, dim=2), block.v.split(_TASK_KEYS, dim=2), strict=True
            )
        ]
        job = _NativeJob(q, blocks, factor)
        futures = [
            self._pool.submit(library.work, ctypes.byref(job.struct))
            for _ in range(min(self.threads, len(blocks) * q.shape[0] * blocks[0].k.shape[1]))
        ]
        return Pending(futures, job.finish)

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def serves(q: Tensor, blocks: Sequence[KeyBlock]) -> bool:
    """Tell whether the compiled kernel takes these tensors."""
    d = q.shape[3]
    dense = all(
        part.stride(3) == 1
        and part.stride(2) == d
        and (part.shape[0] == 1 or part.stride(0) == part.shape[1] * part.stride(1))
        and block.k.stride() == block.v.stride()
        for block in blocks
        for part in (block.k, block.v)
    )
    return (
        dense
        and q.dtype in _ELEMENTS
        and d % _CHANNELS == 0
        and d <= _CHANNEL_LIMIT
        and all(block.v.shape[3] == d for block in blocks)
    )


class _NativeJob:
    """The memory of one call, kept alive until it is finished."""

    def __init__(self, q: Tensor, blocks: Sequence[KeyBlock], scale: float) -> None:
        b, h, n, d = q.shape
        hk = blocks[0].k.shape[1]
        count, pairs, rows = len(blocks), b * hk, h // hk * n
        self.shape = (b, h, n, d)
        self.q = (q.float() * scale).reshape(pairs, rows, d).contiguous()
        self.blocks = blocks
        self.out = torch.empty(count, pairs, rows, d)
        self.top = torch.empty(count, pairs, rows)
        self.sum = torch.empty(count, pairs, rows)
        pointers, numbers = ctypes.c_void_p * count, ctypes.c_long * count
        self.struct = _Job(
            q=self.q.data_ptr(),
            keys=pointers(*(block.k.data_ptr() for block in blocks)),
            values=pointers(*(block.v.data_ptr() for block in blocks)),
            lengths=numbers(*(block.k.shape[2] for block in blocks)),
            strides=numbers(*(block.k.stride(1) for block in blocks)),
            blocks=count,
            pairs=pairs,
            rows=rows,
            out=self.out.data_ptr(),
            top=self.top.data_ptr(),
            sum=self.sum.data_ptr(),
            next=0,
        )

    def finish(self) -> State:
        """Join the states of the blocks."""
        highest = self.top.amax(dim=0)
        weights = torch.exp(self.top - highest)
        total = (weights * self.sum).sum(dim=0)
        out = torch.einsum("kpr,kprd->prd", weights, self.out) / total.unsqueeze(-1)
        return out.view(self.shape), (highest + total.log()).view(self.shape[:3])


@torch.no_grad()
def _attend_with_torch(q: Tensor, blocks: Sequence[KeyBlock], scale: float) -> State:
    """Do the same in fp32, some keys at a time so that they stay in the CPU's cache."""
    wide = q.float()
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for block in blocks:
        parts = (part.split(_TORCH_KEYS, dim=2) for part in (block.k, block.v))
        for k, v in zip(*parts, strict=True):
            out, lse = attention(
                wide, k.float(), v.float(), scale=scale, return_lse=True, backend="sdpa"
            )
            outs.append(out)
            lses.append(lse)
    return merge_states(outs, lses)


@lru_cache(maxsize=1)
def _compiler() -> str | None:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found is not None:
            return found
    return None


@lru_cache(maxsize=32)
def _library(element: int, dim: int, march: str) -> ctypes.CDLL | None:
    """Compile or find the kernel; None where that fails, which is told once."""
    compiler = _compiler()
    if compiler is None:
        logger.warning(
            "no C++ compiler: attention over keys on the host runs in torch, several times slower"
        )
        return None
    options = (*_FLAGS, f"-march={march}", f"-DELEMENT={element}", f"-DDIM={dim}")
    try:
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, timeout=60, check=True
        ).stdout
        parts = (_SOURCE.read_text(encoding="utf-8"), version, *options, _cpu())
        key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
        home = os.environ.get("POLYZOO_HOME")
        folder = (Path(home) if home else Path.home() / ".cache" / "polyzoo") / "host-decode"
        path = folder / f"{key}.so"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                subprocess.run(
                    [compiler, *options, str(_SOURCE), "-o", str(temporary)],
                    capture_output=True,
                    text=True,
                    timeout=120,
                    check=True,
                )
        library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        logger.warning("the host kernel could not be compiled (%s): torch serves instead", said)
        return None
    library.work.restype = None
    return library


def _cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu() -> str:
    """Name the CPU and what it can do: the kernel is compiled for exactly it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))})
    )
