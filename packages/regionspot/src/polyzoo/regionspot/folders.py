"""From a name or a folder to an engine: the embedded model, trained ones, converted ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyzoo.core import config as configs
from polyzoo.core.errors import WeightsError
from polyzoo.core.hub import CONFIG_NAME, resolve_folder, save_pretrained
from polyzoo.core.weights import load_into, read_metadata, read_weights
from polyzoo.regionspot import scene_folder
from polyzoo.regionspot.clip import uses_quick_gelu
from polyzoo.regionspot.config import ClipConfig, RegionSpotConfig
from polyzoo.regionspot.engine import Engine
from polyzoo.regionspot.model import RegionSpot
from polyzoo.regionspot.sam_engine import SamEngine
from polyzoo.regionspot.scene_engine import SceneEngine
from polyzoo.regionspot.text import Tokenize, fingerprint
from polyzoo.regionspot.words import SentenceText

EMBEDDED, MINILM = "embedded", "minilm"
_ASSETS = Path(__file__).parent / "assets"
_WEIGHTS = "model.safetensors"
_TOWERS = "polyzoo.regionspot.towers"


def load_engine(
    name_or_path: str | Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    sam_weights: str | Path | None = None,
    clip_weights: str | Path | None = None,
    local_files_only: bool = False,
) -> Engine:
    """Load a model and put it on its device; see `RegionSpotPipeline.from_pretrained`."""
    if str(name_or_path) in (EMBEDDED, MINILM):
        folder = _ASSETS / EMBEDDED
    else:
        folder = resolve_folder(
            name_or_path, local_files_only=local_files_only, files=(CONFIG_NAME, _WEIGHTS)
        )
    fields = configs.read_mapping(folder / CONFIG_NAME)
    if "sam" not in fields:
        if sam_weights is not None or clip_weights is not None:
            raise WeightsError(
                f"{folder}: this model has its own tower; sam_weights and clip_weights do not apply"
            )
        model, words = scene_folder.load(folder)
        if str(name_or_path) == MINILM:
            basis = read_weights(_ASSETS / MINILM / "basis.safetensors")["basis"]
            return SceneEngine(model, SentenceText(basis), device=device, name=MINILM)
        return SceneEngine(model, words, device=device, name=Path(folder).name)
    model = load_on_towers(folder, sam_weights=sam_weights, clip_weights=clip_weights)
    from polyzoo.core.assets.cache import cache_home

    return SamEngine(
        model, tokenizer_of(model.config.clip), device=device, dtype=dtype,
        cache=cache_home() / "regionspot" / "classes",
    )  # fmt: skip


def tokenizer_of(clip: ClipConfig) -> Tokenize:
    """Return open_clip's tokenizer for a model."""
    import open_clip

    if clip.shape is not None:
        return open_clip.SimpleTokenizer(context_length=clip.shape.context_length)
    return open_clip.get_tokenizer(clip.name)


def save_integration(folder: Path, model: RegionSpot, *, source: str = "training") -> None:
    """Write the 60 trained tensors, the shape, and which towers they belong to."""
    towers = {"sam": fingerprint(model.sam), "clip": fingerprint(model.clip.visual)}
    metadata = {_TOWERS: json.dumps(towers), "source": source}
    save_pretrained(folder, model.config, model.trained_tensors(), metadata=metadata)


def load_on_towers(
    folder: Path,
    *,
    sam_weights: str | Path | None = None,
    clip_weights: str | Path | None = None,
    check: bool = True,
) -> RegionSpot:
    """Build SAM and CLIP, fill them, and put the trained module between them.

    Raises:
        WeightsError: A file is missing or does not fit, or the module was trained with others.
    """
    config = configs.load(RegionSpotConfig, folder / CONFIG_NAME)
    model = RegionSpot(config)
    for given, name, part in (
        (sam_weights, "sam_weights", model.sam), (clip_weights, "clip_weights", model.clip),
    ):  # fmt: skip
        if given is None:
            raise WeightsError(
                f"{folder}: the module needs the towers it was trained with; give {name}= a "
                "safetensors file (`polyzoo regionspot convert` makes one of a .pth)"
            )
        fill_tower(part, given)
    load_into(model.integration, read_weights(folder), source=str(folder))
    if check:
        _check_towers(folder, model)
    return model


def fill_tower(tower: nn.Module, path: str | Path) -> None:
    """Load a tower's published weights, strictly."""
    tensors = read_weights(path, dtype=torch.float32)
    own = tower.state_dict()
    # open_clip's older files carry what newer versions compute.
    tensors = {k: v for k, v in tensors.items() if k in own or k not in _OLD_CLIP}
    load_into(tower, tensors, source=str(path))


_OLD_CLIP = {"input_resolution", "context_length", "vocab_size"}


def check_quick_gelu(clip: Any, name: str, *, openai: bool) -> None:
    """Refuse OpenAI's weights in a tower with plain GELU: open_clip loads them all the same.

    Raises:
        WeightsError: Names the model to use instead.
    """
    if openai and uses_quick_gelu(clip) is False:
        raise WeightsError(
            f"clip.name={name!r} computes GELU, but OpenAI's weights were trained with QuickGELU: "
            f"use {name}-quickgelu; names would be worse without any error"
        )


def _check_towers(folder: Path, model: RegionSpot) -> None:
    stored = json.loads(read_metadata(folder / _WEIGHTS).get(_TOWERS, "{}"))
    for name, part in (("sam", model.sam), ("clip", model.clip.visual)):
        found = fingerprint(part)
        if name in stored and stored[name] != found:
            raise WeightsError(
                f"{folder}: trained with {name} {stored[name][:12]}, the weights given are "
                f"{found[:12]}; the module only works with the towers it was trained with"
            )
