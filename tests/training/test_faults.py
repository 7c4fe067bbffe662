"""What machines do to a run: kills and full disks."""

from __future__ import annotations

import dataclasses
import logging
import random
import resource
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

from polyzoo.training import CheckpointConfig, DataConfig
from polyzoo.training.checkpoint.store import CheckpointStore, find_fault
from support.forks import Fork
from support.runs import (
    assert_same_run,
    checkpoint_folder,
    fit,
    logged,
    slow,
    steps_logged,
    store_of,
    tiny_config,
)

# Python 3.12 and later warn of any fork beside threads; these children only train.
pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)

logger = logging.getLogger(__name__)


def _has_saved_more(store: CheckpointStore, reached: int) -> bool:
    return store.steps()[-1:] > [reached]


def _has_logged_more(run_dir: Path, done: int) -> bool:
    return steps_logged(run_dir) > min(done + 1, 10)


def test_killed_while_saving_again_and_again_the_run_always_resumes(tmp_path, request) -> None:
    """A child saves after every step; it is killed at a random moment; the next child goes on."""
    # What torch imports at a first step is imported here, once, and not in every child.
    fit(tiny_config(tmp_path / "warm", steps=1))
    kills = request.config.getoption("--kills")
    config = tiny_config(tmp_path / "run", steps=100_000)
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(every=1, keep_last=2))
    store = store_of(config)
    chance = random.Random(0)
    reached, inside = 0, 0
    for _ in range(kills):
        child = Fork(lambda: fit(config), tmp_path / "stderr")
        child.until(partial(_has_saved_more, store, reached))
        time.sleep(chance.uniform(0, 0.05))
        child.send(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        inside += any(entry.name.endswith(".tmp") for entry in store.folder.iterdir())
        # Every folder under its final name is whole, whenever the kill came.
        assert [step for step in store.steps() if find_fault(store.path(step))] == []
        assert store.steps()[-1] > reached
        reached = store.steps()[-1]
    logger.info("%d kills, %d of them inside a save, %d steps", kills, inside, reached)
    assert inside, "no kill fell into a save: the test has tested nothing"
    fit(dataclasses.replace(config, steps=reached + 2))
    assert [step for step, _ in logged(tmp_path / "run")] == list(range(1, reached + 3))
    left = {entry.name for entry in store.folder.iterdir()}
    assert left == {"latest", *(store.path(step).name for step in store.steps())}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_ends_where_a_quiet_run_ends(workers, tmp_path) -> None:
    data = DataConfig(workers=workers)
    quiet = tiny_config(tmp_path / "quiet", steps=12, data=data)
    fit(quiet)
    killed = dataclasses.replace(quiet, run_dir=tmp_path / "killed")
    for _ in range(4):
        more = partial(_has_logged_more, tmp_path / "killed", steps_logged(tmp_path / "killed"))
        child = Fork(lambda: fit(killed, step_fn=slow(0.02)), tmp_path / "stderr")
        child.until(more)
        child.send(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert Fork(lambda: fit(killed), tmp_path / "stderr").wait() == 0
    assert_same_run(tmp_path / "quiet", tmp_path / "killed", 12)


def test_a_file_size_limit_keeps_the_old_checkpoint(tmp_path) -> None:
    config = tiny_config(tmp_path / "run", steps=5)
    fit(dataclasses.replace(config, steps=2))
    old = checkpoint_folder(tmp_path / "run", 2)
    before = (old / "rank00000.safetensors").read_bytes()

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        fit(config)

    child = Fork(limited, tmp_path / "stderr")
    assert child.wait() == 1
    what, why, fix = child.errors().splitlines()
    assert what == (
        "E-DISK-FULL: the checkpoint of step 3 could not be written; "
        "checkpoint of step 2 is untouched"
    )
    assert "the file size limit was reached" in why
    assert "run the same command to resume" in fix
    assert (old / "rank00000.safetensors").read_bytes() == before
    assert not list(old.parent.glob(".*.tmp"))
    assert fit(config).step == 5


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 KiB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True) if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip("mounting a tmpfs needs root: run the tests as root to include this one")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("left", [0, 12_288], ids=["nothing left", "half a checkpoint left"])
def test_a_full_disk_keeps_the_old_checkpoint(left, small_disk, tmp_path) -> None:
    config = tiny_config(small_disk / "run", steps=5)
    fit(dataclasses.replace(config, steps=2))
    free = shutil.disk_usage(small_disk).free
    (small_disk / "ballast").write_bytes(bytes(free - left))
    child = Fork(lambda: fit(config), tmp_path / "stderr")
    assert child.wait() == 1
    assert child.errors().startswith("E-DISK-FULL: ")
    assert "checkpoint of step 2 is untouched" in child.errors()
    assert len(child.errors().splitlines()) == 3
    assert find_fault(checkpoint_folder(small_disk / "run", 2)) is None
    (small_disk / "ballast").unlink()
    assert fit(config).step == 5
