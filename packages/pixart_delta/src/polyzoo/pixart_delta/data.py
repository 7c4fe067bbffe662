"""Encoded images and captions on disk: our shards, and the official feature files (section 7)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from polyzoo.core.errors import DataError
from polyzoo.core.log import get_logger
from polyzoo.core.weights import read_weights
from polyzoo.pixart_delta.batches import LatentBatch
from polyzoo.pixart_delta.buckets import RESOLUTIONS, nearest_bucket
from polyzoo.pixart_delta.captions import PackedCaptions
from polyzoo.pixart_delta.vae import Posterior

_log = get_logger(__name__)
MANIFEST = "manifest.jsonl"
EMPTY = "empty.safetensors"
LARGEST_RATIO = 4.0
"""Images of a larger ratio are left out, as in the official lists."""


@dataclass(frozen=True)
class Features:
    """One image, encoded."""

    mean: Tensor
    """`(4, h, w)` of the posterior, unscaled."""
    std: Tensor
    caption: Tensor
    """`(n, c)` real tokens only."""
    size: Tensor
    """`(2,)` float32: height and width of the original image."""
    ratio: Tensor
    """`(1,)` float32: key of its bucket."""
    control: Tensor | None = None
    """`(2, 4, h, w)`: mean and deviation of the encoded control map."""


class FeatureFiles:
    """Base of the two formats: counts what cannot be read, and takes a neighbour instead."""

    def __init__(self, keys: Sequence[str], *, bad_limit: int) -> None:
        self.keys = tuple(keys)
        """Bucket of each image."""
        self.bad_limit = bad_limit
        self._bad: dict[str, str] = {}
        if not keys:
            raise DataError("the data hold no image")

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Features:
        for offset in range(len(self.keys)):
            place = (index + offset) % len(self.keys)
            if self.keys[place] != self.keys[index]:
                continue
            try:
                return self.read(place)
            except (OSError, ValueError, KeyError) as error:
                self._count(place, error)
        raise DataError(f"no readable image is left in bucket {self.keys[index]}")

    def read(self, index: int) -> Features:
        """Read one image."""
        raise DataError(f"{type(self).__name__} cannot read image {index}")

    def name(self, index: int) -> str:
        """What to call an image in messages."""
        return str(index)

    def _count(self, index: int, error: Exception) -> None:
        name = self.name(index)
        if name not in self._bad:
            self._bad[name] = str(error)
            _log.warning("%s cannot be read (%s); another image takes its place", name, error)
        if len(self._bad) > self.bad_limit:
            raise DataError(
                f"{len(self._bad)} images cannot be read, above bad_limit={self.bad_limit}; the "
                f"last: {name}: {error}"
            ) from error


class ShardedFeatures(FeatureFiles):
    """What `polyzoo pixart-delta extract` writes: manifest.jsonl and safetensors shards.

    Example:
        >>> features = ShardedFeatures("features/1024")
        >>> features[0].mean.shape
        torch.Size([4, 128, 128])
    """

    def __init__(self, folder: str | Path, *, bad_limit: int = 20) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise DataError(
                f"{path}: no such file; `polyzoo pixart-delta extract` writes it when it has ended"
            ) from None
        self.rows = [json.loads(line) for line in lines if line.strip()]
        super().__init__([row["key"] for row in self.rows], bad_limit=bad_limit)

    def read(self, index: int) -> Features:
        """Read one image out of its shard."""
        row = self.rows[index]
        path = str(self.folder / row["shard"])
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            prefix = f"{row['place']}."
            parts = {
                name: file.get_tensor(prefix + name).float()
                for name in ("mean", "std", "caption", "control")
                if prefix + name in names
            }
        return Features(
            parts["mean"], parts["std"], parts["caption"],
            torch.tensor([float(row["height"]), float(row["width"])]),
            torch.tensor([float(row["ratio"])]),
            parts.get("control"),
        )  # fmt: skip

    def name(self, index: int) -> str:
        """Path of the original image."""
        return self.rows[index]["path"]

    def empty(self) -> Tensor | None:
        """`(n, c)` encoding of the empty prompt."""
        path = self.folder / EMPTY
        return read_weights(path)["caption"].float() if path.is_file() else None


class OfficialFeatures(FeatureFiles):
    """The official feature files: .npz captions, .npy posteriors, HED .npz."""

    def __init__(
        self,
        root: str | Path,
        *,
        resolution: int,
        multi_scale: bool,
        control: bool = False,
        bad_limit: int = 20,
    ) -> None:
        """Read data_info.json.

        Args:
            root: Folder with it (or a partition folder of it) and the feature folders.
            resolution: In the feature folders' names, and of the buckets.
            multi_scale: Which of the two image folders to read.
            control: Also read hed_feature_R.
            bad_limit: Unreadable images allowed.
        """
        self.root = Path(root)
        rows = _read_list(self.root)
        self.rows = [row for row in rows if float(row.get("ratio", 1)) <= LARGEST_RATIO]
        self.multi_scale = multi_scale
        self.captions = _first_folder(
            self.root, ("caption_feature_wmask", "caption_features"), "caption"
        )
        names = (
            (f"img_vae_fatures_{resolution}_multiscale/ms",  # the published spelling
             f"img_vae_features_{resolution}_multiscale/ms")
            if multi_scale
            else (f"img_vae_features_{resolution}resolution/noflip",)
        )  # fmt: skip
        self.images = _first_folder(self.root, names, "image")
        self.control = self.root / f"hed_feature_{resolution}" if control else None
        keys = [
            nearest_bucket(row["height"], row["width"], resolution, training=True).key
            if multi_scale and resolution in RESOLUTIONS
            else "1.0"
            for row in self.rows
        ]
        super().__init__(keys, bad_limit=bad_limit)

    def read(self, index: int) -> Features:
        """Read one image's files."""
        row = self.rows[index]
        path = Path(row["path"])
        flat = "_".join(path.with_suffix("").parts[-2:])
        with np.load(self.captions / f"{flat}.npz", allow_pickle=False) as stored:
            states = torch.from_numpy(stored["caption_feature"].astype(np.float32))
            mask = (
                torch.from_numpy(stored["attention_mask"].astype(np.int64))
                if "attention_mask" in stored.files
                else torch.ones(states.shape[:2], dtype=torch.int64)
            )
        caption = PackedCaptions.from_padded(states.reshape(1, -1, states.shape[-1]),
                                             mask.reshape(1, -1)).tokens  # fmt: skip
        posterior = _posterior(np.load(self.images / f"{flat}.npy", allow_pickle=False))
        control = None
        if self.control is not None:
            with np.load(self.control / path.with_suffix(".npz"), allow_pickle=False) as stored:
                control = torch.stack(_posterior(stored["arr_0"]))
        return Features(
            *posterior, caption,
            torch.tensor([float(row["height"]), float(row["width"])]),
            torch.tensor([float(self.keys[index])]),
            control,
        )  # fmt: skip

    def name(self, index: int) -> str:
        """Path of the original image."""
        return self.rows[index]["path"]


