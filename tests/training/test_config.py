from __future__ import annotations

from pathlib import Path

import pytest

from polyzoo.core.config import dump, load
from polyzoo.core.errors import ConfigError
from polyzoo.training import (
    CheckpointConfig,
    DataConfig,
    EmaConfig,
    LogConfig,
    LoraConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)
from support.cli import run_python


def test_a_config_survives_the_disk() -> None:
    config = TrainConfig(
        run_dir=Path("runs/x"),
        epochs=3,
        lora=LoraConfig(targets=("q", "v")),
        optim=OptimConfig(name="torch.optim:SGD", options={"momentum": 0.9, "nesterov": True}),
    )
    assert load(TrainConfig, dump(config)) == config
    assert load(TrainConfig, {}) == TrainConfig()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TrainConfig(steps=3, epochs=1), "steps=3 and epochs=1"),
        (lambda: TrainConfig(steps=0), "steps=0 must be at least 1"),
        (lambda: TrainConfig(seed=-1), "seed=-1 must be 0 to 4294967295"),
        (lambda: TrainConfig(batch_size=0), "batch_size=0 must be at least 1"),
        (lambda: TrainConfig(grad_clip=0.0), r"grad_clip=0\.0 must be above 0"),
        (lambda: TrainConfig(grad_clip=float("nan")), "grad_clip=nan must be above 0"),
        (lambda: OptimConfig(lr=-1.0), r"lr=-1\.0 must be above 0"),
        (lambda: OptimConfig(betas=(0.9, 1.0)), r"betas=\(0\.9, 1\.0\)"),
        (lambda: OptimConfig(name="sgd"), "name='sgd' must be adamw or an import path"),
        (lambda: OptimConfig(options={"momentum": 1}), "are for optimizers given by import path"),
        (lambda: ScheduleConfig(warmup_fraction=2.0), r"warmup_fraction=2\.0 must be between"),
        (lambda: ScheduleConfig(warmup_steps=1, warmup_fraction=0.1), "same thing twice"),
        (lambda: CheckpointConfig(every=0), "every=0 must be at least 1"),
        (lambda: DataConfig(workers=-1), "workers=-1 must be at least 0"),
        (lambda: LogConfig(every=0), "every=0 must be at least 1"),
        (lambda: EmaConfig(decay=1.0), r"decay=1\.0 must lie in \[0, 1\)"),
        (lambda: LoraConfig(rank=0), "rank=0 must be at least 1"),
        (lambda: LoraConfig(targets=()), "adapts nothing"),
        (lambda: load(TrainConfig, {"optim": {"lrr": 1.0}}), r"optim\.lrr"),
        (lambda: load(TrainConfig, {"precision": "fp8"}), "precision"),
        (lambda: load(TrainConfig, {"steps": "9"}), "steps"),
    ],
)
def test_a_bad_value_is_named_with_its_rule(build, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


def test_configs_and_the_package_root_load_without_torch() -> None:
    code = (
        "import sys, polyzoo.training, polyzoo.training.config as c\n"
        "from polyzoo.training import TrainConfig, TrainingError\n"
        "assert TrainConfig is c.TrainConfig\n"
        "print('torch' in sys.modules)"
    )
    done = run_python(code)
    assert (done.stdout.strip(), done.returncode) == ("False", 0), done.stderr
