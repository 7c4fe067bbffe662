"""What this machine can do: memory, drives and bandwidths, measured in seconds."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from polyzoo.core.io import atomic_write
from polyzoo.core.log import get_logger
from polyzoo.training import footprint
from polyzoo.training.drive import check_drive
from polyzoo.training.errors import TrainingError
from polyzoo.training.launch import Launch
from polyzoo.training.plan import MachineSpec
from polyzoo.training.strategies.host_adamw import HostAdamW, cache_folder
from polyzoo.training.strategies.hostmemory import HostMemory
from polyzoo.training.world import share_cores

if TYPE_CHECKING:
    from polyzoo.training.cli import ProbeConfig

logger = get_logger(__name__)

_OF_A_PRODUCT = 0.63  # of a large product's rate is what a whole transformer step reaches
_PRODUCT = 8192
_COPY = 256 * 2**20  # bytes
_FLAT = 32 * 2**20  # elements of the optimizer's trial
_PIECE = 8 * 2**20  # bytes of one direct read or write


def probe(config: ProbeConfig) -> MachineSpec:
    """Measure this machine, and keep the result for `plan` and strategy=auto."""
    found = measure(drive=config.nvme_path, drive_test_bytes=config.drive_test_mib * 2**20)
    with atomic_write(_record(), "w") as file:
        file.write(json.dumps(asdict(found), indent=1) + "\n")
    return found


def remembered() -> MachineSpec | None:
    """Return what was measured on this host before."""
    try:
        return MachineSpec(**json.loads(_record().read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _record() -> Path:
    return cache_folder() / f"machine-{socket.gethostname()}.json"


def describe(drive: Path | None = None) -> MachineSpec:
    """Return the machine's sizes without measuring speeds; these are as remembered, or typical."""
    known = remembered() or MachineSpec()
    gpus = torch.cuda.device_count()
    sizes = asdict(known) | {
        "gpus": max(gpus, 1),
        "nodes": 1,
        "gpu_bytes": float(torch.cuda.get_device_properties(0).total_memory) if gpus else 0.0,
        "host_bytes": float(footprint.total_bytes() or 0),
        "drive_bytes": float(shutil.disk_usage(drive).free) if drive and drive.is_dir() else 0.0,
    }
    return MachineSpec(**sizes)


def measure(*, drive: Path | None, drive_test_bytes: int) -> MachineSpec:
    """Measure everything that `plan` asks for.

    Args:
        drive: Folder to test direct reading and writing in; None leaves the drive out.
        drive_test_bytes: How much is written and read there.
    """
    values: dict[str, float] = {}
    try:
        values["host_memory"] = optimizer_bandwidth()
    except TrainingError as error:
        logger.warning("the host's optimizer step was not measured: %s", error)
    if torch.cuda.is_available():
        values["rate"] = _OF_A_PRODUCT * product_rate()
        values["link"] = values["node_link"] = link_bandwidth()
    if drive is not None:
        check_drive(drive, needed=drive_test_bytes)
        values["drive_write"], values["drive_read"] = drive_bandwidth(drive, drive_test_bytes)
    return MachineSpec(**asdict(describe(drive)) | values)  # pyright: ignore[reportArgumentType]


def optimizer_bandwidth(elements: int = _FLAT) -> float:
    """Return bytes a second of the host's optimizer step, with all cores."""
    memory = HostMemory()
    weights = memory.empty(elements, torch.float32, pinned=False).fill_(0.1)
    gradients = memory.empty(elements, torch.bfloat16, pinned=False).fill_(0.1)
    optimizer = HostAdamW([torch.zeros(1)], threads=share_cores(Launch()))

    def step() -> None:
        group = optimizer.param_groups[0]
        optimizer.update(weights, gradients, group=group, copy=gradients)

    return 28 * elements / _seconds(step)


def product_rate() -> float:
    """Return operations a second of a large bf16 product on random numbers."""
    a, b = (torch.randn(_PRODUCT, _PRODUCT, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * _PRODUCT**3 / _seconds(lambda: a @ b, repeats=10)


def link_bandwidth() -> float:
    """Return bytes a second from page-locked host memory to the GPU."""
    memory = HostMemory()
    source = memory.empty(_COPY, torch.uint8, pinned=True)
    target = torch.empty(_COPY, dtype=torch.uint8, device="cuda")
    try:
        return _COPY / _seconds(lambda: target.copy_(source, non_blocking=True))
    finally:
        memory.close()


def drive_bandwidth(folder: Path, size: int) -> tuple[float, float]:
    """Return bytes a second of writing and of reading past the page cache."""
    path = folder / f".bandwidth-{os.getpid()}"
    piece = mmap.mmap(-1, _PIECE)
    piece.write(os.urandom(_PIECE))
    count = max(1, size // _PIECE)
    direct = getattr(os, "O_DIRECT", 0)
    try:
        number = os.open(path, os.O_CREAT | os.O_WRONLY | direct, 0o600)
        begun = time.perf_counter()
        try:
            for _ in range(count):
                os.write(number, piece)
            os.fsync(number)
        finally:
            os.close(number)
        writing = time.perf_counter() - begun
        number = os.open(path, os.O_RDONLY | direct)
        begun = time.perf_counter()
        try:
            for _ in range(count):
                os.preadv(number, [piece], _PIECE * _)
        finally:
            os.close(number)
        reading = time.perf_counter() - begun
    finally:
        path.unlink(missing_ok=True)
    return count * _PIECE / writing, count * _PIECE / reading


def _seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Return the seconds of one call, after one to warm up."""

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    work()
    wait()
    begun = time.perf_counter()
    for _ in range(repeats):
        work()
    wait()
    return (time.perf_counter() - begun) / repeats


def render(spec: MachineSpec) -> str:
    """Return the machine as text for people."""
    gib = 2**30
    lines = [
        f"GPUs                {spec.gpus if spec.gpu_bytes else 0}"
        + (f", {spec.gpu_bytes / gib:.0f} GiB each" if spec.gpu_bytes else ""),
        f"host memory         {spec.host_bytes / gib:.0f} GiB",
        f"optimizer step      {spec.host_memory / 1e9:.0f} GB/s of host memory",
    ]
    if spec.gpu_bytes:
        lines += [
            f"host to GPU         {spec.link / 1e9:.0f} GB/s",
            f"training rate       {spec.rate / 1e12:.0f} TFLOP/s (estimated from a product)",
        ]
    if spec.drive_bytes:
        lines.append(
            f"drive               {spec.drive_bytes / gib:.0f} GiB free, "
            f"{spec.drive_read / 1e9:.1f} GB/s read, {spec.drive_write / 1e9:.1f} GB/s written"
        )
    return "\n".join([*lines, f"kept in {_record()}"])
