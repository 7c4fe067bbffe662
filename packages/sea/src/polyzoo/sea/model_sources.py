"""Where an encoder or a trained model comes from: a folder, this package, an asset, or the hub."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from polyzoo.core.assets.cache import asset_folder
from polyzoo.core.assets.table import ASSETS
from polyzoo.core.errors import AssetError, WeightsError
from polyzoo.core.hub import resolve_folder

CONFIG_NAME = "config.json"
SHIPPED = {"embedded": "embedded", "minilm": "minilm-sea"}
"""Models inside this package, by the name users give."""
BARE = "encoder:"
"""Prefix of an encoder without SEA training, such as encoder:minilm."""
_ENCODER_FILES = (
    "config.json", "model.safetensors", "model.safetensors.index.json", "*.safetensors",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json",
    "merges.txt",
)  # fmt: skip


def encoder_folder(
    name: str, *, beside: Path | None = None, local_files_only: bool = False
) -> Path:
    """Folder of an encoder's config, weights and tokenizer.

    Args:
        name: "self" (the folder `encoder` beside the model), a folder, an asset's name, or a
            hub id.
        beside: The model's folder, for "self".
        local_files_only: Never ask the hub.
    """
    if name == "self":
        if beside is None or not (beside / "encoder").is_dir():
            raise WeightsError(f"{beside}: the folder `encoder` with its config is missing")
        return beside / "encoder"
    if name in ASSETS:  # before folders: one of that name in the working folder changes nothing
        return asset_folder(name)
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_absolute() or name.startswith((".", "~")):
        raise WeightsError(f"{name}: no such folder")
    return resolve_folder(name, local_files_only=local_files_only, files=_ENCODER_FILES)


def model_folder(name: str, *, local_files_only: bool = False) -> Path:
    """Folder of a trained model: shipped, written by training, or the hub's.

    Args:
        name: One of `SHIPPED`, a folder, or a hub id.
        local_files_only: Never ask the hub.
    """
    if name in SHIPPED:  # before folders: one of that name in the working folder changes nothing
        folder = shipped_folder(name)
    elif Path(name).is_dir():
        folder = Path(name)
    elif Path(name).is_absolute() or name.startswith((".", "~")):
        raise WeightsError(f"{name}: no such folder")
    else:
        folder = resolve_folder(name, local_files_only=local_files_only)
    if not (folder / CONFIG_NAME).is_file():
        raise WeightsError(f"{folder}: no {CONFIG_NAME}, so not a model's folder")
    return folder


def shipped_folder(name: str) -> Path:
    """Folder of a model inside this package."""
    folder = Path(str(resources.files("polyzoo.sea") / "assets" / SHIPPED[name]))
    if not (folder / "config.json").is_file():
        raise AssetError(
            f"{name}: this installation holds no trained weights ({folder} is missing); "
            f"train them with `polyzoo sea train {name}` or give a model's folder"
        )
    return folder
