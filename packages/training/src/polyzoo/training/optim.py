"""Optimizers: AdamW, or any torch optimizer by import path."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polyzoo.core.errors import ConfigError
from polyzoo.training.config import OptimConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ParamGroup:
    """Parameters that share a learning rate and a decay.

    Example:
        >>> ParamGroup(parameters=model.encoder.parameters(), lr_scale=0.1)
    """

    parameters: Iterable[nn.Parameter]
    """Members; frozen ones are passed over."""
    lr_scale: float = 1.0
    """Learning rate as a multiple of the config's."""
    weight_decay: float | None = None
    """Decay of all members; None follows the config, which spares one-axis parameters."""


ParamGroups = Callable[[nn.Module], Sequence[ParamGroup]]


def build_optimizer(
    model: nn.Module, config: OptimConfig, param_groups: ParamGroups | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer of the model's trainable parameters.

    Each of its groups carries `lr_scale`, by which the scheduled learning rate is multiplied.

    Raises:
        ConfigError: Nothing is trainable, a parameter is in no group or in two, or the import path
            does not lead to an optimizer that takes these options.
    """
    groups = _groups(model, config, param_groups)
    if config.name == "adamw":
        fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
        return torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused
        )
    kind = _import_optimizer(config.name)
    try:
        return kind(groups, lr=config.lr, **config.options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optim.options={config.options!r} for {config.name}: {error}") from error


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def _groups(
    model: nn.Module, config: OptimConfig, param_groups: ParamGroups | None
) -> list[dict[str, Any]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    trainable = [parameter for parameter in names if parameter.requires_grad]
    if not trainable:
        raise ConfigError("the model has no trainable parameter; unfreeze some, or set lora")
    given = param_groups(model) if param_groups else [ParamGroup(parameters=trainable)]
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for group in given:
        for parameter in group.parameters:
            if not parameter.requires_grad:
                continue
            if parameter not in names or parameter in seen:
                fault = "is in two groups" if parameter in seen else "is not the model's"
                name = names.get(parameter, f"of shape {tuple(parameter.shape)}")
                raise ConfigError(f"param_groups: parameter {name} {fault}")
            seen.add(parameter)
            decay = group.weight_decay
            if decay is None:
                spared = parameter.ndim < 2 and not config.decay_all
                decay = 0.0 if spared else config.weight_decay
            groups.setdefault((group.lr_scale, decay), []).append(parameter)
    left_out = [names[parameter] for parameter in trainable if parameter not in seen]
    if left_out:
        raise ConfigError(f"param_groups: {len(left_out)} in no group, first {left_out[0]}")
    return [
        {"params": members, "weight_decay": decay, "lr_scale": lr_scale}
        for (lr_scale, decay), members in groups.items()
    ]


def _import_optimizer(path: str) -> Callable[..., torch.optim.Optimizer]:
    module, _, name = path.partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"optim.name={path!r} cannot be imported: {error}") from error
    if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)):
        raise ConfigError(f"optim.name={path!r} is not a torch.optim.Optimizer class")
    return kind
