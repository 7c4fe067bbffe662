"""Non-finite numbers: skipped or fatal, and in either case told with the batch that made them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from polyzoo.core.io import atomic_path
from polyzoo.core.log import get_logger
from polyzoo.training.checkpoint.state import Counters
from polyzoo.training.config import TrainConfig
from polyzoo.training.data import DataStream
from polyzoo.training.errors import TrainingError
from polyzoo.training.metrics import StepRow

logger = get_logger(__name__)

_MOST_OVERFLOWS = 30  # halvings of the loss scale, from 65,536 to below 0.0001


def check_rows(
    rows: Sequence[StepRow], config: TrainConfig, counters: Counters, data: DataStream
) -> None:
    """Count the bad steps among freshly read rows, and end the run where the policy says so.

    Raises:
        TrainingError: E-NAN with the first bad step; its batch is in run_dir/bad_batch_<step>.pt.
    """
    for row in rows:
        overflow = not row.values["bad"] and not math.isfinite(float(row.values["grad_norm"]))
        if overflow and counters.skipped_in_a_row < _MOST_OVERFLOWS:
            # The loss scaler has skipped the step and halved its scale: how fp16 finds its range.
            counters.skipped += 1
            counters.skipped_in_a_row += 1
            continue
        if not row.values["bad"] and not overflow:
            counters.skipped_in_a_row = 0
            counters.finite_loss = float(row.values["loss"])
            counters.finite_loss_step = row.step
            continue
        counters.skipped += 1
        counters.skipped_in_a_row += 1
        logger.warning(
            "step %d: loss %s, gradient norm %s",
            row.step,
            row.values["loss"],
            row.values["grad_norm"],
        )
        if overflow or config.nan_policy == "raise" or counters.skipped_in_a_row > config.max_skips:
            raise _not_finite(row, config, counters, data)


def _not_finite(
    row: StepRow, config: TrainConfig, counters: Counters, data: DataStream
) -> TrainingError:
    loss, norm = float(row.values["loss"]), float(row.values["grad_norm"])
    what = "loss" if not math.isfinite(loss) else "gradient norm"
    path = Path(config.run_dir) / f"bad_batch_{row.step}.pt"
    last_finite = "none"
    if counters.finite_loss is not None:
        last_finite = f"{counters.finite_loss:.6g} at step {counters.finite_loss_step}"
    policy = f"nan_policy={config.nan_policy}, max_skips={config.max_skips}"
    return TrainingError(
        "E-NAN",
        f"step {row.step}: the {what} is not finite (loss {loss:g}, gradient norm {norm:g})",
        f"{policy}; last finite loss: {last_finite}; {_dump(path, row, data)}",
        "look at that batch, lower optim.lr, set grad_clip, or use precision=bf16 or fp32; "
        "the last checkpoint is from before this step",
    )


def _dump(path: Path, row: StepRow, data: DataStream) -> str:
    """Keep the step's micro-batches for a look with torch.load, and say where."""
    if not data.is_map:
        places = ", ".join(f"epoch {e} samples {s} to {s + n - 1}" for e, s, n in row.batches)
        return f"its data: {places} (an iterable dataset cannot be read again for a dump)"
    micro_batches: list[dict[str, Any]] = []
    for epoch, start, samples in row.batches:
        indices, batch = data.fetch_again(epoch, start, samples)
        micro_batches.append({"epoch": epoch, "indices": indices, "batch": batch})
    with atomic_path(path) as temporary:
        torch.save({"step": row.step, "micro_batches": micro_batches}, temporary)
    return f"its batch is in {path}"
