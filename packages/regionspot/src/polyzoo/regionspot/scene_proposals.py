"""Things found by SceneSpot: middles with their sides, and islands of saliency."""

from __future__ import annotations

import torch
from torch import Tensor

from polyzoo.regionspot.boxes import non_maximum
from polyzoo.regionspot.engine import Proposals
from polyzoo.regionspot.scene_model import SceneMaps

_THRESHOLDS = (0.3, 0.5, 0.7)
_LEAST_CELLS = 4
_OVERLAP = 0.55
_CANDIDATES = 200
_LEAST_SHARE = 0.012
"""Share of the image that a region found automatically must have."""
_SIZE = 0.1
_INSIDE = 0.8
_PIECES = 8


@torch.inference_mode()
def propose(maps: SceneMaps, *, limit: int, least: float = 0.12) -> Proposals:
    """Return boxes as shares of the image, best first.

    Args:
        maps: Of one image.
        limit: At most so many.
        least: Score a box must reach.
    """
    saliency = maps.saliency[0].float().sigmoid().cpu()
    boxes, scores = _middles(maps)
    islands, island_scores = _islands(saliency)
    every = torch.cat([islands, boxes])
    ranked = torch.cat([island_scores, scores])
    share = (every[:, 2:] - every[:, :2]).clamp(min=0).prod(1)
    kept = (ranked >= least) & (share >= _LEAST_SHARE)
    every, ranked, share = every[kept], ranked[kept], share[kept]
    # A large thing is more likely to be what the picture is about.
    order = ranked * share.pow(_SIZE)
    rows = non_maximum(every, order, overlap=_OVERLAP)
    rows = rows[_apart(every[rows])][:limit]
    return Proposals(every[rows], ranked[rows])


def _apart(boxes: Tensor) -> Tensor:
    """Rows of boxes, best first, that do not lie in a better one of at most a few times the size.

    A small thing on a large one stays; a piece of the same thing goes.
    """
    kept: list[int] = []
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for row, box in enumerate(boxes):
        others = boxes[kept]
        low, high = torch.maximum(box[:2], others[:, :2]), torch.minimum(box[2:], others[:, 2:])
        both = (high - low).clamp(min=0).prod(1)
        smaller = torch.minimum(area[row], area[kept])
        alike = torch.maximum(area[row], area[kept]) < _PIECES * smaller
        if not bool(((both > _INSIDE * smaller) & alike).any()):
            kept.append(row)
    return torch.tensor(kept, dtype=torch.long)


@torch.inference_mode()
def boxes_at(maps: SceneMaps, points: Tensor, labels: Tensor) -> Tensor:
    """Return a box for each prompt: around all that its inner points see, without outer ones.

    Args:
        maps: Of one image.
        points: `(k, p, 2)` as shares.
        labels: `(k, p)`: 1 inside, 0 outside.
    """
    dense = _dense_boxes(maps)
    height, width = dense.shape[:2]
    found: list[Tensor] = []
    for prompt, kinds in zip(points, labels, strict=True):
        inside = prompt[kinds == 1]
        inner = inside if len(inside) else prompt
        x = (inner[:, 0] * width).long().clamp(0, width - 1)
        y = (inner[:, 1] * height).long().clamp(0, height - 1)
        seen = dense[y, x]
        low = torch.minimum(seen[:, :2].amin(0), inner.amin(0))
        high = torch.maximum(seen[:, 2:].amax(0), inner.amax(0))
        found.append(torch.cat([low, high]).clamp(0, 1))
    return torch.stack(found) if found else points.new_zeros(0, 4)


def _dense_boxes(maps: SceneMaps) -> Tensor:
    """`(h, w, 4)`: the box each cell sees around itself, as shares."""
    left, up, right, down = maps.sides[0].float().cpu()
    height, width = left.shape
    x = torch.arange(width)[None, :] + 0.5
    y = torch.arange(height)[:, None] + 0.5
    boxes = torch.stack(
        [(x - left) / width, (y - up) / height, (x + right) / width, (y + down) / height], -1
    )
    return boxes.clamp(0, 1)


def _middles(maps: SceneMaps) -> tuple[Tensor, Tensor]:
    center = maps.center[0].float().sigmoid().cpu()
    peak = torch.nn.functional.max_pool2d(center[None], 3, stride=1, padding=1)[0]
    flat = torch.where(center >= peak, center, 0.0).flatten()
    scores, places = flat.topk(min(_CANDIDATES, flat.numel()))
    return _dense_boxes(maps).flatten(0, 1)[places], scores


def _islands(saliency: Tensor) -> tuple[Tensor, Tensor]:
    """Connected parts above several thresholds; the score is the mean saliency inside."""
    height, width = saliency.shape
    boxes: list[list[float]] = []
    scores: list[float] = []
    for threshold in _THRESHOLDS:
        for cells in _connected(saliency > threshold):
            if len(cells) < _LEAST_CELLS:
                continue
            y, x = cells.unbind(1)
            boxes.append(
                [int(x.min()) / width, int(y.min()) / height,
                 (int(x.max()) + 1) / width, (int(y.max()) + 1) / height]
            )  # fmt: skip
            scores.append(float(saliency[y, x].mean()))
    if not boxes:
        return torch.zeros(0, 4), torch.zeros(0)
    return torch.tensor(boxes), torch.tensor(scores)


def _connected(mask: Tensor) -> list[Tensor]:
    """Cells `(n, 2)` of each 4-connected part."""
    height, width = mask.shape
    labels = torch.where(mask, torch.arange(1, height * width + 1).view(height, width), 0)
    while True:
        grown = torch.nn.functional.max_pool2d(
            labels[None].float(), (3, 1), stride=1, padding=(1, 0)
        )
        grown = torch.nn.functional.max_pool2d(grown, (1, 3), stride=1, padding=(0, 1))[0]
        grown = torch.where(mask, grown.long(), 0)
        if torch.equal(grown, labels):
            break
        labels = grown
    return [(labels == value).nonzero() for value in labels.unique().tolist() if value]
