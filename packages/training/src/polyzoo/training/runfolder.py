"""The folder of a run: one process at a time, one recipe, and a record of what made it."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from polyzoo.core.config import dump
from polyzoo.core.errors import LockedError
from polyzoo.core.io import FolderLock, atomic_write
from polyzoo.core.log import get_logger
from polyzoo.training.checkpoint.store import CheckpointStore
from polyzoo.training.config import FREE_ON_RESUME, TrainConfig
from polyzoo.training.errors import TrainingError

CONFIG = "config.json"
PROVENANCE = "run.json"
STATUS = "status.json"
CHECKPOINTS = "checkpoints"
_LOCK = ".lock"
_ORPHANS_LAST = 10.0  # seconds; torch's loader processes look for their parent every 5

logger = get_logger(__name__)


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep the run to one process.

    Loader processes inherit the lock; where their killed parent left some, they are given a few
    seconds to notice.

    Raises:
        LockedError: A living process is using the folder.
    """
    deadline = time.monotonic() + _ORPHANS_LAST
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(FolderLock(run_dir, purpose="training"))
                break
            except LockedError:
                if holder_lives(run_dir) or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield


def holder_lives(run_dir: Path) -> bool:
    """Tell whether the process named in the lock file exists, without taking the lock."""
    try:
        named = re.search(r"process (\d+)", (run_dir / _LOCK).read_text(encoding="utf-8"))
        if named is None:
            return False
        os.kill(int(named[1]), 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def open_store(config: TrainConfig) -> CheckpointStore:
    """Return the run's checkpoints."""
    return CheckpointStore(
        Path(config.run_dir) / CHECKPOINTS,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
    )


def choose_checkpoint(config: TrainConfig, store: CheckpointStore) -> Path | None:
    """Return the verified checkpoint to resume from; None starts anew.

    Raises:
        TrainingError: E-RUN-EXISTS, E-CKPT-NONE, E-CKPT-CORRUPT or E-CKPT-MISMATCH (recipe).
    """
    steps = store.steps()
    if config.resume == "never" and steps:
        raise TrainingError(
            "E-RUN-EXISTS",
            f"{config.run_dir} already holds a run (checkpoint of step {steps[-1]})",
            "resume=never starts only in a folder without checkpoints",
            "choose another run_dir, or go on with resume=auto",
        )
    if not steps and (config.resume == "must" or config.checkpoint.from_step is not None):
        raise TrainingError(
            "E-CKPT-NONE",
            f"{config.run_dir} holds no checkpoint to resume from",
            f"resume={config.resume}, checkpoint.from_step={config.checkpoint.from_step}",
            "check run_dir, or start with resume=auto",
        )
    path = store.verified(config.checkpoint.from_step, hashes=config.checkpoint.verify)
    if path is not None:
        _check_recipe(config)
    return path


def _check_recipe(config: TrainConfig) -> None:
    stored = Path(config.run_dir) / CONFIG
    if not stored.is_file():
        return
    before, now = _flat(json.loads(stored.read_bytes())), _flat(dump(config))
    changes = [
        f"{name}: {before.get(name)!r} then, {now.get(name)!r} now"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name) and not _is_free(name)
    ]
    if not changes:
        return
    if config.accept_changes:
        logger.warning("resuming with a changed recipe: %s", "; ".join(changes))
        return
    raise TrainingError(
        "E-CKPT-MISMATCH",
        f"{config.run_dir} was started with another recipe ({len(changes)} differences)",
        "; ".join(changes[:10]),
        "restore these values, choose another run_dir, or set accept_changes",
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and name != "options":
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def _is_free(name: str) -> bool:
    return name in FREE_ON_RESUME or name.split(".")[0] in FREE_ON_RESUME


def write_provenance(config: TrainConfig, facts: Mapping[str, Any]) -> None:
    """Write config.json and run.json beside the outputs."""
    run_dir = Path(config.run_dir)
    _write_json(run_dir / CONFIG, dump(config))
    record = {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": _versions(),
        "git": {
            "polyzoo": _git_revision(Path(__file__).parent),
            "working_folder": _git_revision(Path.cwd()),
        },
        **facts,
    }
    _write_json(run_dir / PROVENANCE, record)


def write_status(run_dir: Path, state: str, *, step: int, total_steps: int, note: str = "") -> None:
    """Say how the run stands: running, finished, interrupted or failed."""
    status = {"state": state, "step": step, "total_steps": total_steps, "note": note}
    _write_json(run_dir / STATUS, {**status, "time": round(time.time(), 3)})


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with atomic_write(path, "w") as file:
        file.write(json.dumps(values, indent=2) + "\n")


def _versions() -> dict[str, str]:
    names = ("polyzoo-core", "polyzoo-training", "torch", "numpy", "safetensors", "peft")
    versions: dict[str, str] = {}
    for name in (*names, "transformers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _git_revision(folder: Path) -> str | None:
    """Return the commit of the repository around a folder, marked where files differ from it."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments],
                capture_output=True, text=True, timeout=10, check=True,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    revision = git("rev-parse", "HEAD")
    if revision is None:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{revision} with changes" if changed else revision
