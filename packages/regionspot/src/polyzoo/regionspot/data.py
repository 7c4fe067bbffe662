"""Annotated images: COCO, LVIS and Objects365 JSON; flips and crops that both towers see alike."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from polyzoo.core.errors import DataError
from polyzoo.core.log import get_logger
from polyzoo.regionspot import geometry
from polyzoo.regionspot.inputs import read_image

_log = get_logger(__name__)


@dataclass(frozen=True)
class Annotated:
    """One image with its boxes."""

    id: int
    file: Path
    width: int
    height: int
    boxes: Tensor
    """float32 `(k, 4)` corners in pixels."""
    labels: Tensor
    """int64 `(k,)`: rows of the data set's names."""


@dataclass(frozen=True)
class Dataset:
    """Images with boxes, and what the boxes are called."""

    images: tuple[Annotated, ...]
    names: tuple[str, ...]
    """Distinct; categories of equal name share a row."""
    category_ids: tuple[int, ...]
    """The file's id of each name (the first, where several categories share it)."""
    digest: str
    """Hash of the annotation file."""
    without_boxes: int
    """Images left out for having none."""
    broken_boxes: int
    """Boxes left out for having no area."""


def read_annotations(path: str | Path, images: str | Path) -> Dataset:
    """Read a COCO-style file.

    Args:
        path: JSON with `images`, `annotations` (bbox xywh) and `categories`.
        images: Folder the file names are relative to.

    Raises:
        DataError: The file is missing or not of this kind, or an annotation names an unknown
            category or image.
    """
    path, images = Path(path), Path(images)
    try:
        raw = path.read_bytes()
        data = json.loads(raw)
        rows = {int(row["id"]): row for row in data["images"]}
        categories = [(int(row["id"]), str(row["name"])) for row in data["categories"]]
        annotations = data["annotations"]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is no COCO-style JSON ({error!r})") from error
    names = tuple(dict.fromkeys(name for _, name in categories))
    row_of = {identity: names.index(name) for identity, name in categories}
    if len(row_of) < len(categories):
        raise DataError(f"{path}: two categories have the same id")
    if len(names) < len(categories):
        _log.warning("%d categories share names and are merged", len(categories) - len(names))
    by_image: dict[int, list[tuple[list[float], int]]] = {}
    broken = 0
    for place, row in enumerate(annotations):
        try:
            image, category = int(row["image_id"]), int(row["category_id"])
            x, y, w, h = (float(v) for v in row["bbox"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: annotations[{place}] is damaged ({error!r})") from error
        if category not in row_of:
            raise DataError(
                f"{path}: annotations[{place}] has category_id {category}, which is not among the "
                f"{len(categories)} categories"
            )
        if image not in rows:
            raise DataError(f"{path}: annotations[{place}] has the unknown image_id {image}")
        if row.get("iscrowd"):
            continue
        if not (w > 0 and h > 0):
            broken += 1
            continue
        by_image.setdefault(image, []).append(([x, y, x + w, y + h], row_of[category]))
    found = tuple(
        Annotated(
            id=identity,
            file=images / _file_name(row),
            width=int(row["width"]),
            height=int(row["height"]),
            boxes=torch.tensor([box for box, _ in by_image[identity]]),
            labels=torch.tensor([label for _, label in by_image[identity]]),
        )
        for identity, row in rows.items()
        if identity in by_image
    )
    ids = {name: identity for identity, name in reversed(categories)}
    return Dataset(
        images=found,
        names=names,
        category_ids=tuple(ids[name] for name in names),
        digest=hashlib.sha256(raw).hexdigest(),
        without_boxes=len(rows) - len(found),
        broken_boxes=broken,
    )


def _file_name(row: dict[str, Any]) -> str:
    name = row.get("file_name")
    if name:
        return str(name)
    return "/".join(str(row["coco_url"]).split("/")[-2:])  # LVIS: train2017/000000123.jpg


@dataclass(frozen=True)
class Sample:
    """One training image for both towers."""

    clip: Tensor
    """uint8 `(3, S, S)`, squashed."""
    labels: Tensor
    """int64 `(k,)`."""
    tokens: Tensor | None = None
    """`(k, 256)` cached region tokens."""
    sam: Tensor | None = None
    """uint8 `(3, h, w)`, longer side SAM's input, where tokens are made in the step."""
    boxes: Tensor | None = None
    """`(k, 4)` in SAM's frame, likewise."""


def augment(
    image: Image.Image,
    boxes: Tensor,
    labels: Tensor,
    *,
    flip: bool,
    crop: tuple[int, int, int, int] | None = None,
    least: float = 0.3,
) -> tuple[Image.Image, Tensor, Tensor]:
    """Cut and mirror an image with its boxes, before either tower sees it.

    Args:
        image: Upright.
        boxes: `(k, 4)` corners in pixels.
        labels: `(k,)`.
        flip: Mirror left and right.
        crop: Left, top, right, bottom that stay; everything where not given.
        least: Share of a box that must stay inside the crop for the box to stay.
    """
    if crop is not None:
        left, top, right, bottom = crop
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        moved = boxes - boxes.new_tensor([left, top, left, top])
        limit = boxes.new_tensor([right - left, bottom - top] * 2)
        moved = torch.minimum(moved.clamp(min=0), limit)
        kept = (moved[:, 2:] - moved[:, :2]).clamp(min=0).prod(1) >= least * area
        image, boxes, labels = image.crop(crop), moved[kept], labels[kept]
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        width = image.width
        boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
    return image, boxes, labels


def random_crop(
    width: int, height: int, generator: random.Random, *, chance: float = 0.5
) -> tuple[int, int, int, int] | None:
    """Draw a crop of 60 to 100 % of each side, or None."""
    if generator.random() >= chance:
        return None
    w = max(1, round(width * generator.uniform(0.6, 1.0)))
    h = max(1, round(height * generator.uniform(0.6, 1.0)))
    left, top = generator.randint(0, width - w), generator.randint(0, height - h)
    return left, top, left + w, top + h


def squashed_uint8(image: Image.Image, size: int, *, antialias: bool) -> Tensor:
    """Return CLIP's square as uint8 `(3, size, size)`; normalised later, on the device."""
    array = torch.from_numpy(np.array(image, copy=True)).permute(2, 0, 1)
    small = torch.nn.functional.interpolate(
        array[None].float(), size=(size, size), mode="bilinear", align_corners=False,
        antialias=antialias,
    )[0]  # fmt: skip
    return small.round().clamp(0, 255).to(torch.uint8)


class OnlineData:
    """Images read, augmented and sized for both towers; SAM runs in the training step."""

    def __init__(
        self, dataset: Dataset, *, sam_side: int, clip_side: int, antialias: bool, augmented: bool
    ) -> None:
        self.dataset, self.augmented = dataset, augmented
        self.sam_side, self.clip_side, self.antialias = sam_side, clip_side, antialias

    def __len__(self) -> int:
        return len(self.dataset.images)

    def __getitem__(self, index: int) -> Sample:
        row = self.dataset.images[index]
        image = read_image(row.file)
        boxes, labels = row.boxes, row.labels
        if self.augmented:
            # The loader seeds torch's generator for each batch.
            drawn = random.Random(int(torch.randint(2**62, ())))  # noqa: S311 - no secret
            crop = random_crop(image.width, image.height, drawn)
            flip = drawn.random() < 0.5
            cut = augment(image, boxes, labels, flip=flip, crop=crop)
            if len(cut[1]):
                image, boxes, labels = cut
        frame = geometry.sam_frame(image.height, image.width, self.sam_side)
        return Sample(
            clip=squashed_uint8(image, self.clip_side, antialias=self.antialias),
            labels=labels,
            sam=geometry.sam_pixels(image, frame),
            boxes=frame.boxes(boxes),
        )


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Pad boxes and, where there is one, SAM's image; `present` marks real rows."""
    most = max(len(sample.labels) for sample in samples)
    count = len(samples)
    batch: dict[str, Tensor] = {
        "clip": torch.stack([sample.clip for sample in samples]),
        "labels": torch.zeros(count, most, dtype=torch.long),
        "present": torch.zeros(count, most, dtype=torch.bool),
    }
    first = samples[0]
    if first.tokens is not None:
        batch["tokens"] = first.tokens.new_zeros(count, most, first.tokens.shape[1])
    else:
        assert first.sam is not None  # noqa: S101 - one of the two is there
        batch["boxes"] = torch.zeros(count, most, 4)
        side = max(max(s.sam.shape[1:]) for s in samples if s.sam is not None)
        batch["sam"] = torch.zeros(count, 3, side, side, dtype=torch.uint8)
        batch["sizes"] = torch.zeros(count, 2, dtype=torch.long)
    for row, sample in enumerate(samples):
        k = len(sample.labels)
        batch["labels"][row, :k] = sample.labels
        batch["present"][row, :k] = True
        if sample.tokens is not None:
            batch["tokens"][row, :k] = sample.tokens
        if sample.boxes is not None and sample.sam is not None:
            batch["boxes"][row, :k] = sample.boxes
            height, width = sample.sam.shape[1:]
            batch["sam"][row, :, :height, :width] = sample.sam
            batch["sizes"][row] = torch.tensor([height, width])
    return batch