def _posterior(values: np.ndarray) -> tuple[Tensor, Tensor]:
    tensor = torch.from_numpy(values.astype(np.float32)).reshape(8, *values.shape[-2:])
    return tensor[:4], tensor[4:]


def _first_folder(root: Path, names: Sequence[str], what: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(f"{root}: holds no folder of {what} features: {' or '.join(names)}")


@lru_cache(maxsize=4)
def _read_list(root: Path) -> tuple[Mapping[str, Any], ...]:
    places = [root / "data_info.json", *sorted(root.glob("partition*/data_info.json"))]
    for path in places:
        if path.is_file():
            return tuple(read_list(path))
    raise DataError(f"{root}: holds no data_info.json")


def read_list(path: Path) -> list[dict[str, Any]]:
    """Read a list of images: a JSON list, or one JSON object per line.

    Raises:
        DataError: The file is missing, or an entry lacks its path.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    try:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: is no JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds {type(rows).__name__}; expected a list of images")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("path"), str):
            raise DataError(f"{path}, entry {number}: needs an object with a text 'path'")
    return rows


@dataclass(frozen=True)
class FeatureBatch:
    """b images of one bucket, as the loader gives them."""

    mean: Tensor
    std: Tensor
    captions: PackedCaptions
    size: Tensor
    ratio: Tensor
    control: Tensor | None


def collate_features(rows: list[Features]) -> FeatureBatch:
    """Stack a batch; captions are packed."""
    captions = PackedCaptions(
        torch.cat([row.caption for row in rows]), tuple(len(row.caption) for row in rows)
    )
    controls = [row.control for row in rows if row.control is not None]
    return FeatureBatch(
        torch.stack([row.mean for row in rows]),
        torch.stack([row.std for row in rows]),
        captions,
        torch.stack([row.size for row in rows]),
        torch.stack([row.ratio for row in rows]),
        torch.stack(controls) if len(controls) == len(rows) else None,
    )


def latent_batch(
    batch: FeatureBatch, generator: torch.Generator, *, multi_scale: bool
) -> LatentBatch:
    """Draw posterior samples."""

    def drawn(mean: Tensor, std: Tensor) -> Tensor:
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        return Posterior(mean, std).sample(noise)

    control = None
    if batch.control is not None:
        control = drawn(batch.control[:, 0], batch.control[:, 1])
    return LatentBatch(
        drawn(batch.mean, batch.std),
        batch.captions,
        size=batch.size if multi_scale else None,
        ratio=batch.ratio if multi_scale else None,
        control=control,
    )
