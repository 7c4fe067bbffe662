"""Boxes around what stands out, without a detector: saliency, cut into connected parts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from polyzoo.core.errors import DataError
from polyzoo.towers.dinov2 import DinoV2
from polyzoo.towers.pictures import Picture, image_batch, rgb_image


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """One part of a picture that stands out."""

    box: tuple[float, float, float, float]
    """Left, top, right, bottom in the picture's pixels."""
    score: float
    """Mean saliency inside the part, 0 to 1."""
    share: float
    """Part of the picture's area, 0 to 1."""


@torch.no_grad()
def propose(
    picture: Picture,
    model: DinoV2,
    *,
    threshold: float = 0.5,
    least_share: float = 0.002,
    side: int = 448,
    limit: int = 20,
) -> list[Proposal]:
    """Find parts of a picture that stand out, whatever they are.

    Args:
        picture: The picture.
        model: DINOv2 with its saliency head.
        threshold: Saliency above which a pixel stands out, in (0, 1).
        least_share: Parts below this share of the picture's area are dropped.
        side: Longer side in pixels at which the picture is looked at (rounded to whole patches);
            more finds smaller things.
        limit: Most parts returned.

    Returns:
        Parts, the largest first.

    Raises:
        DataError: A value is out of its range.
    """
    if not 0 < threshold < 1:
        raise DataError(f"threshold={threshold} must be above 0 and below 1")
    patch = model.config.patch
    if side < patch or limit < 1 or least_share < 0:
        raise DataError(
            f"side={side} must be at least {patch}, limit={limit} at least 1, "
            f"least_share={least_share} at least 0"
        )
    image = rgb_image(picture)
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale / patch)) * patch for length in image.size)
    parameter = next(model.parameters())
    batch = image_batch([image], size=(height, width)).to(parameter.device, parameter.dtype)
    saliency = model.saliency(batch)[0, 0].cpu().numpy()
    found = []
    for part in connected_parts(saliency > threshold):
        if part.sum() < least_share * part.size:
            continue
        rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
        x, y = image.width / width, image.height / height
        box = (columns[0] * x, rows[0] * y, (columns[-1] + 1) * x, (rows[-1] + 1) * y)
        found.append(
            Proposal(
                box=tuple(float(value) for value in box),  # pyright: ignore
                score=float(saliency[part].mean()),
                share=float(part.mean()),
            )
        )
    return sorted(found, key=lambda proposal: -proposal.share)[:limit]


def connected_parts(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Split a mask into parts whose pixels touch at sides or corners, in reading order.

    Args:
        mask: bool `(H, W)`.

    Returns:
        Masks `(H, W)` that do not overlap and together are the mask.
    """
    labels = np.zeros(mask.shape, np.int64)
    parents = [0]

    def root(label: int) -> int:
        while parents[label] != label:
            parents[label] = parents[parents[label]]
            label = parents[label]
        return label

    # Two passes over runs of pixels: a run takes the label of any run above that it touches.
    above: list[tuple[int, int, int]] = []
    for row in range(mask.shape[0]):
        edges = np.flatnonzero(np.diff(np.concatenate(([0], mask[row].astype(np.int8), [0]))))
        runs: list[tuple[int, int, int]] = []
        for start, end in edges.reshape(-1, 2).tolist():
            touching = [root(label) for a, b, label in above if a <= end and b >= start]
            if touching:
                label = min(touching)
                for other in touching:
                    parents[other] = label
            else:
                label = len(parents)
                parents.append(label)
            runs.append((start, end, label))
            labels[row, start:end] = label
        above = runs
    final = np.array([root(label) for label in range(len(parents))])[labels]
    return [final == label for label in np.unique(final) if label]
