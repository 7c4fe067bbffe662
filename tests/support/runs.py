"""A training run small enough to repeat many times, and ways to compare two runs bit for bit."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from polyzoo.training import (
    CheckpointConfig,
    LogConfig,
    OptimConfig,
    ScheduleConfig,
    StepContext,
    StepOutput,
    TrainConfig,
    Trainer,
    TrainResult,
)
from polyzoo.training.checkpoint.store import CheckpointStore
from polyzoo.training.step import StepFn

FEATURES = 6


class Points:
    """Noisy points of a line in several dimensions; draws from all three global random states."""

    def __init__(self, length: int = 44) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        features = torch.randn(FEATURES, generator=torch.Generator().manual_seed(index))
        noise = 0.01 * random.random() + 0.01 * torch.rand(())
        return {"index": torch.tensor(index), "x": features, "y": features.sum() + noise}


class Regressor(nn.Module):
    """Everything that carries state: dropout, running statistics, a counter, a tied parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.2)
        self.middle = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.middle.weight
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.norm(self.first(x)).relu())
        return self.head(self.tied(self.middle(hidden).relu())).squeeze(-1)


def regression_step(model: nn.Module, batch: Mapping[str, Tensor], ctx: StepContext) -> StepOutput:
    noise = 0.01 * torch.randn(len(batch["y"]), generator=ctx.generator)
    error = model(batch["x"]).float() - batch["y"] + noise
    return StepOutput(loss=error.square().mean(), metrics={"worst": error.abs().max()})


def slow(pause: float) -> StepFn:
    """The same step, later."""

    def step(model: nn.Module, batch: Mapping[str, Tensor], ctx: StepContext) -> StepOutput:
        time.sleep(pause)
        return regression_step(model, batch, ctx)

    return step


def mean_error(model: nn.Module, ctx: StepContext) -> dict[str, Tensor]:
    x = torch.randn(32, FEATURES, generator=torch.Generator().manual_seed(99))
    return {"error": (model(x).float() - x.sum(1)).square().mean()}


def tiny_config(run_dir: Path, **changes: Any) -> TrainConfig:
    """A quiet run on the CPU that saves at every step and keeps everything."""
    config = TrainConfig(
        run_dir=run_dir,
        steps=10,
        batch_size=4,
        device="cpu",
        optim=OptimConfig(lr=0.02),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=2),
        checkpoint=CheckpointConfig(every=1, keep_last=1000),
        log=LogConfig(every=1, progress=False, plots=False),
    )
    return dataclasses.replace(config, **changes)


def fit(config: TrainConfig, **changes: Any) -> TrainResult:
    """Train the tiny model."""
    arguments: dict[str, Any] = {
        "model": Regressor,
        "step_fn": regression_step,
        "train_data": Points(),
    }
    return Trainer(config).fit(**{**arguments, **changes})


def logged(run_dir: Path, name: str = "loss", event: str = "train") -> list[tuple[int, float]]:
    """Step and value of every line of metrics.jsonl of one kind."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    chosen = [line for line in lines if line["event"] == event]
    return [(line["step"], line.get(name, line["metrics"].get(name))) for line in chosen]


def steps_logged(run_dir: Path) -> int:
    """Lines of metrics.jsonl, of a run that may not have begun."""
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def store_of(config: TrainConfig) -> CheckpointStore:
    return CheckpointStore(Path(config.run_dir) / "checkpoints")


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def everything_saved(run_dir: Path, step: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """All tensors of a checkpoint as bytes, and all plain state but the time it took."""
    folder = checkpoint_folder(run_dir, step)
    tensors = load_file(folder / "rank00000.safetensors")
    state = json.loads((folder / "rank00000.json").read_text())["state"]
    del state["counters"]["seconds"], state["counters"]["interruptions"]
    return {name: value.numpy().tobytes() for name, value in tensors.items()}, state


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Weights, averages, moments, random states, data position, counters, log lines agree."""
    tensors, state = everything_saved(one, step)
    other_tensors, other_state = everything_saved(other, step)
    assert other_state == state
    assert other_tensors.keys() == tensors.keys()
    assert [name for name in tensors if tensors[name] != other_tensors[name]] == []
    for event, name in (("train", "loss"), ("train", "worst"), ("train", "lr"), ("eval", "error")):
        assert logged(other, name, event) == logged(one, name, event)


def resumed_at(config: TrainConfig, step: int, run_dir: Path, **changes: Any) -> TrainResult:
    """Copy a run, go back to a step, and train on from there."""
    shutil.copytree(config.run_dir, run_dir, symlinks=True)
    checkpoint = dataclasses.replace(config.checkpoint, from_step=step)
    return fit(dataclasses.replace(config, run_dir=run_dir, checkpoint=checkpoint), **changes)
