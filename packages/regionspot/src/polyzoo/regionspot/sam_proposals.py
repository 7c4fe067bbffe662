"""Things found by SAM alone: a grid of points, and the masks that are sure and stable."""

from __future__ import annotations

import torch
from torch import Tensor

from polyzoo.regionspot.boxes import non_maximum
from polyzoo.regionspot.engine import Proposals
from polyzoo.regionspot.geometry import SamFrame
from polyzoo.regionspot.model import RegionSpot

_STABLE = 1.0
"""How far the threshold of a mask's logits is moved to see whether the mask stays."""


@torch.inference_mode()
def propose(
    model: RegionSpot,
    embedding: Tensor,
    frame: SamFrame,
    *,
    points_per_side: int = 32,
    points_per_batch: int = 64,
    least_quality: float = 0.88,
    least_stability: float = 0.95,
    overlap: float = 0.7,
) -> Proposals:
    """Return boxes of masks, best first.

    Args:
        model: On its device.
        embedding: `(c, h, w)` of the image.
        frame: Of the image.
        points_per_side: Of the grid; the cost grows with its square.
        points_per_batch: Prompts decoded at a time.
        least_quality: SAM's own estimate a mask must reach.
        least_stability: Overlap of the masks at a higher and a lower threshold.
        overlap: Boxes that overlap a better one by more are left out.
    """
    places = (torch.arange(points_per_side, device=embedding.device) + 0.5) / points_per_side
    grid = torch.stack(torch.meshgrid(places, places, indexing="xy"), -1).flatten(0, 1)
    points = grid * grid.new_tensor([frame.sam_width, frame.sam_height])
    boxes: list[Tensor] = []
    scores: list[Tensor] = []
    for part in points.split(points_per_batch):
        out = model.decode(
            embedding, points=part[:, None], labels=torch.ones(len(part), 1, device=part.device)
        ).selected(multimask=True)
        assert out.logits is not None  # noqa: S101 - asked for
        assert out.iou is not None  # noqa: S101 - asked for
        logits, quality = out.logits.flatten(0, 1).float(), out.iou.flatten().float()
        sure = (logits > _STABLE).sum((-2, -1)) / (logits > -_STABLE).sum((-2, -1)).clamp(min=1)
        kept = (quality >= least_quality) & (sure >= least_stability)
        found, full = _bounds(logits[kept] > 0, frame, model.config.sam.image_size)
        boxes.append(found[full])
        scores.append(quality[kept][full].clamp(0, 1))
    every, quality = torch.cat(boxes).cpu(), torch.cat(scores).cpu()
    rows = non_maximum(every, quality, overlap=overlap)
    return Proposals(every[rows], quality[rows])


@torch.inference_mode()
def boxes_at(
    model: RegionSpot, embedding: Tensor, frame: SamFrame, points: Tensor, labels: Tensor
) -> Tensor:
    """Return the box of the best mask at each of `(k, p, 2)` pixel prompts, on the CPU.

    A prompt whose best mask is empty gets the smallest box around its points.
    """
    device = embedding.device
    out = model.decode(
        embedding, points=frame.boxes(points.to(device).float()), labels=labels.to(device)
    ).selected(multimask=True)
    assert out.logits is not None  # noqa: S101 - asked for
    assert out.iou is not None  # noqa: S101 - asked for
    best = out.iou.argmax(1)
    logits = out.logits[torch.arange(len(best), device=device), best]
    found, full = _bounds(logits > 0, frame, model.config.sam.image_size)
    corners = points.float()
    around = torch.cat([corners.amin(1) - 1, corners.amax(1) + 1], 1)
    limit = torch.tensor([frame.width, frame.height] * 2, dtype=torch.float32)
    around = torch.minimum(around.cpu().clamp(min=0), limit)
    return torch.where(full[:, None].cpu(), found.cpu(), around)


def _bounds(masks: Tensor, frame: SamFrame, side: int) -> tuple[Tensor, Tensor]:
    """Boxes in the image of `(k, h, w)` low-resolution masks, and which of them hold anything."""
    size = masks.shape[-1]
    cell = side / size
    columns, rows = masks.any(-2), masks.any(-1)
    place = torch.arange(size, device=masks.device)
    x0, y0 = (torch.where(line, place, size).amin(-1) for line in (columns, rows))
    x1, y1 = (torch.where(line, place + 1, 0).amax(-1) for line in (columns, rows))
    boxes = torch.stack([x0, y0, x1, y1], -1).float() * cell
    across, down = frame.width / frame.sam_width, frame.height / frame.sam_height
    boxes = boxes * boxes.new_tensor([across, down, across, down])
    limit = boxes.new_tensor([frame.width, frame.height, frame.width, frame.height])
    boxes = torch.minimum(boxes, limit)
    return boxes, (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
