"""From logits of boxes to detections of an evaluation (the published protocol)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

TOP_PAIRS = 900
"""Pairs of box and class that are kept per image."""


@dataclass(frozen=True)
class Detections:
    """Pairs of box and class of one image, best first."""

    boxes: Tensor
    """`(n, 4)` corners."""
    scores: Tensor
    """`(n,)`."""
    classes: Tensor
    """int64 `(n,)`."""
    rows: Tensor
    """int64 `(n,)`: which of the given boxes each one is."""


def best_pairs(
    logits: Tensor,
    boxes: Tensor,
    proposal_scores: Tensor | None = None,
    *,
    top: int = TOP_PAIRS,
    rank: Literal["product", "class"] = "product",
) -> Detections:
    """Score every box with every class and keep the best; a box may give many classes.

    Args:
        logits: `(k, c)`.
        boxes: `(k, 4)`.
        proposal_scores: `(k,)`, multiplied with the probabilities; 1 for ground-truth boxes.
        top: How many pairs stay.
        rank: Which stay, and in which order: by the product with the proposal's score, or, as
            published, by the class probability alone.
    """
    scores = logits.float().softmax(-1)
    weights = scores.new_ones(len(scores)) if proposal_scores is None else proposal_scores
    ranked = scores if rank == "class" else scores * weights[:, None]
    best, place = ranked.flatten().topk(min(top, scores.numel()))
    rows = place // logits.shape[1]
    if rank == "class":
        best = best * weights[rows]
    return Detections(boxes[rows], best, place % logits.shape[1], rows)


def to_image(found: Detections, size: tuple[int, int], raw: tuple[int, int]) -> Detections:
    """Scale boxes from the evaluated to the original image, clip them, and drop empty ones.

    Args:
        found: In the evaluated image.
        size: Height and width of the evaluated image.
        raw: Height and width of the original.
    """
    down, across = raw[0] / size[0], raw[1] / size[1]
    boxes = found.boxes * found.boxes.new_tensor([across, down, across, down])
    limit = boxes.new_tensor([raw[1], raw[0], raw[1], raw[0]])
    boxes = torch.minimum(boxes.clamp(min=0), limit)
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return Detections(boxes[kept], found.scores[kept], found.classes[kept], found.rows[kept])


def resize_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize boolean `(k, H, W)` masks to the nearest pixel."""
    return F.interpolate(masks[:, None].float(), size=size, mode="nearest")[:, 0] > 0
