"""SceneSpot on disk: int8 rows for everything with rows, a few per cent of the accuracy of float32."""

from __future__ import annotations

from pathlib import Path

import torch

from polyzoo.core.hub import load_pretrained, save_pretrained
from polyzoo.core.weights import load_into
from polyzoo.regionspot.config import SceneSpotConfig
from polyzoo.regionspot.scene_model import SceneSpot

_LEAST_ENTRIES = 1024
"""Smaller tensors stay in half precision."""


def save(folder: Path, model: SceneSpot) -> None:
    """Write config and weights."""
    tensors = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    rows = [
        name for name, tensor in tensors.items() if tensor.ndim > 1 and tensor.numel() >= _LEAST_ENTRIES
    ]
    wide = {name: tensor.float() if name in rows else tensor for name, tensor in tensors.items()}
    save_pretrained(folder, model.config, wide, int8_rows=rows)


def load(folder: Path) -> SceneSpot:
    """Read what `save` wrote, as float32."""
    config, tensors = load_pretrained(folder, SceneSpotConfig)
    model = SceneSpot(config)
    load_into(model, {name: tensor.to(torch.float32) for name, tensor in tensors.items()}, source=str(folder))
    return model.eval()
