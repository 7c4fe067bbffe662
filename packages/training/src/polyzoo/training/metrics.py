"""Per-step numbers kept on the device until somebody wants to read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyzoo.core.errors import DataError
from polyzoo.training.loader import Batch
from polyzoo.training.step import StepOutput
from polyzoo.training.strategies.base import UpdateReport

Scalar = Tensor | float


class Weigher:
    """Turns micro-batch losses into one loss, as if the micro-batches had been one large batch.

    Each loss is multiplied by its weight relative to the first, over the number of micro-batches,
    so that the products keep the size of a mean (fp16 would overflow otherwise). The gradients are
    divided by the sum of these factors once it is known, after the last backward pass.

    Example:
        >>> weigher = Weigher(micro_batches=2)
        >>> (loss_a * weigher.factor(30)).backward()
        >>> (loss_b * weigher.factor(10)).backward()
        >>> for p in model.parameters():
        ...     p.grad /= weigher.divisor
    """

    def __init__(
        self, micro_batches: int, *, mean: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.micro_batches = micro_batches
        self.mean = mean
        """From a tensor to its mean over the processes, where there are several."""
        self.factors: list[Scalar] = []
        self._first: Scalar = 1.0

    def factor(self, weight: Scalar) -> Scalar:
        """Return what the next micro-batch's loss is multiplied by."""
        if isinstance(weight, Tensor):
            weight = weight.detach().float()
        elif not (weight >= 0 and math.isfinite(weight)):
            raise DataError(f"StepOutput.weight={weight} must be a finite number of at least 0")
        if self.mean is not None:
            return self._shared_factor(weight)
        if self.micro_batches == 1:
            self.factors.append(1.0)
            return 1.0
        if not self.factors:
            self._first = _or_one(weight)
        factor = weight / (self._first * self.micro_batches)
        self.factors.append(factor)
        return factor

    def _shared_factor(self, weight: Scalar) -> Scalar:
        """Return a factor relative to the processes' mean first weight, the same base for all."""
        if not self.factors:
            assert self.mean is not None  # noqa: S101 - asked for by the caller
            assert isinstance(weight, Tensor)  # noqa: S101 - so is a tensor on the device
            self._first = _or_one(self.mean(weight))
        factor = weight / (self._first * self.micro_batches)
        self.factors.append(factor)
        return factor

    @property
    def divisor(self) -> Scalar:
        """What summed gradients, losses and metrics are divided by."""
        return _or_one(sum(self.factors))

    def means(self, totals: Mapping[str, Scalar], device: torch.device) -> dict[str, Tensor]:
        """Return weighted means over micro-batches and processes, by name, in one exchange.

        Args:
            totals: Sums over this process's micro-batches of factor times value.
            device: Where the exchange happens.

        Returns:
            The means, and under "divisor" what summed gradients are to be divided by.
        """
        names = sorted(totals)
        values = [sum(self.factors), *(totals[name] for name in names)]
        stacked = torch.stack(
            [torch.as_tensor(v, device=device).float().reshape(()) for v in values]
        )
        if self.mean is not None:
            stacked = self.mean(stacked)
        divisor = _or_one(stacked[0])
        assert isinstance(divisor, Tensor)  # noqa: S101 - of a tensor comes a tensor
        means = dict(zip(names, (stacked[1:] / divisor).unbind(), strict=True))
        return {**means, "divisor": divisor}


def _or_one(value: Scalar) -> Scalar:
    if isinstance(value, Tensor):
        return torch.where(value > 0, value, torch.ones_like(value))
    return float(value) or 1.0


@dataclass(frozen=True, slots=True)
class StepRow:
    """The numbers of one optimizer step, possibly still on the device."""

    step: int
    batches: list[tuple[int, int, int]]
    """Epoch, first sample and number of samples of each micro-batch."""
    values: dict[str, Scalar]
    """loss, grad_norm, bad, tokens, and the step function's metrics under metric/."""


