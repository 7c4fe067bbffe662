"""What the published code does differently, for those who need its exact numbers.

Ours: padding instead of repetition, explicit class ids, proposals scaled along their own axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def repeat_rows(rows: Tensor, count: int) -> Tensor:
    """Repeat `(k, ...)` rows to `count`; the last get a copy more where k does not divide it."""
    copies, more = divmod(count, len(rows))
    each = [copies + (place >= len(rows) - more) for place in range(len(rows))]
    return rows.repeat_interleave(torch.tensor(each, device=rows.device), 0)


def shift_labels(ids: Tensor) -> Tensor:
    """Return class ids less 1, where 0 stays 0 and so collides with 1."""
    return (ids - 1).clamp(min=0)


def scale_proposals(
    boxes: Tensor, raw: tuple[int, int], current: tuple[int, int], frame: tuple[int, int]
) -> Tensor:
    """Bring proposals to SAM's frame with the two axes' ratios exchanged.

    Args:
        boxes: `(k, 4)` in the original image.
        raw: Its height and width.
        current: Height and width of the image that is evaluated.
        frame: Height and width of that image in SAM's square.
    """
    boxes = boxes * boxes.new_tensor([current[0] / raw[0], current[1] / raw[1]]).repeat(2)
    return boxes * boxes.new_tensor([frame[1] / current[1], frame[0] / current[0]]).repeat(2)


def whole_image(height: int, width: int) -> Tensor:
    """Return the box that stands in where there is none, its sides exchanged."""
    return torch.tensor([[0.0, 0.0, float(height), float(width)]])


def pad_labels(labels: Sequence[Tensor]) -> Tensor:
    """Repeat each image's labels to the batch's largest count."""
    most = max(len(x) for x in labels)
    return torch.stack([repeat_rows(x, most) for x in labels])
