"""A run's checkpoint as one safetensors file that anything can read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from polyzoo.core.errors import DataError
from polyzoo.core.weights import write_weights
from polyzoo.training.checkpoint.flat import BUFFER, EMA, MASTER, FlatReader
from polyzoo.training.checkpoint.store import CheckpointStore
from polyzoo.training.runfolder import CHECKPOINTS

if TYPE_CHECKING:
    from polyzoo.training.cli import ConvertConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertReport:
    """What was written."""

    out: str
    step: int
    tensors: int
    parameters: int
    source: str
    """weights, or average."""


def convert(config: ConvertConfig) -> ConvertReport:
    """Put the weights of a checkpoint together, whatever strategy and number of processes wrote it.

    Raises:
        DataError: There is no checkpoint, or no average in it.
        TrainingError: The checkpoint is damaged.
    """
    store = CheckpointStore(Path(config.run_dir) / CHECKPOINTS)
    path = store.verified(config.step)
    if path is None:
        raise DataError(f"{config.run_dir} holds no checkpoint")
    reader = FlatReader(path)
    averaged = set(reader.names(EMA))
    if config.average and not averaged:
        raise DataError(f"{path} holds no average; leave out --average")
    dtype = _DTYPES[config.dtype]
    tensors: dict[str, torch.Tensor] = {}
    for name in reader.names(MASTER):
        state = EMA if config.average and name in averaged else MASTER
        tensors[name] = reader.tensor(state, name).to(dtype)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    tensors |= {name: reader.tensor(BUFFER, name) for name in reader.names(BUFFER)}
    step = int(path.name.removeprefix("step_"))
    source = "average" if config.average else "weights"
    write_weights(config.out, tensors, metadata={"step": str(step), "source": source})
    return ConvertReport(
        out=str(config.out), step=step, tensors=len(tensors), parameters=parameters, source=source
    )
