"""A small model of blocks, and runs of it under any strategy, to be compared with one another."""

from __future__ import annotations

import dataclasses
import os
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
    StepContext,
    StepOutput,
    TrainConfig,
    Trainer,
)
from polyzoo.training.cli import ConvertConfig
from polyzoo.training.config import EmaConfig, ScheduleConfig, TierConfig
from polyzoo.training.convert import convert
from support.runs import logged

FEATURES, LENGTH, BATCH = 6, 44, 8


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Tower(nn.Module):
    """Blocks, a parameter of its own, a second method, a buffer, and a layer that is never used."""

    def __init__(self, width: int = 31, depth: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 1)
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("shift", torch.tensor(0.25))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x).sum(-1)

    def scaled(self, y: Tensor) -> Tensor:
        """Read a parameter of the model outside of forward."""
        return y * self.gain + self.shift


class Points:
    """Points of a plane; the last batch of an epoch is short."""

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        features = torch.randn(FEATURES, generator=torch.Generator().manual_seed(index))
        return {"x": features, "y": features.sum(), "weight": torch.tensor(1.0 + index % 3)}


def tower_step(model: Any, batch: Mapping[str, Tensor], ctx: StepContext) -> StepOutput:
    """A weighted mean, so that processes and micro-batches count differently."""
    y = ctx.call(model, "scaled", model(batch["x"]))
    error = y.float() - batch["y"]
    total = batch["weight"].sum()
    return StepOutput(
        loss=(error.square() * batch["weight"]).sum() / total,
        metrics={"mean": (error.abs() * batch["weight"]).sum() / total},
        weight=total,
        tokens=len(error),
    )


def tower_error(model: Any, ctx: StepContext) -> dict[str, Tensor]:
    x = torch.randn(32, FEATURES, generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        return {"error": (model.scaled(model(x)).float() - x.sum(1)).square().mean()}


def tower_config(run_dir: Path, strategy: str, *, world: int = 1, **changes: Any) -> TrainConfig:
    """Eight samples a micro-batch over all processes, two micro-batches a step."""
    config = TrainConfig(
        run_dir=run_dir,
        steps=6,
        batch_size=BATCH // world,
        grad_accum=2,
        device="cpu",
        precision="fp32",
        strategy=strategy,  # pyright: ignore[reportArgumentType]
        optim=OptimConfig(lr=0.02),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=1),
        ema=EmaConfig(decay=0.9),
        checkpoint=CheckpointConfig(every=3, keep_last=9),
        log=LogConfig(every=1, progress=False, plots=False),
        tier=TierConfig(nvme_path=run_dir / "drive", timeout=2),
    )
    return dataclasses.replace(config, **changes)


def train_tower(config: TrainConfig, **changes: Any) -> dict[str, Any]:
    """Train, and return what one run can be compared with another by."""
    arguments: dict[str, Any] = {
        "model": Tower, "step_fn": tower_step, "train_data": Points(), "eval_fn": tower_error,
    }  # fmt: skip
    result = Trainer(config).fit(**{**arguments, **changes}, everywhere=True)
    if int(os.environ.get("RANK", "0")):
        return {}
    return summary(Path(config.run_dir), result.metrics)


def summary(run_dir: Path, metrics: Mapping[str, float]) -> dict[str, Any]:
    return {
        "losses": [value for _, value in logged(run_dir)],
        "norms": [value for _, value in logged(run_dir, "grad_norm")],
        "means": [value for _, value in logged(run_dir, "mean")],
        "tokens": [value for _, value in logged(run_dir, "samples")],
        "error": metrics.get("error"),
    }


def weights_of(run_dir: Path, step: int, out: Path, *, average: bool = False) -> dict[str, Tensor]:
    """The whole weights of a checkpoint, whoever wrote it."""
    convert(ConvertConfig(run_dir=run_dir, out=out, step=step, average=average))
    return load_file(out)


def assert_close(one: Any, other: Any, tolerance: float) -> None:
    """Compare summaries, number by number."""
    for name in ("losses", "norms", "means", "tokens"):
        assert len(one[name]) == len(other[name]), name
        torch.testing.assert_close(
            torch.tensor(one[name]), torch.tensor(other[name]), rtol=tolerance, atol=1e-6
        )
    assert abs(one["error"] - other["error"]) <= tolerance * abs(other["error"])
