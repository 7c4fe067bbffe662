"""What a model's step function is given, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from polyzoo.core.seeding import item_generator
from polyzoo.training.errors import TrainingError


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput:
    """Result of one micro-batch.

    Example:
        >>> StepOutput(loss=loss, metrics={"accuracy": right}, weight=mask.sum())
    """

    loss: Tensor
    """Scalar to minimise: a mean over whatever `weight` counts."""
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)
    """Scalars to log; leave tensors on the device, they are read with the log line."""
    weight: Tensor | float | None = None
    """Share of this micro-batch in its optimizer step, such as its tokens; samples if not given."""
    tokens: Tensor | int | None = None
    """Tokens in the micro-batch; if given, the throughput is in tokens."""


StepFn = Callable[[Any, Any, "StepContext"], StepOutput | Tensor]
EvalFn = Callable[[Any, "StepContext"], Mapping[str, Tensor | float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepContext:
    """Where in the run a step function or an evaluation is called."""

    step: int
    """Optimizer steps taken so far."""
    micro_step: int
    """Micro-batch within the optimizer step."""
    seed: int
    """The run's seed."""
    device: torch.device
    """Where the model and the batch are."""
    frozen: Mapping[str, nn.Module]
    """The modules given to `fit` as frozen, by name."""
    rank: int = 0
    """Of this process among those that train together."""
    world_size: int = 1
    """Processes that train together."""
    method_caller: Callable[..., Any] | None = None
    """How a strategy calls a method of the model it spreads."""

    @property
    def generator(self) -> torch.Generator:
        """A fresh generator on the device; the same seed, step, micro-step and rank draw the same.

        Two processes draw what one draws with two micro-batches.
        """
        number = self.micro_step * self.world_size + self.rank
        return item_generator(self.seed, (self.step << 20) + number, self.device)

    def call(self, model: Any, method: str, *arguments: Any, **named: Any) -> Any:
        """Call a method of the model other than `forward`; works however the model is spread."""
        if self.method_caller is not None:
            return self.method_caller(model, method, *arguments, **named)
        return getattr(model, method)(*arguments, **named)


def check_loss(output: StepOutput) -> None:
    """Refuse a loss that cannot be trained on.

    Raises:
        TrainingError: E-LOSS says what the step function returned.
    """
    loss = output.loss
    if not isinstance(loss, Tensor):
        fault = f"it is a {type(loss).__name__}"
    elif loss.numel() != 1:
        fault = f"its shape is {tuple(loss.shape)}"
    elif not loss.requires_grad:
        fault = "it does not depend on any trainable parameter"
    else:
        return
    raise TrainingError(
        "E-LOSS",
        "the step function's loss cannot be trained on",
        fault,
        "return a scalar tensor computed from the model's output with gradients on",
    )


def without_graph(output: StepOutput, loss: Tensor) -> StepOutput:
    """Return the output with this loss, keeping no autograd graph alive."""
    metrics = {
        name: value.detach() if isinstance(value, Tensor) else value
        for name, value in output.metrics.items()
    }
    return replace(output, loss=loss.detach().reshape(()), metrics=metrics)
