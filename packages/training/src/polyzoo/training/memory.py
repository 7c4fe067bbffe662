"""Out of memory, said with the phase it happened in and what to try."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from polyzoo.training.config import TrainConfig
from polyzoo.training.errors import TrainingError

_CPU_REFUSALS = ("DefaultCPUAllocator", "not enough memory")


@contextmanager
def explaining_out_of_memory(
    phase: str, config: TrainConfig, device: torch.device
) -> Iterator[None]:
    """Turn an allocation failure inside the block into E-OOM with ordered advice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _explained(phase, config, device, error) from error
    except RuntimeError as error:
        if not any(text in str(error) for text in _CPU_REFUSALS):
            raise
        raise _explained(phase, config, device, error) from error


def _explained(
    phase: str, config: TrainConfig, device: torch.device, error: RuntimeError
) -> TrainingError:
    seen = str(error).splitlines()[0]
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        peak = torch.cuda.max_memory_allocated(device)
        seen += (
            f" (peak {peak / 2**30:.1f} GiB, free {free / 2**30:.1f} of {total / 2**30:.1f} GiB)"
        )
    advice = []
    if config.batch_size > 1:
        advice.append(
            f"batch_size={-(-config.batch_size // 2)} with grad_accum={config.grad_accum * 2} "
            "(same step, half the activations)"
        )
    if not config.activation_checkpointing:
        advice.append("activation_checkpointing=true")
    if device.type == "cuda" and config.precision == "fp32":
        advice.append("precision=bf16")
    if config.lora is None:
        advice.append("lora (trains adapters only)")
    return TrainingError(
        "E-OOM",
        f"out of memory on {device} in the {phase}",
        seen,
        "in this order: "
        + "; ".join([*advice, "a smaller model or shorter samples"])
        + "; the same command resumes from the last checkpoint",
    )
