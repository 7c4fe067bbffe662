"""What a run says while it runs: metrics.jsonl, TensorBoard, progress on stderr."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from polyzoo.core.io import atomic_write
from polyzoo.core.lazy import import_extra
from polyzoo.core.log import progress
from polyzoo.training.config import LogConfig

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


def read_events(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of metrics.jsonl; a line cut short by a crash ends it."""
    path = run_dir / METRICS
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                return


class RunLog:
    """Writes the events of a run from a step on; later ones of an earlier attempt are dropped.

    Example:
        >>> with RunLog(run_dir, LogConfig(), step=0, total_steps=100) as log:
        ...     log.train(step=10, values={"loss": 0.5, "lr": 1e-3}, metrics={})
    """

    def __init__(self, run_dir: Path, config: LogConfig, *, step: int, total_steps: int) -> None:
        self.run_dir = run_dir
        self.config = config
        self.step = step
        self.total_steps = total_steps
        self._board: Any = None

    def __enter__(self) -> Self:
        self._drop_later_events()
        self._file = (self.run_dir / METRICS).open("a", encoding="utf-8")
        if self.config.tensorboard:
            board = import_extra("torch.utils.tensorboard", install="polyzoo-training[tensorboard]")
            self._board = board.SummaryWriter(
                str(self.run_dir / TENSORBOARD), purge_step=self.step + 1
            )
        self._bar = progress(
            total=self.total_steps,
            description=self.run_dir.name,
            unit="step",
            quiet=not self.config.progress,
        )
        # The rate and the time left count from here, not from steps of an earlier process.
        self._bar.initial = self._bar.n = self.step
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        with suppress(OSError):  # each line was flushed when written, which told of a full disk
            self._file.close()
        if self._board:
            self._board.close()

    def train(
        self, *, step: int, values: Mapping[str, float], metrics: Mapping[str, float]
    ) -> None:
        """Write the means of a log window, and show them."""
        self._write("train", step, values, metrics)
        self._bar.set_postfix_str(_postfix(values), refresh=False)
        self._bar.n = step
        self._bar.refresh()

    def evaluation(self, *, step: int, metrics: Mapping[str, float]) -> None:
        """Write the result of an evaluation."""
        self._write("eval", step, {}, metrics)

    def _write(
        self, event: str, step: int, values: Mapping[str, float], metrics: Mapping[str, float]
    ) -> None:
        line = {
            "event": event,
            "step": step,
            **{name: _json_number(value) for name, value in values.items()},
            "metrics": {name: _json_number(value) for name, value in metrics.items()},
            "time": round(time.time(), 3),
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board:
            for name, value in {**values, **metrics}.items():
                self._board.add_scalar(f"{event}/{name}", value, step)

    def _drop_later_events(self) -> None:
        """Remove what an earlier process logged after its last checkpoint: it will happen again."""
        kept = [event for event in read_events(self.run_dir) if event["step"] <= self.step]
        with atomic_write(self.run_dir / METRICS, "w") as file:
            file.writelines(json.dumps(event) + "\n" for event in kept)


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _postfix(values: Mapping[str, float]) -> str:
    unit = "tokens" if "tokens_per_second" in values else "samples"
    rate = values[f"{unit}_per_second"]
    return f"loss {values['loss']:.4g}, lr {values['lr']:.2e}, {rate:,.0f} {unit}/s"
