"""The `extract` command: images and captions to shards of features; goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from polyzoo.core.errors import DataError
from polyzoo.core.io import FolderLock, atomic_write
from polyzoo.core.log import get_logger, progress
from polyzoo.core.weights import write_weights
from polyzoo.pixart_delta.buckets import RESOLUTIONS, nearest_bucket
from polyzoo.pixart_delta.data import EMPTY, LARGEST_RATIO, MANIFEST, read_list
from polyzoo.pixart_delta.options import ExtractConfig
from polyzoo.pixart_delta.pictures import cover, read_picture, to_tensor
from polyzoo.pixart_delta.pipeline import PixArtDeltaPipeline
from polyzoo.pixart_delta.sources import control_maps
from polyzoo.pixart_delta.vae import encode_images

_log = get_logger(__name__)
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class ExtractReport:
    """What was encoded."""

    out: str
    images: int
    """In the manifest."""
    new: int
    """Encoded by this call; the rest was there."""
    bad: int
    """Not readable."""
    too_long: int
    """Left out for a ratio above 4."""


def main(config: ExtractConfig) -> ExtractReport:
    """Run the command."""
    config.out.mkdir(parents=True, exist_ok=True)
    with FolderLock(config.out, purpose="extracting"):
        return _extract(config)


def _extract(config: ExtractConfig) -> ExtractReport:
    rows = _rows(config)
    fitting = [row for row in rows if _ratio(row) <= LARGEST_RATIO]
    done = {row["path"] for row in _stored(config.out)}
    left = [row for row in fitting if row["path"] not in done]
    bad = 0
    if left:
        pipe = PixArtDeltaPipeline.from_pretrained(
            config.model, device=config.device, hed=config.hed
        )
        if not (config.out / EMPTY).is_file():
            empty = pipe.encode([""], negative=True).tokens
            write_weights(config.out / EMPTY, {"caption": empty.half()})
        number = len(list(config.out.glob("shard-*.jsonl")))
        for part in _parts(left, config.shard_size):
            bad += _shard(config, pipe, part, config.out / f"shard-{number:05d}", bad)
            number += 1
    everything = _stored(config.out)
    with atomic_write(config.out / MANIFEST, "w") as file:
        for row in everything:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return ExtractReport(
        str(config.out), len(everything), len(everything) - len(done), bad,
        len(rows) - len(fitting),
    )  # fmt: skip


def _shard(
    config: ExtractConfig,
    pipe: PixArtDeltaPipeline,
    rows: Sequence[dict[str, Any]],
    stem: Path,
    bad_before: int,
) -> int:
    """Encode and write one shard: tensors first, then the list that makes them count."""
    tensors: dict[str, Tensor] = {}
    lines: list[dict[str, Any]] = []
    bad = 0
    for place, row in enumerate(progress(rows, description=f"Encoding {stem.name}")):
        try:
            picture = read_picture(config.images / row["path"])
        except DataError as error:
            bad += 1
            _log.warning("%s: %s", row["path"], error)
            if bad_before + bad > config.bad_limit:
                raise DataError(
                    f"{bad_before + bad} images cannot be read, above "
                    f"bad_limit={config.bad_limit}; the last: {error}"
                ) from error
            continue
        own, facts = _encode(config, pipe, row, picture)
        tensors.update({f"{place}.{name}": value.half().cpu() for name, value in own.items()})
        lines.append({**facts, "shard": f"{stem.name}.safetensors", "place": place})
    write_weights(stem.with_suffix(".safetensors"), tensors)
    with atomic_write(stem.with_suffix(".jsonl"), "w") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return bad


@torch.no_grad()
def _encode(
    config: ExtractConfig, pipe: PixArtDeltaPipeline, row: dict[str, Any], picture: Image.Image
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    original = (picture.height, picture.width)
    height = width = config.resolution
    key = "1.0"
    if config.multi_scale and config.resolution in RESOLUTIONS:
        bucket = nearest_bucket(*original, config.resolution, training=True)
        height, width, key = bucket.height, bucket.width, bucket.key
    images = to_tensor([cover(picture, height, width)]).to(pipe.compute_device)
    posterior = encode_images(pipe.vae, images * 2 - 1)
    found = {"mean": posterior.mean[0], "std": posterior.std[0]}
    if config.control != "none":
        maps = control_maps(images, config.control, pipe.hed)
        control = encode_images(pipe.vae, maps * 2 - 1)
        found["control"] = torch.stack([control.mean[0], control.std[0]])
    prompt = config.prompt or str(row.get("prompt", ""))
    found["caption"] = pipe.encode([prompt], negative=not prompt).tokens
    facts = {
        "path": row["path"], "prompt": prompt, "height": original[0], "width": original[1],
        "ratio": float(key), "key": key, "bucket": [height, width],
    }  # fmt: skip
    return found, facts


def _rows(config: ExtractConfig) -> list[dict[str, Any]]:
    if config.data.is_dir():
        if config.prompt is None:
            raise DataError(f"{config.data}: is a folder; give --prompt, or a list of images")
        paths = sorted(p for p in config.data.rglob("*") if p.suffix.lower() in _SUFFIXES)
        if not paths:
            raise DataError(f"{config.data}: holds no {', '.join(_SUFFIXES)} file")
        return [{"path": str(path.relative_to(config.images))} for path in paths]
    return read_list(config.data)


def _ratio(row: dict[str, Any]) -> float:
    if "ratio" in row:
        return float(row["ratio"])
    height, width = float(row.get("height", 1)), float(row.get("width", 1))
    return max(height / width, width / height)


def _stored(out: Path) -> list[dict[str, Any]]:
    """Rows of complete shards."""
    rows: list[dict[str, Any]] = []
    for path in sorted(out.glob("shard-*.jsonl")):
        rows += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return rows


def _parts(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
