"""The `eval` command: names given boxes, and average precision of boxes with names."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyzoo.core.errors import DataError
from polyzoo.core.log import get_logger, progress
from polyzoo.regionspot.data import Annotated, Dataset, read_annotations
from polyzoo.regionspot.metrics import TopK, average_precision, top_k
from polyzoo.regionspot.names import clean_name
from polyzoo.regionspot.options import EvalConfig
from polyzoo.regionspot.pipeline import RegionSpotPipeline, Session
from polyzoo.regionspot.postprocess import best_pairs
from polyzoo.regionspot.text import TextClassifier

_log = get_logger(__name__)


@dataclass(frozen=True)
class EvalReport:
    """Figures of a model on a data set."""

    images: int
    boxes: int
    names: int
    top1: float | None
    top5: float | None
    ms_per_image: float
    """Looking at the image and naming its boxes, without reading the file."""
    box_ap: dict[str, float] | None
    mask_ap: dict[str, float] | None
    baseline: dict[str, float] | None
    """top1, top5 and ms_per_image of crops named by a classifier and MiniLM."""
    made_by: dict[str, str]


def main(config: EvalConfig) -> EvalReport:
    """Run the command."""
    dataset = read_annotations(config.annotations, config.images)
    pipeline = RegionSpotPipeline.from_pretrained(
        config.model, device=config.device, sam_weights=config.sam_weights,
        clip_weights=config.clip_weights,
    )  # fmt: skip
    return evaluate(config, dataset, pipeline)


def evaluate(config: EvalConfig, dataset: Dataset, pipeline: RegionSpotPipeline) -> EvalReport:
    """Measure a pipeline on a data set."""
    images = dataset.images[: config.limit]
    if not images:
        raise DataError(f"{config.annotations}: holds no image with a box")
    names = [clean_name(name, config.names) for name in dataset.names]
    classifier = pipeline.classifier(list(dict.fromkeys(names)))
    columns = torch.tensor([classifier.names.index(name.strip()) for name in names])
    proposals = None if config.proposals is None else _read_proposals(config.proposals)
    masks = config.masks and config.protocol != "top"
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    results: list[dict[str, Any]] = []
    seconds = 0.0
    pipeline.open(images[0].file).predict(names=classifier, boxes=images[0].boxes, masks=False)
    for image in progress(images, description="evaluate", unit="image"):
        boxes, scores = image.boxes, None
        if proposals is not None:
            boxes, scores = proposals.get(image.id, (torch.zeros(0, 4), torch.zeros(0)))
        logits, kept, session, spent = _named(pipeline, classifier, image, boxes, flip=config.flip)
        seconds += spent
        logits = logits[:, columns]
        if proposals is None:
            rows.append(logits)
            labels.append(image.labels[kept])
        if config.protocol != "top" and len(logits):
            given = boxes[kept]
            found = best_pairs(logits, given, None if scores is None else scores[kept])
            outlines = session.view.masks(given) if masks else None
            for box, score, row, which in zip(
                found.boxes.tolist(), found.scores.tolist(), found.classes.tolist(),
                found.rows.tolist(), strict=True,
            ):  # fmt: skip
                results.append(
                    {
                        "image_id": image.id,
                        "category_id": dataset.category_ids[row],
                        "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                        "score": score,
                        **({} if outlines is None else {"segmentation": outlines[which].to_coco()}),
                    }
                )
    named: TopK | None = None
    if proposals is None:
        named = top_k(torch.cat(rows), torch.cat(labels))
    box_ap = mask_ap = None
    if config.protocol != "top":
        ids = [image.id for image in images]
        box_ap = average_precision(
            config.annotations, results, protocol=config.protocol, kind="bbox", image_ids=ids
        )
        if masks:
            mask_ap = average_precision(
                config.annotations, results, protocol=config.protocol, kind="segm", image_ids=ids
            )
    return EvalReport(
        images=len(images),
        boxes=sum(len(image.labels) for image in images),
        names=len(names),
        top1=None if named is None else named.top1,
        top5=None if named is None else named.top5,
        ms_per_image=seconds / len(images) * 1e3,
        box_ap=box_ap,
        mask_ap=mask_ap,
        baseline=_baseline(images, names) if config.baseline else None,
        made_by=dict(pipeline.engine.describe()),
    )


def _named(
    pipeline: RegionSpotPipeline,
    classifier: TextClassifier,
    image: Annotated,
    boxes: Tensor,
    *,
    flip: bool,
) -> tuple[Tensor, Tensor, Session, float]:
    from polyzoo.regionspot.inputs import read_image

    picture = read_image(image.file)
    start = time.perf_counter()
    session = pipeline.open(picture, flip=flip)
    result = session.predict(names=classifier, boxes=boxes, masks=False, on_invalid="drop")
    return result.logits, result.rows, session, time.perf_counter() - start


def _baseline(images: Sequence[Annotated], names: Sequence[str]) -> dict[str, float]:
    """Crops through the classifier, its class names' MiniLM vectors averaged (no training)."""
    from polyzoo.regionspot.inputs import read_image
    from polyzoo.towers import Conse, crop_boxes, load_classifier, load_text_tower

    text = load_text_tower("minilm")
    conse = Conse(load_classifier(), text)
    queries = text.encode(list(names))
    rows: list[Tensor] = []
    seconds = 0.0
    for image in progress(images, description="baseline", unit="image"):
        picture = read_image(image.file)
        start = time.perf_counter()
        crops = crop_boxes(picture, image.boxes.tolist())
        rows.append(conse.vectors(crops).cpu() @ queries.cpu().T)
        seconds += time.perf_counter() - start
    found = top_k(torch.cat(rows), torch.cat([image.labels for image in images]))
    return {
        "top1": found.top1,
        "top5": found.top5,
        "ms_per_image": seconds / len(images) * 1e3,
    }


def _read_proposals(path: Path) -> dict[int, tuple[Tensor, Tensor]]:
    """`{image id: {"boxes": [[x1, y1, x2, y2], ...], "scores": [...]}}`."""
    try:
        data = json.loads(path.read_bytes())
        return {
            int(identity): (
                torch.tensor(np.array(row["boxes"], dtype=np.float32).reshape(-1, 4)),
                torch.tensor(np.array(row["scores"], dtype=np.float32)),
            )
            for identity, row in data.items()
        }
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f'{path}: must be JSON such as {{"17": {{"boxes": [[x1, y1, x2, y2]], "scores": '
            f"[0.9]}}}} ({error!r})"
        ) from error


def render(report: EvalReport) -> str:
    """The report for people."""
    lines = [f"{report.images} images, {report.boxes} boxes, {report.names} names"]
    if report.top1 is not None and report.top5 is not None:
        lines.append(
            f"top-1 {report.top1:.3f}, top-5 {report.top5:.3f}, {report.ms_per_image:.0f} ms an "
            "image"
        )
    if report.baseline is not None:
        lines.append(
            f"crops and a classifier: top-1 {report.baseline['top1']:.3f}, top-5 "
            f"{report.baseline['top5']:.3f}, {report.baseline['ms_per_image']:.0f} ms an image"
        )
    for kind, figures in (("box", report.box_ap), ("mask", report.mask_ap)):
        if figures is not None:
            text = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
            lines.append(f"{kind}: {text}")
    return "\n".join(lines)
