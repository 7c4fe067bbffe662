"""What happens to one process happens to all: signals, deaths, bad numbers, full disks."""

from __future__ import annotations

import dataclasses
import random
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polyzoo.training import CheckpointConfig, StepContext, StepOutput
from polyzoo.training.checkpoint.store import CheckpointStore
from support.ranks import Ranks, together
from support.runs import steps_logged
from support.tiers import Points, assert_close, tower_config, tower_step, train_tower


def unhurried(model: Any, batch: Mapping[str, Tensor], ctx: StepContext) -> StepOutput:
    time.sleep(0.03)
    return tower_step(model, batch, ctx)


def config_of(folder: Path, strategy: str = "ddp", **changes: Any) -> Any:
    """A run long enough to be hit, saved at every step."""
    checkpoint = CheckpointConfig(every=1, keep_last=3)
    return tower_config(folder, strategy, world=2, **{"checkpoint": checkpoint, **changes})


def test_a_signal_to_one_process_stops_all_and_the_run_goes_on(tmp_path: Path) -> None:
    steps = 6

    def straight(_: int) -> Any:
        return train_tower(config_of(tmp_path / "straight", "fsdp2", steps=steps))

    def stopped(_: int) -> Any:
        return train_tower(config_of(tmp_path / "run", "fsdp2", steps=steps), step_fn=unhurried)

    expected = together(straight, 2, tmp_path / "a")[0]
    ranks = Ranks(stopped, 2, tmp_path / "b")
    ranks.forks[1].until(lambda: steps_logged(tmp_path / "run") >= 2)
    ranks.forks[1].send(signal.SIGTERM)
    assert ranks.codes() == [75, 75]
    assert "the same command resumes" in ranks.forks[0].errors()
    resumed = together(stopped, 2, tmp_path / "c")[0]
    assert_close(resumed, expected, 0.0)


def test_a_dead_process_ends_the_others_and_nothing_is_lost(tmp_path: Path) -> None:
    def work(_: int) -> Any:
        return train_tower(config_of(tmp_path / "run", steps=500), step_fn=unhurried)

    ranks = Ranks(work, 2, tmp_path / "a")
    ranks.forks[0].until(lambda: steps_logged(tmp_path / "run") >= 3)
    ranks.forks[1].send(signal.SIGKILL)
    assert ranks.codes() == [1, -signal.SIGKILL]
    assert "E-PEER: another process of the run is gone" in ranks.forks[0].errors()
    assert CheckpointStore(tmp_path / "run" / "checkpoints").verified() is not None


def killed_while_saving(folder: Path, strategy: str, times: int) -> None:
    """Kill both processes at random moments; whatever is there must be whole, and go on."""
    store = CheckpointStore(folder / "run" / "checkpoints")
    generator = random.Random(strategy)
    reached = 0

    def work(_: int) -> Any:
        return train_tower(config_of(folder / "run", strategy, steps=100_000))

    for attempt in range(times):
        ranks = Ranks(work, 2, folder / f"kill{attempt}")
        goal = reached + 2
        ranks.forks[0].until(lambda goal=goal: (store.steps() or [0])[-1] >= goal)
        time.sleep(generator.random() * 0.05)
        for fork in ranks.forks:
            fork.send(signal.SIGKILL)
        ranks.codes()
        newest = store.verified()
        assert newest is not None
        assert store.steps()[-1] >= goal
        reached = store.steps()[-1]


def test_killed_while_saving(tmp_path: Path) -> None:
    killed_while_saving(tmp_path, "fsdp2", 2)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp2-cpu"])
def test_killed_while_saving_again_and_again(tmp_path: Path, strategy: str) -> None:
    killed_while_saving(tmp_path, strategy, 34)


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.parametrize("strategy", ["zero3-cpu", "zero3-nvme"])
def test_offloaded_killed_while_saving_again_and_again(tmp_path: Path, strategy: str) -> None:
    killed_while_saving(tmp_path, strategy, 10)


class Bad(Points):
    """One sample of the second process's share of the first step is not a number."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        point = super().__getitem__(index)
        return {**point, "y": point["y"] * float("nan")} if index == 5 else point


def test_a_bad_number_in_one_process_is_reported_once(tmp_path: Path) -> None:
    def work(_: int) -> Any:
        config = config_of(tmp_path / "run")
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, shuffle=False))
        return train_tower(config, train_data=Bad())

    ranks = Ranks(work, 2, tmp_path / "a")
    assert set(ranks.codes()) == {1}
    assert "E-NAN: step 1" in ranks.forks[0].errors()
    dumped = torch.load(tmp_path / "run" / "bad_batch_1.pt", weights_only=True)
    assert 5 in dumped["micro_batches"][0]["indices"]


class Short(Points):
    """Data that breaks in one process only."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == 7:
            raise OSError("sample 7 cannot be read")
        return super().__getitem__(index)


def test_a_failure_of_one_process_ends_all(tmp_path: Path) -> None:
    def work(_: int) -> Any:
        config = config_of(tmp_path / "run")
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, shuffle=False))
        return train_tower(config, train_data=Short())

    ranks = Ranks(work, 2, tmp_path / "a")
    assert all(ranks.codes())
    assert "sample 7 cannot be read" in ranks.forks[1].errors()
    assert "sample 7" not in ranks.forks[0].errors()
