"""A model's train command under every strategy, by flag only."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from polyzoo.training import LogConfig
from polyzoo.training.config import TierConfig
from support.ranks import together
from support.runs import logged
from support.sea_models import records

TORCH_ALONE = ("ddp", "fsdp2", "fsdp2-cpu")
WITH_DEEPSPEED = ("zero3", "zero3-opt-cpu", "zero3-cpu", "zero3-opt-nvme", "zero3-nvme")


def train_sea(folder: Path, data: Path, strategies: tuple[str, ...], rank: int) -> dict[str, Any]:
    """Train SEA's tiny preset in this process and another, once per strategy."""
    from polyzoo.sea.presets import PRESETS
    from polyzoo.sea.train import main

    losses: dict[str, Any] = {}
    for name in strategies:
        tiny = PRESETS["tiny"]()
        train = dataclasses.replace(
            tiny.train, run_dir=folder / name / "run", steps=3, batch_size=4, device="cpu",
            strategy=name, tier=TierConfig(nvme_path=folder / name / "drive"),
            log=LogConfig(every=1, progress=False, plots=False),
        )  # fmt: skip
        config = dataclasses.replace(
            tiny, train=train, out=folder / name / "model",
            data=dataclasses.replace(tiny.data, train=data),
        )  # fmt: skip
        try:
            main(config)
        except SystemExit as done:
            assert rank
            assert not done.code
        losses[name] = [value for _, value in logged(folder / name / "run")]
    return losses


def trained(folder: Path, strategies: tuple[str, ...]) -> dict[str, Any]:
    data = folder / "codebase.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records()))
    return together(
        lambda rank: train_sea(folder, data, strategies, rank), 2, folder / "ranks", timeout=250
    )[0]


def check(folder: Path, losses: dict[str, Any]) -> None:
    first, *others = losses.values()
    assert len(first) == 3
    for other in others:
        assert other == pytest.approx(first, rel=1e-3)
    for name in losses:
        assert (folder / name / "model" / "config.json").is_file(), "process 0 saves, alone"


def test_sea_in_two_processes(tmp_path: Path) -> None:
    check(tmp_path, trained(tmp_path, TORCH_ALONE))


@pytest.mark.deepspeed
def test_sea_in_every_zero3_tier(tmp_path: Path) -> None:
    check(tmp_path, trained(tmp_path, ("ddp", *WITH_DEEPSPEED)))
