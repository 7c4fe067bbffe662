"""Weights of a run for use elsewhere: the best ones so far, as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar, cast

from torch import nn

from polyzoo.core.errors import WeightsError
from polyzoo.core.weights import load_into, read_weights, write_weights
from polyzoo.training import lora

BEST = "best"
MODEL = "model.safetensors"

Module = TypeVar("Module", bound=nn.Module)


def save_best(run_dir: Path, model: nn.Module, *, step: int, metric: str, value: float) -> None:
    """Replace the best weights of a run; a crash leaves the old ones or the new ones."""
    about = {"step": str(step), "metric": metric, "value": repr(value)}
    folder = run_dir / BEST
    if lora.is_adapted(model):
        lora.write_adapter(folder, model, metadata=about)
    else:
        write_weights(folder / MODEL, model.state_dict(), metadata=about)


def load_best(run_dir: str | Path, model: Module) -> Module:
    """Give a model the best weights of a run, and return it.

    For a run with adapters, the model is the base or the adapted model; a base comes back adapted.

    Raises:
        WeightsError: The run has kept none, or they do not fit the model.

    Example:
        >>> model = load_best("runs/first", SeaModel(config))
    """
    folder = Path(run_dir) / BEST
    if (folder / lora.ADAPTER).is_file():
        return cast("Module", lora.read_adapter(folder, model))
    if not (folder / MODEL).is_file():
        raise WeightsError(
            f"{folder} holds no weights; they are kept when best_metric and an eval_fn are given"
        )
    load_into(model, read_weights(folder / MODEL), source=str(folder / MODEL))
    return model
