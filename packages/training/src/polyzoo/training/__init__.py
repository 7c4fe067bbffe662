"""The training engine behind every `polyzoo ... train` command. Importing it loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyzoo.core.lazy import attach

if TYPE_CHECKING:
    from polyzoo.training.config import CheckpointConfig as CheckpointConfig
    from polyzoo.training.config import DataConfig as DataConfig
    from polyzoo.training.config import EmaConfig as EmaConfig
    from polyzoo.training.config import LogConfig as LogConfig
    from polyzoo.training.config import LoraConfig as LoraConfig
    from polyzoo.training.config import OptimConfig as OptimConfig
    from polyzoo.training.config import ScheduleConfig as ScheduleConfig
    from polyzoo.training.config import TrainConfig as TrainConfig
    from polyzoo.training.errors import TrainingError as TrainingError
    from polyzoo.training.optim import ParamGroup as ParamGroup
    from polyzoo.training.step import StepContext as StepContext
    from polyzoo.training.step import StepOutput as StepOutput
    from polyzoo.training.trainer import Trainer as Trainer
    from polyzoo.training.trainer import TrainResult as TrainResult
    from polyzoo.training.weights import load_best as load_best

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "CheckpointConfig": ".config",
        "DataConfig": ".config",
        "EmaConfig": ".config",
        "LogConfig": ".config",
        "LoraConfig": ".config",
        "OptimConfig": ".config",
        "ParamGroup": ".optim",
        "ScheduleConfig": ".config",
        "StepContext": ".step",
        "StepOutput": ".step",
        "TrainConfig": ".config",
        "TrainResult": ".trainer",
        "Trainer": ".trainer",
        "TrainingError": ".errors",
        "load_best": ".weights",
    },
)
