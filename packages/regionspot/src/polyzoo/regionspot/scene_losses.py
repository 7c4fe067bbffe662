"""What SceneSpot learns from: names, borrowed names, outlines, and where things are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from polyzoo.regionspot.losses import focal_loss

_SYNONYM = 30.0


def name_loss(
    embeddings: Tensor, targets: Tensor, vocabulary: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy over a vocabulary in which names that mean nearly the same share the target.

    Args:
        embeddings: Unit `(n, t)`.
        targets: int64 `(n,)`.
        vocabulary: Unit `(v, t)`.
        scale: Multiplies the cosine.

    Returns:
        The loss, and the share of regions whose own name came first.
    """
    logits = scale * embeddings.float() @ vocabulary.T
    shared = (_SYNONYM * (vocabulary[targets] @ vocabulary.T)).softmax(-1)
    loss = -(shared * logits.log_softmax(-1)).sum(-1).mean()
    right = (logits.argmax(-1) == targets).float().mean()
    return loss, right


def borrowed_loss(embeddings: Tensor, teacher: Tensor) -> Tensor:
    """Distance of unit vectors `(n, t)` to what a classifier says about the cropped box."""
    return (1 - (embeddings.float() * teacher).sum(-1)).mean()


def mask_loss(logits: Tensor, masks: Tensor, boxes: Tensor, present: Tensor) -> Tensor:
    """Cross-entropy plus Dice of mask grids over their boxes.

    Args:
        logits: `(b, k, r, r)`.
        masks: bool `(b, k, H, W)` over the whole image.
        boxes: `(b, k, 4)` as shares.
        present: bool `(b, k)`.
    """
    size = logits.shape[-1]
    chosen = masks[present].float()[:, None]
    height, width = chosen.shape[-2:]
    scaled = boxes[present] * boxes.new_tensor([width, height, width, height])
    rows = torch.arange(len(scaled), device=boxes.device, dtype=scaled.dtype)
    wanted = roi_align(
        chosen, torch.cat([rows[:, None], scaled], 1), output_size=size, sampling_ratio=2,
        aligned=True,
    )[:, 0]  # fmt: skip
    found = logits[present].float()
    entropy = F.binary_cross_entropy_with_logits(found, wanted)
    probability = found.sigmoid().flatten(1)
    wanted = wanted.flatten(1)
    dice = 1 - (2 * (probability * wanted).sum(1) + 1) / (probability + wanted).sum(1).add(1)
    return entropy + dice.mean()


@dataclass(frozen=True)
class Places:
    """Where things are, on the grid of proposals."""

    center: Tensor
    """`(b, h, w)`: 1 in the middle of a thing, falling to 0 at its sides; 0 elsewhere."""
    sides: Tensor
    """`(b, 4, h, w)` distances in cells."""
    inside: Tensor
    """bool `(b, h, w)`: near the middle of a thing, where the distances count."""


def places_of(boxes: Tensor, present: Tensor, height: int, width: int) -> Places:
    """Turn boxes into dense targets; the smallest thing wins a cell."""
    b, k = present.shape
    xs = torch.arange(width, device=boxes.device) + 0.5
    ys = torch.arange(height, device=boxes.device) + 0.5
    x, y = xs[None, None, None, :], ys[None, None, :, None]
    x0, y0, x1, y1 = (
        (boxes[..., i] * (width if i % 2 == 0 else height))[..., None, None] for i in range(4)
    )
    sides = torch.stack(
        [(x - x0).expand(b, k, height, width), (y - y0).expand(b, k, height, width),
         (x1 - x).expand(b, k, height, width), (y1 - y).expand(b, k, height, width)], 2,
    )  # fmt: skip
    within = sides.amin(2) > 0
    left, up, right, down = sides.clamp(min=1e-3).unbind(2)
    center = (
        torch.minimum(left, right) / torch.maximum(left, right)
        * torch.minimum(up, down) / torch.maximum(up, down)
    ).sqrt()  # fmt: skip
    area = (x1 - x0) * (y1 - y0)
    area = torch.where(within & present[..., None, None], area.expand_as(center), torch.inf)
    least, which = area.min(1)
    has = least.isfinite()
    center = center.gather(1, which[:, None])[:, 0] * has
    index = which[:, None, None].expand(-1, 1, 4, -1, -1)
    return Places(center, sides.gather(1, index)[:, 0], has & (center > 0.4))


def place_loss(center: Tensor, sides: Tensor, wanted: Places, ignored: Tensor) -> Tensor:
    """Focal loss of the middles, and generalised overlap of the boxes where they count.

    Args:
        center: `(b, h, w)` logits.
        sides: `(b, 4, h, w)` distances in cells.
        wanted: Targets.
        ignored: bool `(b, h, w)`: cells of unlabelled things, neither right nor wrong.
    """
    each = focal_loss(center, wanted.center, alpha=0.5)
    counted = wanted.inside | ~ignored
    middles = (each * counted).sum() / wanted.inside.sum().clamp(min=1)
    found, truth = (t.permute(0, 2, 3, 1)[wanted.inside].float() for t in (sides, wanted.sides))
    area = (found[:, 0] + found[:, 2]) * (found[:, 1] + found[:, 3])
    true_area = (truth[:, 0] + truth[:, 2]) * (truth[:, 1] + truth[:, 3])
    least, most = torch.minimum(found, truth), torch.maximum(found, truth)
    both = (least[:, 0] + least[:, 2]) * (least[:, 1] + least[:, 3])
    hull = (most[:, 0] + most[:, 2]) * (most[:, 1] + most[:, 3])
    union = area + true_area - both
    overlap = both / union - (hull - union) / hull
    return middles + ((1 - overlap).sum() / max(1, len(found)))
