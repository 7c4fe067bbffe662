"""SAM's region tokens and CLIP's small images, computed once and kept in shards."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from polyzoo.core.device import resolve_device
from polyzoo.core.errors import DataError
from polyzoo.core.io import atomic_write
from polyzoo.core.log import get_logger, progress
from polyzoo.core.weights import read_metadata, read_weights, write_weights
from polyzoo.regionspot import geometry
from polyzoo.regionspot import sam as sams
from polyzoo.regionspot.config import SAMS, SamConfig
from polyzoo.regionspot.data import Annotated, Dataset, Sample, read_annotations, squashed_uint8
from polyzoo.regionspot.folders import fill_tower
from polyzoo.regionspot.inputs import read_image
from polyzoo.regionspot.mask_decoder import decode
from polyzoo.regionspot.options import CacheConfig
from polyzoo.regionspot.text import fingerprint

_log = get_logger(__name__)
HEADER = "cache.json"
FORMAT = 1


@dataclass(frozen=True)
class CacheReport:
    """A finished cache."""

    out: str
    images: int
    boxes: int
    made: int
    """Images computed by this call; the others were there."""
    bytes_per_image: float
    seconds: float


class TokenMaker:
    """SAM from image to region tokens."""

    def __init__(self, sam: Any, config: SamConfig, device: torch.device) -> None:
        self.sam = sam.to(device).eval().requires_grad_(False)
        self.config, self.device = config, device

    @torch.inference_mode()
    def tokens(self, image: Image.Image, boxes: Tensor) -> Tensor:
        """Return the single-mask token of each box, float16 `(k, c)` on the CPU."""
        frame = geometry.sam_frame(image.height, image.width, self.config.image_size)
        pixels = geometry.sam_pixels(image, frame).to(self.device).float()
        amp = torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"
        )
        with amp:
            embedding = sams.encode_image(
                self.sam.image_encoder, sams.preprocess(self.sam, pixels)[None]
            )
            sparse, dense = sams.encode_prompts(
                self.sam.prompt_encoder, boxes=frame.boxes(boxes.to(self.device))
            )
            positions = self.sam.prompt_encoder.get_dense_pe()
            out = decode(self.sam.mask_decoder, embedding, positions, sparse, dense, masks=False)
        return out.tokens[:, 0].half().cpu()


def main(config: CacheConfig) -> CacheReport:
    """Run the command."""
    device = resolve_device(config.device)
    dataset = read_annotations(config.annotations, config.images)
    if dataset.without_boxes or dataset.broken_boxes:
        _log.warning(
            "%d images without boxes and %d boxes without area are left out",
            dataset.without_boxes, dataset.broken_boxes,
        )  # fmt: skip
    shape = SAMS[config.sam]
    torch.manual_seed(0)
    sam = sams.build_sam(shape)
    if config.sam_weights is not None:
        fill_tower(sam, config.sam_weights)
    else:
        _log.warning("no --sam-weights: SAM is random, and the tokens are for timing only")
    maker = TokenMaker(sam, shape, device)
    return build_cache(
        dataset, maker, config.out,
        image_size=config.image_size, antialias=config.antialias, flips=config.flips,
        shard=config.shard, limit=config.limit,
    )  # fmt: skip


def build_cache(
    dataset: Dataset,
    maker: TokenMaker,
    out: Path,
    *,
    image_size: int,
    antialias: bool = False,
    flips: bool = True,
    shard: int = 512,
    limit: int | None = None,
) -> CacheReport:
    """Write shard after shard; those already there, and made of the same, are kept.

    Raises:
        DataError: The folder holds a cache of another SAM, size or annotation file.
    """
    start = time.perf_counter()
    images = dataset.images[:limit]
    if not images:
        raise DataError("the annotations have no image with a box: there is nothing to cache")
    header = {
        "format": FORMAT,
        "sam": fingerprint(maker.sam),
        "sam_side": maker.config.image_size,
        "image_size": image_size,
        "antialias": antialias,
        "flips": flips,
        "annotations": dataset.digest,
        "names": list(dataset.names),
        "shard": shard,
        "images": len(images),
    }
    _check_header(out, header)
    made = boxes = size = 0
    parts = [images[i : i + shard] for i in range(0, len(images), shard)]
    with progress(total=len(images), description="cache", unit="image") as bar:
        for place, part in enumerate(parts):
            path = out / f"tokens-{place:05d}.safetensors"
            if not _is_whole(path, part):
                _write_shard(path, part, maker, image_size, antialias=antialias, flips=flips)
                made += len(part)
            boxes += sum(len(row.labels) for row in part)
            size += path.stat().st_size
            bar.update(len(part))
    return CacheReport(
        out=str(out),
        images=len(images),
        boxes=boxes,
        made=made,
        bytes_per_image=size / len(images),
        seconds=time.perf_counter() - start,
    )


def _check_header(out: Path, header: dict[str, object]) -> None:
    path = out / HEADER
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        for name, value in header.items():
            if found.get(name) != value:
                raise DataError(
                    f"{out}: this cache has {name} {_short(found.get(name))}, this call asks for "
                    f"{_short(value)}; choose another --out, or remove the folder"
                )
        return
    with atomic_write(path, "w") as file:
        json.dump(header, file)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:20]}..."


def _write_shard(
    path: Path,
    part: Sequence[Annotated],
    maker: TokenMaker,
    size: int,
    *,
    antialias: bool,
    flips: bool,
) -> None:
    tokens: list[Tensor] = []
    mirrored: list[Tensor] = []
    pictures: list[Tensor] = []
    for row in part:
        image = read_image(row.file)
        tokens.append(maker.tokens(image, row.boxes))
        if flips:
            flipped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            boxes = row.boxes[:, [2, 1, 0, 3]].clone()
            boxes[:, [0, 2]] = image.width - boxes[:, [0, 2]]
            mirrored.append(maker.tokens(flipped, boxes))
        pictures.append(squashed_uint8(image, size, antialias=antialias))
    counts = torch.tensor([len(row.labels) for row in part])
    tensors = {
        "tokens": torch.cat(tokens),
        "counts": counts,
        "labels": torch.cat([row.labels for row in part]),
        "boxes": torch.cat([row.boxes for row in part]),
        "images": torch.stack(pictures),
        "ids": torch.tensor([row.id for row in part]),
    }
    if flips:
        tensors["mirrored"] = torch.cat(mirrored)
    write_weights(path, tensors, metadata={"boxes": _boxes_digest(part)})


def _is_whole(path: Path, part: Sequence[Annotated]) -> bool:
    return path.is_file() and read_metadata(path).get("boxes") == _boxes_digest(part)


def _boxes_digest(part: Sequence[Annotated]) -> str:
    digest = hashlib.sha256()
    for row in part:
        digest.update(f"{row.id}:".encode())
        digest.update(row.boxes.numpy().tobytes() + row.labels.numpy().tobytes())
    return digest.hexdigest()


class CachedData:
    """Samples out of a cache; with mirrored tokens, half of them are flipped in both towers."""

    def __init__(
        self,
        folder: str | Path,
        *,
        sam: str | None = None,
        image_size: int | None = None,
        augmented: bool = True,
    ) -> None:
        """Read every shard.

        Args:
            folder: Of `polyzoo regionspot cache`.
            sam: Fingerprint of the SAM that must have made it; any where not given.
            image_size: CLIP's input; must be the cache's.
            augmented: Whether samples are flipped at random.

        Raises:
            DataError: Not a cache, not finished, or made of something else.
        """
        folder = Path(folder)
        try:
            header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{folder}: is no cache ({HEADER} is missing)") from None
        if sam is not None and header["sam"] != sam:
            raise DataError(
                f"{folder}: tokens of SAM {header['sam'][:12]}, this model has {sam[:12]}; make "
                "the cache again with its weights"
            )
        if image_size is not None and header["image_size"] != image_size:
            raise DataError(
                f"{folder}: images of {header['image_size']} pixels, this CLIP reads {image_size}"
            )
        self.names: tuple[str, ...] = tuple(header["names"])
        self.augmented = augmented and bool(header["flips"])
        count = -(-header["images"] // header["shard"])
        self._shards: list[dict[str, Tensor]] = []
        self._starts: list[Tensor] = []
        self._places: list[tuple[int, int]] = []
        for place in range(count):
            path = folder / f"tokens-{place:05d}.safetensors"
            if not path.is_file():
                raise DataError(
                    f"{folder}: not finished, {path.name} is missing; run the same "
                    "`polyzoo regionspot cache` again, it goes on where it stopped"
                )
            shard = read_weights(path)
            self._shards.append(shard)
            self._starts.append(
                torch.cat([torch.zeros(1, dtype=torch.long), shard["counts"].cumsum(0)])
            )
            self._places += [(place, row) for row in range(len(shard["counts"]))]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        place, row = self._places[index]
        shard, starts = self._shards[place], self._starts[place]
        part = slice(int(starts[row]), int(starts[row + 1]))
        # The loader seeds torch's generator for each batch.
        flip = self.augmented and bool(torch.rand(()) < 0.5)
        image = shard["images"][row]
        return Sample(
            clip=image.flip(-1) if flip else image,
            labels=shard["labels"][part],
            tokens=shard["mirrored" if flip else "tokens"][part],
        )
