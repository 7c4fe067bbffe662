"""The training loop: evaluate, save, step, until the last step or a signal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from polyzoo.core.errors import Interrupted
from polyzoo.core.log import get_logger
from polyzoo.core.seeding import capture_random_state
from polyzoo.training.checkpoint.snapshot import Snapshots
from polyzoo.training.checkpoint.state import Counters, RunState
from polyzoo.training.config import TrainConfig
from polyzoo.training.data import DataStream
from polyzoo.training.ema import Ema
from polyzoo.training.evaluation import Evaluator
from polyzoo.training.events import RunLog
from polyzoo.training.health import check_rows
from polyzoo.training.loader import Batch
from polyzoo.training.memory import explaining_out_of_memory
from polyzoo.training.metrics import Weigher, Window, metric_totals, step_row
from polyzoo.training.schedule import lr_factor
from polyzoo.training.signals import StopRequest
from polyzoo.training.step import StepContext, StepFn, StepOutput, check_loss, without_graph
from polyzoo.training.strategies.base import Strategy
from polyzoo.training.throughput import Clock
from polyzoo.training.watchdog import Watchdog
from polyzoo.training.world import World, explaining_lost_peers

logger = get_logger(__name__)


class Loop:
    """Takes a run from its counters' step to the last one."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        strategy: Strategy,
        step_fn: StepFn,
        data: DataStream,
        total_steps: int,
        counters: Counters,
        window: Window,
        ema: Ema | None,
        evaluator: Evaluator | None,
        snapshots: Snapshots,
        world: World,
        frozen: Mapping[str, nn.Module],
        identity: dict[str, str],
        log: RunLog | None,
        stop: StopRequest,
        watchdog: Watchdog,
    ) -> None:
        self.config = config
        self.strategy = strategy
        self.step_fn = step_fn
        self.data = data
        self.total_steps = total_steps
        self.counters = counters
        self.window = window
        self.ema = ema
        self.evaluator = evaluator
        self.snapshots = snapshots
        self.world = world
        self.frozen = frozen
        self.identity = identity
        self.log = log
        self.stop = stop
        self.watchdog = watchdog
        self._saved_step = counters.step
        self._clock = Clock(counters, device=strategy.device)
        self._first_step = True

    def run(self) -> None:
        """Train.

        Raises:
            Interrupted: A signal came; the step in flight was finished, and the run saved.
            TrainingError: The run cannot go on; the last checkpoint is intact.
        """
        while True:
            if self._evaluation_is_due and not self.world.any(self.stop.requested):
                self._evaluate()
            stopping = self.world.any(self.stop.requested)
            if self._checkpoint_is_due or stopping:
                self._save(stopping)
            if stopping:
                cause = self.stop.name or "a signal to another process"
                raise Interrupted(
                    f"stopped by {cause} after step {self.counters.step} of "
                    f"{self.total_steps}, which is saved; the same command resumes"
                )
            if self.counters.step >= self.total_steps:
                return
            batches = self._fetch()
            if batches is None:
                continue
            self._step(batches)
            if self._report_is_due:
                self._report()

    def _fetch(self) -> list[Batch] | None:
        """Wait for the data of a step; None if a signal has come: no further step begins then."""
        if self.stop.requested and self.world.size == 1:
            return None
        self.watchdog.beat("reading of data")
        position = self.data.position
        started = time.perf_counter()
        batches: list[Batch] | None = None
        failure: Exception | None = None
        try:
            batches = self.data.take(self.config.grad_accum)
        except Exception as error:
            # What asks this process to stop may have taken from it what the data needs.
            if self.stop.requested:
                logger.warning("the data of the next step failed after %s: %s",
                               self.stop.name, error)  # fmt: skip
            else:
                failure = error
        self.world.agree(failure)
        self._clock.waited += time.perf_counter() - started
        if self.world.any(self.stop.requested):
            self.data.position = position
            return None
        return batches

    def _step(self, batches: list[Batch]) -> None:
        """Take one optimizer step; nothing in here waits for the device."""
        world = self.world
        weigher = Weigher(len(batches), mean=world.mean if world.size > 1 else None)
        outputs: list[StepOutput] = []
        for index, batch in enumerate(batches):
            with self._watching("forward pass"), self._clock.phase("forward"):
                output = self._forward(batch, index)
            factor = weigher.factor(self._weight(output, batch))
            loss = (
                output.loss if isinstance(factor, float) and factor == 1.0 else output.loss * factor
            )
            with self._watching("backward pass"), self._clock.phase("backward"):
                self.strategy.backward(loss, last=index == len(batches) - 1)
            outputs.append(without_graph(output, loss))
        if self._first_step:
            self._warn_of_unused()
        total = sum((output.loss for output in outputs[1:]), outputs[0].loss)
        shared = self._shared_values(weigher, outputs, total) if world.size > 1 else None
        loss = total / weigher.divisor if shared is None else shared.pop("loss")
        divisor = weigher.divisor if shared is None else shared.pop("divisor")
        lr = self._learning_rate(self.counters.step)
        with self._watching("optimizer step"), self._clock.phase("optimizer"):
            report = self.strategy.optimizer_step(lr=lr, loss=loss, divisor=divisor)
        self.counters.step += 1
        self.counters.samples += sum(batch.samples for batch in batches)
        if self.ema:
            self.ema.update(self.counters.step)
        row = step_row(
            self.counters.step, batches, outputs, weigher, loss, report, shared=shared
        )  # fmt: skip
        self.window.add(row)

    def _shared_values(
        self, weigher: Weigher, outputs: list[StepOutput], loss: Tensor
    ) -> dict[str, Any]:
        """Return loss, metrics, tokens and divisor over all processes."""
        device = self.strategy.device
        totals = {"loss": loss, **metric_totals(outputs, weigher)}
        if all(output.tokens is not None for output in outputs):
            # A mean like the others, turned back into a sum: one exchange for everything.
            totals["tokens"] = sum(output.tokens for output in outputs)  # pyright: ignore[reportArgumentType, reportCallIssue]
        values: dict[str, Any] = weigher.means(totals, device)
        if "tokens" in values:
            values["tokens"] = values["tokens"] * values["divisor"] * self.world.size
        return values

    def _forward(self, batch: Batch, micro_step: int) -> StepOutput:
        context = StepContext(
            step=self.counters.step,
            micro_step=micro_step,
            seed=self.config.seed,
            device=self.strategy.device,
            frozen=self.frozen,
            rank=self.world.rank,
            world_size=self.world.size,
            method_caller=self.strategy.call_method,
        )
        with self.strategy.forward_context():
            output = self.step_fn(self.strategy.module, batch.data, context)
        if not isinstance(output, StepOutput):
            output = StepOutput(loss=output)
        check_loss(output)
        return output

    def _weight(self, output: StepOutput, batch: Batch) -> Tensor | float:
        weight = float(batch.share) if output.weight is None else output.weight
        if self.world.size == 1:
            return weight
        # Without samples of its own a process computes on a copy that must not count.
        counts = 1.0 if batch.share else 0.0
        return torch.as_tensor(weight, device=self.strategy.device).float() * counts

    def _learning_rate(self, step: int) -> float:
        return self.config.optim.lr * lr_factor(step, self.total_steps, self.config.schedule)

    def _report(self) -> None:
        """Read the window from the device, check it, and write its log line."""
        self._read_window()
        self._clock.flush()
        summary = self.window.summary()
        values: dict[str, float] = {
            "epoch": summary.epoch,
            "loss": summary.loss,
            "grad_norm": summary.grad_norm,
            "lr": self._learning_rate(self.counters.step - 1),
            "samples": self.counters.samples,
            **self._clock.rates(),
            "skipped": self.counters.skipped,
        }
        values.update(self.strategy.memory_report())
        if self.log:
            self.log.train(step=self.counters.step, values=values, metrics=summary.metrics)
        self._clock.restart()

    def _read_window(self) -> None:
        rows = self.window.read()
        self.counters.tokens += sum(int(row.values.get("tokens", 0)) for row in rows)
        check_rows(rows, self.config, self.counters, self.data)

    def _evaluate(self) -> None:
        if self.evaluator is None:
            return
        self._read_window()
        self.watchdog.beat("evaluation")
        with self._clock.paused():
            metrics = self.evaluator.run(self.counters)
        if self.log:
            self.log.evaluation(step=self.counters.step, metrics=metrics)

    def _save(self, stopping: bool) -> None:
        """Save the run at this step; never a run whose numbers have gone bad."""
        self._read_window()
        self.watchdog.beat("saving of a checkpoint")
        with self._clock.paused():
            if stopping:
                self.counters.interruptions += 1
            self.snapshots.save(self._state())
        self._saved_step = self.counters.step

    def _state(self) -> RunState:
        return RunState(
            counters=self.counters,
            data=self.data.position,
            random=capture_random_state(),
            window=self.window.state(),
            strategy=self.strategy.plain_state(),
            identity=self.identity,
        )

    @property
    def _evaluation_is_due(self) -> bool:
        step, every = self.counters.step, self.config.eval_every
        at_rhythm = bool(every) and step % every == 0
        return (
            self.evaluator is not None
            and self.counters.evaluated_step < step
            and (at_rhythm or step == self.total_steps)
        )

    @property
    def _checkpoint_is_due(self) -> bool:
        step, every = self.counters.step, self.config.checkpoint.every
        at_rhythm = bool(every) and step % every == 0
        return step > self._saved_step and (at_rhythm or step == self.total_steps)

    @property
    def _report_is_due(self) -> bool:
        step = self.counters.step
        return step % self.config.log.every == 0 or step == self.total_steps

    @contextmanager
    def _watching(self, phase: str) -> Iterator[None]:
        self.watchdog.beat(phase)
        with (
            explaining_lost_peers(),
            explaining_out_of_memory(phase, self.config, self.strategy.device),
        ):
            yield

    def _warn_of_unused(self) -> None:
        self._first_step = False
        unused = self.strategy.parameters_without_gradient()
        if unused:
            logger.warning(
                "W-UNUSED: %d trainable parameters get no gradient: %s%s",
                len(unused), ", ".join(unused[:10]), " ..." if len(unused) > 10 else "",
            )  # fmt: skip
