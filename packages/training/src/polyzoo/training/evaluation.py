"""Evaluation beside training: averaged weights, eval mode, no trace in the random states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from polyzoo.core.seeding import capture_random_state, restore_random_state, seed_everything
from polyzoo.training.checkpoint.state import Best, Counters
from polyzoo.training.config import TrainConfig
from polyzoo.training.ema import Ema
from polyzoo.training.errors import TrainingError
from polyzoo.training.gathering import Replica
from polyzoo.training.memory import explaining_out_of_memory
from polyzoo.training.precision import forward_context
from polyzoo.training.step import EvalFn, StepContext
from polyzoo.training.strategies.base import Strategy
from polyzoo.training.weights import save_best


class Evaluator:
    """Calls the evaluation function, and keeps the weights that did best.

    Example:
        >>> Evaluator(config, strategy, eval_fn, ema=None, frozen={}).run(counters)
        {'accuracy': 0.93}
    """

    def __init__(
        self,
        config: TrainConfig,
        strategy: Strategy,
        eval_fn: EvalFn,
        *,
        ema: Ema | None,
        frozen: Mapping[str, nn.Module],
        replica: Replica | None = None,
    ) -> None:
        self.world = strategy.world
        self.replica = replica
        self.config = config
        self.strategy = strategy
        self.eval_fn = eval_fn
        self.ema = ema
        self.frozen = frozen

    def run(self, counters: Counters) -> dict[str, float]:
        """Evaluate the weights of this step and note the result in the counters."""
        if self.replica is None:
            with self.ema.applied() if self.ema else nullcontext():
                metrics = self.world.main_only(
                    lambda: self._evaluated(self.strategy.model, counters)
                )
        else:
            model = self.replica.filled(self.ema)
            metrics = self.world.main_only(lambda: self._evaluated(model, counters))
        counters.evaluated_step = counters.step
        counters.evaluation = metrics
        return metrics

    def _evaluated(self, model: nn.Module | None, counters: Counters) -> dict[str, float]:
        """Evaluate a whole model; in process 0 only."""
        assert model is not None  # noqa: S101 - process 0 has it
        context = StepContext(
            step=counters.step, micro_step=0, seed=self.config.seed,
            device=self.strategy.device, frozen=self.frozen,
        )  # fmt: skip
        device, dtype = self.strategy.device, self.strategy.dtype
        with _evaluating(model, self.config):
            with (
                explaining_out_of_memory("evaluation", self.config, device),
                forward_context(dtype, device),
            ):
                given = self.eval_fn(model, context)
            metrics = {name: _number(name, value) for name, value in given.items()}
            self._keep_if_best(metrics, model, counters)
        return metrics

    def _keep_if_best(
        self, metrics: Mapping[str, float], model: nn.Module, counters: Counters
    ) -> None:
        name = self.config.best_metric
        if name is None:
            return
        if name not in metrics:
            raise TrainingError(
                "E-METRIC",
                f"best_metric={name!r} is not among the evaluation's metrics",
                f"eval_fn returned {', '.join(sorted(metrics)) or 'nothing'}",
                "set best_metric to one of these",
            )
        value, best = metrics[name], counters.best
        sign = 1 if self.config.best_mode == "max" else -1
        if best is None or sign * value > sign * best.value:
            save_best(
                Path(self.config.run_dir), model,
                step=counters.step, metric=name, value=value,
            )  # fmt: skip
            counters.best = Best(counters.step, value)


@contextmanager
def _evaluating(model: nn.Module, config: TrainConfig) -> Iterator[None]:
    """Set eval mode and the run's seed; put every module's mode and the random states back."""
    modes = {module: module.training for module in model.modules()}
    states = capture_random_state()
    seed_everything(config.seed)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        restore_random_state(states)


def _number(name: str, value: Tensor | float) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TrainingError(
            "E-METRIC",
            f"evaluation metric {name!r} is not a number",
            f"eval_fn returned a {type(value).__name__}: {error}",
            "return a mapping from names to scalars",
        ) from error
