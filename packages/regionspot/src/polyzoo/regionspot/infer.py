"""The `infer` command."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyzoo.core.errors import DataError, UsageError
from polyzoo.core.images import FORMATS
from polyzoo.core.io import atomic_write
from polyzoo.core.log import progress
from polyzoo.regionspot.options import InferConfig
from polyzoo.regionspot.overlay import draw
from polyzoo.regionspot.pipeline import RegionSpotPipeline
from polyzoo.regionspot.results import RegionResult

_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}


@dataclass(frozen=True)
class InferReport:
    """Results by image."""

    images: list[dict[str, Any]]


def main(config: InferConfig) -> InferReport:
    """Run the command."""
    files = _files(config.image)
    if config.boxes is not None and len(files) > 1 and not _is_coco(config.boxes):
        raise UsageError("--boxes with a folder of images must be a COCO file that names them")
    names = _names(config)
    pipeline = RegionSpotPipeline.from_pretrained(
        config.model, device=config.device, sam_weights=config.sam_weights,
        clip_weights=config.clip_weights,
    )  # fmt: skip
    negative = tuple(n.strip() for n in config.negative.split(",") if n.strip())
    found: list[tuple[Path, RegionResult]] = []
    for file in progress(files, description="images", unit="image", quiet=len(files) < 2):
        session = pipeline.open(file, flip=config.flip)
        boxes, box_format = _boxes(config, file)
        result = session.predict(
            names=names,
            boxes=boxes,
            points=[list(point) for point in config.point] or None,
            auto=boxes is None and not config.point,
            box_format=box_format,
            on_invalid=config.on_invalid,
            masks=config.masks,
            limit=config.limit,
            negative_names=negative,
            min_similarity=config.min_similarity,
            independent=config.independent,
        )
        found.append((file, result))
        if config.overlay is not None:
            several = len(files) > 1
            target = config.overlay / f"{file.stem}.png" if several else config.overlay
            with atomic_write(target) as out:
                draw(session.image, result).save(out, "PNG")
    if config.out is not None:
        _write(config.out, found, config.top)
    return InferReport([{"image": str(f), **r.to_dict(top=config.top)} for f, r in found])


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in _ENDINGS)
    if not files:
        raise DataError(f"{path}: holds no images of the formats {', '.join(FORMATS)}")
    return files


def _names(config: InferConfig) -> list[str]:
    names = [name for name in config.names.split(",") if name.strip()]
    if config.names_file is not None:
        try:
            lines = config.names_file.read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError:
            raise DataError(f"{config.names_file}: no such file") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{config.names_file}: not UTF-8 ({error.reason})") from None
        names += [line for line in lines if line.strip()]
    return names


def _boxes(config: InferConfig, file: Path) -> tuple[Any, Any]:
    if config.boxes is None:
        return None, config.box_format
    try:
        data = json.loads(config.boxes.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{config.boxes}: no such file") from None
    except ValueError as error:
        raise DataError(f"{config.boxes}: is not JSON ({error})") from None
    if isinstance(data, list):
        return data, config.box_format
    images = data.get("images", []) if isinstance(data, dict) else []
    ids = [row["id"] for row in images if Path(str(row.get("file_name", ""))).name == file.name]
    if not ids:
        raise DataError(f"{config.boxes}: a list of boxes, or a COCO file that names {file.name}")
    return [a["bbox"] for a in data.get("annotations", []) if a["image_id"] == ids[0]], "xywh"


def _is_coco(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (OSError, ValueError):
        return False


def _write(path: Path, found: list[tuple[Path, RegionResult]], top: int) -> None:
    if path.name.endswith(".coco.json"):
        rows = [r for place, (_, x) in enumerate(found) for r in x.to_coco(image_id=place + 1)]
        with atomic_write(path, "w") as file:
            json.dump(rows, file)
    elif path.suffix == ".json":
        with atomic_write(path, "w") as file:
            json.dump([{"image": str(f), **r.to_dict(top=top)} for f, r in found], file)
    elif path.suffix == ".csv":
        with atomic_write(path, "w") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "x1", "y1", "x2", "y2", "name", "score"])
            for source, result in found:
                for region in result.regions(top=1):
                    corners = [f"{v:.1f}" for v in region.box]
                    writer.writerow([str(source), *corners, region.name, f"{region.score:.4f}"])
    else:
        raise UsageError(f"--out {path}: the name must end in .json, .coco.json or .csv")


def render(report: InferReport) -> str:
    """The report for people."""
    lines: list[str] = []
    for image in report.images:
        lines.append(f"{image['image']}: {len(image['regions'])} regions")
        for region in image["regions"]:
            box = " ".join(f"{v:6.0f}" for v in region["box"])
            rest = ", ".join(f"{name} {score:.2f}" for name, score in region["top"][1:3])
            mark = "  (rejected)" if region.get("rejected") else ""
            lines.append(f"  {box}  {region['name']} {region['score']:.2f}   {rest}{mark}")
    return "\n".join(lines)
