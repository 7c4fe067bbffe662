"""Learning-rate factors as pure functions of the step: nothing to save, nothing to lose."""

from __future__ import annotations

import math

from polyzoo.training.config import ScheduleConfig


def warmup_length(total_steps: int, config: ScheduleConfig) -> int:
    """Return the number of warm-up steps, however they were given."""
    return config.warmup_steps or round(config.warmup_fraction * total_steps)


def lr_factor(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """Return what the peak learning rate is multiplied by.

    Args:
        step: Optimizer steps already taken, from 0. Warm-up reaches 1 in its last step.
        total_steps: Of the whole run.
        config: Shape of the curve.

    Example:
        >>> lr_factor(5, 11, ScheduleConfig(kind="linear"))
        0.5454545454545454
    """
    warmup = warmup_length(total_steps, config)
    if step < warmup:
        return (step + 1) / warmup
    floor = config.final_fraction
    match config.kind:
        case "constant":
            return 1.0
        case "linear":
            return floor + (1 - floor) * (1 - _progress(step, warmup, total_steps))
        case "cosine":
            turn = math.cos(math.pi * _progress(step, warmup, total_steps))
            return floor + (1 - floor) * (1 + turn) / 2
        case "inverse_sqrt":
            return math.sqrt(max(warmup, 1) / (step + 1))
        case "wsd":
            start = max(warmup, total_steps - round(config.decay_fraction * total_steps))
            return floor + (1 - floor) * (1 - _progress(step, start, total_steps))


def _progress(step: int, start: int, end: int) -> float:
    """Return how much of start..end lies before this step, 0 to 1."""
    return min(1.0, max(0, step - start) / max(1, end - start))
