"""What strategies with a torch optimizer save besides its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polyzoo.core.log import get_logger

logger = get_logger(__name__)


def plain_state(
    optimizer: torch.optim.Optimizer,
    trainable: Mapping[str, nn.Parameter],
    scaler: torch.amp.GradScaler | None,
) -> dict[str, Any]:
    """Return scalar optimizer state, values of the optimizer's groups, and the loss scale."""
    scalars: dict[str, dict[str, Any]] = {}
    for name, parameter in trainable.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not (isinstance(value, Tensor) and value.ndim):
                scalars.setdefault(name, {})[key] = value
    known = {"params", "lr", "lr_scale", "weight_decay", *optimizer.defaults}
    groups = [
        {key: value for key, value in group.items() if key not in known}
        for group in optimizer.param_groups
    ]
    return {
        "optimizer": type(optimizer).__name__,
        "scalars": scalars,
        "groups": groups,
        "scaler": scaler.state_dict() if scaler else {},
    }


def fits_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> bool:
    """Whether saved state is of this kind of optimizer; says so where it is not."""
    if state["optimizer"] == type(optimizer).__name__:
        return True
    logger.warning("the optimizer was %s; its state starts anew", state["optimizer"])
    return False


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model's state that are no parameters, by name."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor) and name not in parameters
    }
