"""An encoder's modules and weights from a Hugging Face folder, quietly and strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyzoo.core.weights import read_weights
from polyzoo.sea.config import Pooling

_WITH_POOLER = frozenset({"bert", "roberta", "xlm-roberta", "camembert"})


def register_attention() -> None:
    """Make "polyzoo" known to transformers; calling it again does nothing."""
    from polyzoo.attention.integrations.transformers import register

    register()


def empty_encoder(folder: str | Path, *, pooling: Pooling) -> nn.Module:
    """The modules a config.json describes, in float32, with random weights.

    A pooler that would be unused is left out.
    """
    from transformers import AutoConfig, AutoModel

    register_attention()
    shape = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    extra: dict[str, Any] = {}
    if pooling != "pooler" and shape.model_type in _WITH_POOLER:
        extra["add_pooling_layer"] = False
    with torch.random.fork_rng(devices=[]):  # its random weights must not move the caller's state
        return AutoModel.from_config(
            shape, attn_implementation="polyzoo", dtype=torch.float32, **extra
        )


def encoder_weights(folder: str | Path, model: nn.Module) -> dict[str, Tensor]:
    """Weights of a folder, without a task head and without what this model leaves out."""
    tensors = read_weights(folder, dtype=torch.float32)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if len(prefix) > 1 and any(name.startswith(prefix) for name in tensors):
        tensors = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
    wanted = model.state_dict().keys()
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name in wanted or not (name.startswith("pooler.") or name.endswith("position_ids"))
    }
