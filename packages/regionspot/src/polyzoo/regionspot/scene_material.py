"""What scenes are made of, as `polyzoo regionspot prepare` leaves it in a folder."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from polyzoo.core.errors import DataError
from polyzoo.core.weights import read_metadata, read_weights
from polyzoo.regionspot.words import FILE_NAME as WORDS

CUTOUTS, BACKGROUNDS = "cutouts.zip", "backgrounds.zip"
NAMES, SALIENCY, TOWER = "names.safetensors", "saliency.safetensors", "lite0.safetensors"
PHOTOS = "photos.safetensors"
TRAIN, RESERVED = 0, 1


@dataclass(frozen=True)
class Photo:
    """A labelled photograph, for figures only."""

    image: Tensor
    """`(3, H, W)` of 0..1, sides multiples of 32."""
    boxes: Tensor
    """`(k, 4)` as shares."""
    labels: Tensor
    """int64 `(k,)`: rows of the photographs' names."""


@dataclass(frozen=True)
class SceneMaterial:
    """All of it, as tensors."""

    cutouts: Tensor
    """uint8 `(n, 4, s, s)`."""
    labels: Tensor
    """int64 `(n,)`: rows of the vocabulary."""
    split: Tensor
    """int64 `(n,)`: TRAIN or RESERVED (a concept that training never sees)."""
    chances: Tensor
    """`(n,)` weights with which training draws cut-outs."""
    vocabulary: Tensor
    """Unit `(v, t)`."""
    names: tuple[str, ...]
    """Of the vocabulary's rows."""
    classes: Tensor
    """Unit `(1000, t)` vectors of the tower's class names."""
    backgrounds: Tensor
    """uint8 `(m, 3, s, s)`."""
    saliency: Tensor
    """uint8 `(m, r, r)`: what a larger model finds salient in each background."""
    tower: dict[str, Tensor]
    """Weights of the frozen tower."""
    photos: dict[str, list[Photo]]
    """Labelled photographs by the name of their set; empty where the folder has none."""
    photo_names: Tensor
    """Unit `(c, t)`; the first `few` are the photographs' own labels and some others."""
    few: int

    def to(self, device: torch.device | str) -> SceneMaterial:
        """Return it with the tensors a training step reads on a device."""
        moved = {
            name: getattr(self, name).to(device)
            for name in (
                "cutouts", "labels", "split", "chances", "vocabulary", "classes", "backgrounds",
                "saliency", "photo_names",
            )
        }  # fmt: skip
        others = {name: getattr(self, name) for name in ("names", "tower", "photos", "few")}
        return SceneMaterial(**moved, **others)


def read_material(folder: str | Path) -> SceneMaterial:
    """Read a prepared folder.

    Raises:
        DataError: A file is missing or damaged.
    """
    folder = Path(folder)
    for name in (CUTOUTS, BACKGROUNDS, NAMES, SALIENCY, TOWER, WORDS):
        if not (folder / name).is_file():
            raise DataError(
                f"{folder / name}: no such file; make the folder with: polyzoo regionspot prepare "
                f"--out {folder}"
            )
    tensors = read_weights(folder / NAMES)
    photos, photo_names, few = _photos(folder / PHOTOS)
    return SceneMaterial(
        cutouts=_pictures(folder / CUTOUTS, "RGBA"),
        labels=tensors["label"],
        split=tensors["split"],
        chances=tensors["chance"].float(),
        vocabulary=_unit(tensors["vocabulary"]),
        names=tuple(json.loads(read_metadata(folder / NAMES)["names"])),
        classes=_unit(tensors["classes"]),
        backgrounds=_pictures(folder / BACKGROUNDS, "RGB"),
        saliency=read_weights(folder / SALIENCY)["saliency"],
        tower=read_weights(folder / TOWER),
        photos=photos,
        photo_names=photo_names,
        few=few,
    )


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


def _pictures(path: Path, mode: str) -> Tensor:
    with zipfile.ZipFile(path) as archive:
        rows = [
            np.asarray(Image.open(io.BytesIO(archive.read(name))).convert(mode))
            for name in sorted(archive.namelist())
        ]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()


def _photos(path: Path) -> tuple[dict[str, list[Photo]], Tensor, int]:
    if not path.is_file():
        return {}, torch.zeros(0, 1), 0
    tensors = read_weights(path)
    sets: dict[str, list[Photo]] = {}
    for name, data in sorted(tensors.items()):
        if not name.endswith(".jpg"):
            continue
        base = name.removesuffix(".jpg")
        image = Image.open(io.BytesIO(bytes(data.numpy().tobytes()))).convert("RGB")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        photo = Photo(pixels, tensors[f"{base}.boxes"].float(), tensors[f"{base}.labels"].long())
        sets.setdefault(base.partition(".")[0], []).append(photo)
    return sets, _unit(tensors["names"]), int(tensors["n42"])
