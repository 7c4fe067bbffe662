"""Low-rank changes taken out of a model that was trained with peft adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from polyzoo.core.errors import WeightsError
from polyzoo.sea.folders import LowRank
from polyzoo.sea.model import SeaModel

_ADAPTER = "default"


def unwrap(model: nn.Module) -> SeaModel:
    """The SeaModel inside an adapted model; its adapters stay active."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
    assert isinstance(inner, SeaModel)  # noqa: S101 - our own promise
    return inner


@torch.no_grad()
def extract(model: nn.Module, clean: SeaModel) -> tuple[dict[str, LowRank], float]:
    """Read adapters by module name inside the encoder, and copy the aggregation into `clean`.

    Args:
        model: As the engine returns it.
        clean: A fresh model of the same shape; gets the trained aggregation.

    Returns:
        The changes and the scale they share.
    """
    trained = unwrap(model)
    changes: dict[str, LowRank] = {}
    scales: set[float] = set()
    for name, module in trained.encoder.model.named_modules():
        down = getattr(module, "lora_A", None)
        if isinstance(down, nn.ModuleDict) and _ADAPTER in down:
            adapted: Any = module
            changes[name] = LowRank(
                down=adapted.lora_A[_ADAPTER].weight.detach().float().cpu(),
                up=adapted.lora_B[_ADAPTER].weight.detach().float().cpu(),
            )
            scales.add(float(adapted.scaling[_ADAPTER]))
    if not changes:
        raise WeightsError("the trained model holds no adapters")
    if len(scales) != 1:
        raise WeightsError(f"adapters with different scales {sorted(scales)} cannot be stored")
    aggregation: Any = trained.aggregation
    saved = getattr(aggregation, "modules_to_save", None)
    own = saved[_ADAPTER] if saved is not None else aggregation
    state = {name: tensor.float().cpu() for name, tensor in own.state_dict().items()}
    clean.aggregation.load_state_dict(state)
    return changes, scales.pop()
