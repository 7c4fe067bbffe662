"""A folder of checkpoints: each wholly there or not at all, verified, retained. Torch-free."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyzoo.core.errors import PolyzooError
from polyzoo.core.io import atomic_folder, remove_stale
from polyzoo.core.log import get_logger
from polyzoo.training.errors import TrainingError

FORMAT = 1
MANIFEST = "manifest.json"
COMPLETE = "COMPLETE"
LATEST = "latest"
_NAME = re.compile(r"step_(\d{8,})")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MOST_OF_DISK = 0.95  # file systems slow down or refuse in their last percents

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size and blake2b digest of a file of a checkpoint."""

    size: int
    blake2b: str


Written = Mapping[str, FileRecord]
Writer = Callable[[Path], tuple[Written, Mapping[str, Any]]]
"""Fills a folder; returns the digests it already knows, and entries for the manifest."""


class CheckpointStore:
    """The `checkpoints` folder of a run.

    Example:
        >>> store = CheckpointStore(Path("runs/a/checkpoints"), keep_last=2)
        >>> store.save(100, write)
        >>> store.newest()
        PosixPath('runs/a/checkpoints/step_00000100')
    """

    def __init__(self, folder: Path, *, keep_last: int = 2, keep_every: int | None = None) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.keep_every = keep_every

    def path(self, step: int) -> Path:
        """Return where the checkpoint of a step is kept."""
        return self.folder / f"step_{step:08d}"

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint folder, oldest first, damaged ones included."""
        names = [entry.name for entry in self.folder.glob("step_*")] if self.folder.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))

    def newest(self) -> Path | None:
        """Return the newest checkpoint, not yet verified; None where there is none."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def sweep(self) -> None:
        """Remove what a killed process left half written or removed; call under the lock."""
        if self.folder.is_dir():
            for stale in self.folder.glob(".*.tmp"):
                target = stale.name.removeprefix(".").split(".")[0]
                remove_stale(self.folder / target)

    def save(self, step: int, write: Writer, *, needed: int = 0) -> Path:
        """Write a checkpoint, then drop those that retention lets go.

        A crash at any moment leaves the earlier checkpoints as they were.

        Args:
            step: Names the folder; one that is already there is left alone.
            write: Fills the folder.
            needed: Bytes it is going to take, compared with the free space beforehand.

        Raises:
            TrainingError: E-DISK-FULL; nothing has changed.
        """
        target = self.path(step)
        if target.exists():
            return target
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_space(step, needed)
        with (
            explaining_full_disk(self, f"the checkpoint of step {step}"),
            atomic_folder(target) as folder,
        ):
            self._fill(folder, step, write)
        self._point_latest(target)
        self.retain()
        return target

    def _fill(self, folder: Path, step: int, write: Writer) -> None:
        known, entries = write(folder)
        files = {
            str(file.relative_to(folder)): file
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        records = {name: known.get(name) or record_of(file) for name, file in files.items()}
        manifest = {
            "format": FORMAT,
            "step": step,
            **entries,
            "files": {n: {"size": r.size, "blake2b": r.blake2b} for n, r in records.items()},
        }
        text = (json.dumps(manifest, indent=1) + "\n").encode()
        (folder / MANIFEST).write_bytes(text)
        # Last of all, and it seals the manifest, which seals the rest.
        (folder / COMPLETE).write_text(hashlib.blake2b(text).hexdigest() + "\n", encoding="ascii")

    def retain(self) -> None:
        """Remove the checkpoints that neither `keep_last` nor `keep_every` asks for."""
        for step in self.steps()[: -self.keep_last]:
            if not (self.keep_every and step % self.keep_every == 0):
                self.remove(step)

    def remove(self, step: int) -> None:
        """Remove a checkpoint; at no moment is half of it under its name."""
        path = self.path(step)
        doomed = path.with_name(f".{path.name}.removed.tmp")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints behind a step that the run has gone back to."""
        for later in [other for other in self.steps() if other > step]:
            logger.warning("removing %s: the run goes on from step %d", self.path(later), step)
            self.remove(later)

    def verified(self, step: int | None = None, *, hashes: bool = True) -> Path | None:
        """Return the newest checkpoint, or that of a step, once it has proved whole.

        Raises:
            TrainingError: E-CKPT-CORRUPT names the damage and the newest whole checkpoint;
                E-CKPT-NONE where the step asked for is not there.
        """
        if step is not None and step not in self.steps():
            there = ", ".join(map(str, self.steps())) or "none"
            raise TrainingError(
                "E-CKPT-NONE",
                f"{self.path(step)} does not exist",
                f"checkpoints here: {there}",
                "set checkpoint.from_step to one of them",
            )
        path = self.newest() if step is None else self.path(step)
        if path is None:
            return None
        fault = find_fault(path, hashes=hashes)
        if fault is None:
            return path
        good = [s for s in self.steps() if find_fault(self.path(s), hashes=True) is None]
        raise TrainingError(
            "E-CKPT-CORRUPT",
            f"{path} is damaged and was not used",
            fault,
            f"the newest whole checkpoint is {self.path(good[-1]).name}; resume from it with "
            f"checkpoint.from_step={good[-1]} (--checkpoint.from-step {good[-1]})"
            if good
            else "no whole checkpoint is left; restore one from a copy, or start in a new run_dir",
        )

    def _check_space(self, step: int, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if needed > free * _MOST_OF_DISK:
            raise _disk_full(
                self,
                f"the checkpoint of step {step}",
                f"{self.folder} has {free:,} bytes free, the checkpoint takes {needed:,}",
            )

    def _point_latest(self, target: Path) -> None:
        """Let the link `latest` name the newest checkpoint; for people, resuming ignores it."""
        link = self.folder / f".{LATEST}.{os.getpid()}.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        link.replace(self.folder / LATEST)


@contextmanager
def explaining_full_disk(store: CheckpointStore, what: str) -> Iterator[None]:
    """Turn a full disk inside the block into E-DISK-FULL, which says what is still there."""
    try:
        yield
    except TrainingError:
        raise
    except (OSError, PolyzooError) as error:
        cause = error.__cause__ if isinstance(error, PolyzooError) else error
        if isinstance(cause, OSError) and cause.errno in _DISK_FULL:
            raise _disk_full(store, what, str(error)) from error
        raise


def _disk_full(store: CheckpointStore, what: str, why: str) -> TrainingError:
    steps = store.steps()
    kept = f"checkpoint of step {steps[-1]} is untouched" if steps else "there is no earlier one"
    return TrainingError(
        "E-DISK-FULL",
        f"{what} could not be written; {kept}",
        why,
        "free some space or lower checkpoint.keep_last, then run the same command to resume",
    )


def record_of(file: Path) -> FileRecord:
    """Return size and digest of a file."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "blake2b").hexdigest()
    return FileRecord(file.stat().st_size, digest)


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint that `find_fault` found whole."""
    return json.loads((path / MANIFEST).read_bytes())


def find_fault(path: Path, *, hashes: bool = True) -> str | None:
    """Say what is wrong with a checkpoint; None if it is whole.

    Args:
        path: Its folder.
        hashes: Read and compare every byte, not only the sizes.
    """
    try:
        seal = (path / COMPLETE).read_text(encoding="ascii").strip()
        text = (path / MANIFEST).read_bytes()
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing: the folder was never completed"
    except (OSError, UnicodeDecodeError) as error:
        return f"{COMPLETE} or {MANIFEST} cannot be read: {error}"
    if hashlib.blake2b(text).hexdigest() != seal:
        return f"{MANIFEST} is not the one that was sealed"
    manifest = json.loads(text)
    if manifest["format"] != FORMAT:
        return f"its format is {manifest['format']}; this version reads {FORMAT}"
    for name, record in manifest["files"].items():
        fault = _file_fault(path / name, record, hashes=hashes)
        if fault:
            return f"{name}: {fault}"
    return None


def _file_fault(file: Path, record: Mapping[str, Any], *, hashes: bool) -> str | None:
    try:
        size = file.stat().st_size
        if size != record["size"]:
            return f"{size:,} bytes, {record['size']:,} were written"
        if hashes and record_of(file).blake2b != record["blake2b"]:
            return "its content has changed since it was written (blake2b differs)"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return None