def step_row(
    step: int,
    batches: Sequence[Batch],
    outputs: Sequence[StepOutput],
    weigher: Weigher,
    loss: Tensor,
    report: UpdateReport,
    *,
    shared: Mapping[str, Scalar] | None = None,
) -> StepRow:
    """Return the row of a step; nothing is read from the device.

    Args:
        step: Counted from 1.
        batches: Its micro-batches.
        outputs: Of the step function.
        weigher: Of the step.
        loss: Of the whole step.
        report: Of the optimizer step.
        shared: Metrics and tokens over all processes, where there are several.
    """
    values: dict[str, Scalar] = {"loss": loss, "grad_norm": report.grad_norm, "bad": report.bad}
    if shared is not None:
        values.update(shared)
    else:
        counted = [output.tokens for output in outputs if output.tokens is not None]
        if counted:
            values["tokens"] = sum(counted)
        values.update(_weighted_metrics(outputs, weigher))
    places = [(batch.epoch, batch.start, batch.samples) for batch in batches]
    return StepRow(step, places, values)


_METRIC = "metric/"


def metric_totals(outputs: Sequence[StepOutput], weigher: Weigher) -> dict[str, Scalar]:
    """Return the step function's metrics as sums of factor times value, under metric/."""
    return {
        f"{_METRIC}{name}": sum(
            factor * output.metrics[name]
            for factor, output in zip(weigher.factors, outputs, strict=True)
        )
        for name in outputs[0].metrics
    }


def _weighted_metrics(outputs: Sequence[StepOutput], weigher: Weigher) -> dict[str, Scalar]:
    if len(outputs) == 1:
        return {f"{_METRIC}{name}": value for name, value in outputs[0].metrics.items()}
    totals = metric_totals(outputs, weigher)
    return {name: total / weigher.divisor for name, total in totals.items()}


@dataclass(frozen=True, slots=True)
class WindowSummary:
    """Means over the steps of a log window."""

    epoch: int
    loss: float
    grad_norm: float
    metrics: dict[str, float]


def _mean(name: str, rows: Sequence[StepRow]) -> float:
    numbers = [float(row.values[name]) for row in rows if name in row.values]
    # An overflown norm under fp16 is the loss scaler's business, not the curve's.
    finite = [number for number in numbers if math.isfinite(number)]
    return sum(finite) / len(finite) if finite else math.nan


class Window:
    """Rows since the last log line. Values cross to the host in one go, when asked for."""

    def __init__(self) -> None:
        self.rows: list[StepRow] = []
        self._pending: list[StepRow] = []

    def add(self, row: StepRow) -> None:
        """Keep a row whose values may still be on the device."""
        self._pending.append(row)

    def read(self) -> list[StepRow]:
        """Bring the rows added since the last reading to the host, and return these."""
        slots = [
            (row, name, value)
            for row in self._pending
            for name, value in row.values.items()
            if isinstance(value, Tensor)
        ]
        # One transfer per dtype and device instead of one per number.
        for kind in {(value.dtype, value.device) for _, _, value in slots}:
            chosen = [slot for slot in slots if (slot[2].dtype, slot[2].device) == kind]
            numbers = torch.stack([value.detach().reshape(()) for _, _, value in chosen]).tolist()
            for (row, name, _), number in zip(chosen, numbers, strict=True):
                row.values[name] = float(number)
        read, self._pending = self._pending, []
        self.rows += read
        return read

    def summary(self) -> WindowSummary:
        """Return means over the good rows read so far, and start anew."""
        rows, self.rows = self.rows, []
        good = [row for row in rows if not row.values["bad"]] or rows
        names = {name for row in good for name in row.values if name.startswith(_METRIC)}
        return WindowSummary(
            epoch=rows[-1].batches[-1][0],
            loss=_mean("loss", good),
            grad_norm=_mean("grad_norm", good),
            metrics={name.removeprefix(_METRIC): _mean(name, good) for name in sorted(names)},
        )

    def state(self) -> list[dict[str, Any]]:
        """Return the rows for a checkpoint; call after `read`."""
        return [
            {"step": row.step, "batches": [list(b) for b in row.batches], "values": row.values}
            for row in self.rows
        ]

    def load(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take back what `state` returned."""
        self.rows = [
            StepRow(row["step"], [tuple(b) for b in row["batches"]], dict(row["values"]))
            for row in rows
        ]
