"""The folder that the nvme strategies write to: is it there, local, writable, large enough?"""

from __future__ import annotations

import mmap
import os
import shutil
from pathlib import Path

from polyzoo.core.log import get_logger
from polyzoo.training.errors import TrainingError

MOST_OF_DRIVE = 0.95
_REMOTE = {"nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "lustre", "ceph", "9p", "virtiofs"}
_BLOCK = 4096

logger = get_logger(__name__)


def check_drive(folder: Path, *, needed: int = 0) -> None:
    """Refuse a folder that offloading to would fail in, or be very slow.

    Args:
        folder: Is made where it is missing.
        needed: Bytes that will be written, compared with the free space.

    Raises:
        TrainingError: E-NVME-PATH or E-NVME-SPACE.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _path_error(folder, f"it cannot be made: {error.strerror}") from error
    kind = file_system(folder)
    if kind in _REMOTE:
        raise _path_error(folder, f"it is on a network file system ({kind})")
    if kind == "overlay":
        logger.warning("%s is on an overlay file system: mount a local drive instead", folder)
    _try_direct_write(folder)
    free = shutil.disk_usage(folder).free
    if needed > free * MOST_OF_DRIVE:
        raise TrainingError(
            "E-NVME-SPACE",
            f"{folder} has too little space for the optimizer and parameters",
            f"{needed:,} bytes are needed, {free:,} are free ({MOST_OF_DRIVE:.0%} may be used)",
            "free some space, set tier.nvme_path to a larger drive, use more nodes, or "
            "zero3-opt-nvme (2 bytes a parameter less) or zero3-cpu if the host has the memory",
        )


def _try_direct_write(folder: Path) -> None:
    """Write one block past the page cache, as the offload engine does."""
    probe = folder / f".probe-{os.getpid()}"
    block = mmap.mmap(-1, _BLOCK)  # aligned, as direct writes need
    try:
        number = os.open(probe, os.O_CREAT | os.O_WRONLY | getattr(os, "O_DIRECT", 0), 0o600)
        try:
            os.write(number, block)
        finally:
            os.close(number)
    except OSError as error:
        raise _path_error(folder, f"a direct write was refused: {error.strerror}") from error
    finally:
        probe.unlink(missing_ok=True)


def _path_error(folder: Path, why: str) -> TrainingError:
    return TrainingError(
        "E-NVME-PATH",
        f"{folder} cannot be used for offloading",
        why,
        "set tier.nvme_path to a folder on a local NVMe drive with ext4 or xfs",
    )


def file_system(folder: Path) -> str | None:
    """Return the type of the file system a folder is on; None where the OS is mute."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    target = str(folder.resolve())
    best: tuple[int, str | None] = (-1, None)
    for line in lines:
        left, _, right = line.partition(" - ")
        point = left.split()[4].replace("\\040", " ")
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= best[0]:
            best = (len(point), right.split()[0])
    return best[1]
