"""SceneSpot on disk: four bits for the classifier and the names, int8 rows for the rest."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from polyzoo.core.hub import load_pretrained, save_pretrained
from polyzoo.core.weights import load_into
from polyzoo.regionspot.config import SceneSpotConfig
from polyzoo.regionspot.four_bits import cosine_basis, pack, unpack
from polyzoo.regionspot.scene_model import SceneSpot
from polyzoo.regionspot.words import WordTable

_LEAST_ENTRIES = 1024
"""Smaller tensors stay in half precision."""
_FOUR_BITS = ("class_names", "tower.classifier.weight")
_SPREAD = ("class_names",)
_SCALES = ".four_bit_scales"


def save(folder: Path, model: SceneSpot, words: WordTable) -> None:
    """Write config, weights and words."""
    tensors: dict[str, Tensor] = {}
    rows: list[str] = []
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().float().cpu()
        if name in _FOUR_BITS:
            spread = tensor @ cosine_basis(tensor.shape[1]).T if name in _SPREAD else tensor
            tensors[name], tensors[name + _SCALES] = pack(spread)
        elif tensor.ndim > 1 and tensor.numel() >= _LEAST_ENTRIES:
            tensors[name] = tensor
            rows.append(name)
        else:
            tensors[name] = tensor.half()
    save_pretrained(folder, model.config, tensors, int8_rows=rows)
    words.save(folder)


def load(folder: Path) -> tuple[SceneSpot, WordTable]:
    """Read what `save` wrote, as float32.

    Raises:
        ConfigError: config.json is no SceneSpot's.
        WeightsError: A file is missing, damaged, or does not fit.
    """
    config, stored = load_pretrained(folder, SceneSpotConfig)
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith(_SCALES):
            continue
        if name + _SCALES in stored:
            tensor = unpack(tensor, stored[name + _SCALES])
            if name in _SPREAD:
                tensor = tensor @ cosine_basis(tensor.shape[1])
        tensors[name] = tensor.float()
    model = SceneSpot(config)
    load_into(model, tensors, source=str(folder))
    return model.eval(), WordTable.load(folder)
