"""What an image was made from: kept in the image's own metadata."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn

from polyzoo.core.errors import DataError
from polyzoo.core.io import atomic_write

KEY = "polyzoo"
"""Name of the PNG text entry."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Everything needed to draw an image again."""

    prompt: str
    negative_prompt: str
    seed: int
    height: int
    width: int
    steps: int
    guidance: float
    scheduler: str
    spacing: str | None
    model: str
    weights: dict[str, str]
    """Part of the model to a hash of its weights."""
    adapters: dict[str, float] = field(default_factory=dict)
    control: dict[str, Any] | None = None
    strength: float | None = None
    dtype: str = ""
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Of Python and the packages that decide pixels."""
    found = {"python": platform.python_version()}
    for name in ("polyzoo-pixart-delta", "torch", "diffusers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from the sources
            continue
    return found


def fingerprint(module: nn.Module) -> str:
    """A hash of a network's weights: of names, shapes, and sums over each tensor's bytes."""
    digest = hashlib.sha256()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
            usable = raw[: len(raw) // 4 * 4].view(torch.int32).to(torch.int64)
            places = torch.arange(1, 1 + len(usable), device=usable.device) % 65521
            digest.update(f"{int(usable.sum())},{int((usable * places).sum())}".encode())
    return digest.hexdigest()[:16]


def save_png(picture: Image.Image, path: str | Path, record: RunRecord | None) -> None:
    """Write a PNG with its record, atomically."""
    info = PngInfo()
    if record is not None:
        info.add_itxt(KEY, json.dumps(asdict(record), ensure_ascii=False))
    with atomic_write(path) as file:
        picture.save(file, "PNG", pnginfo=info)


def read_record(path: str | Path) -> Mapping[str, Any]:
    """The record of a PNG that `save_png` wrote.

    Raises:
        DataError: The file holds none.
    """
    with Image.open(path) as picture:
        text = picture.info.get(KEY)
    if not text:
        raise DataError(f"{path}: holds no record of how it was made")
    return json.loads(text)
