"""The training objective."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def focal_loss(
    logits: Tensor, targets: Tensor, *, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Sigmoid focal loss of every entry, in fp32 and without overflow.

    Args:
        logits: Any shape.
        targets: The same shape, 0 to 1.
        alpha: Weight of positives; negatives weigh `1 - alpha`.
        gamma: How much easy entries count less.
    """
    logits, targets = logits.float(), targets.float()
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    probability = logits.sigmoid()
    missed = probability * (1 - targets) + (1 - probability) * targets
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return weight * missed.pow(gamma) * entropy


def region_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    present: Tensor | None = None,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    """Focal loss summed over images and classes, of the mean over each image's boxes.

    This is the published objective; there boxes were repeated to the batch's maximum, here they
    are padded and padding does not count.

    Args:
        logits: `(b, k, c)`.
        labels: int64 `(b, k)`; what stands in padded rows is not read.
        present: bool `(b, k)`; all where not given.
        alpha: See `focal_loss`.
        gamma: See `focal_loss`.
    """
    if present is not None:
        labels = labels.where(present, 0)
    targets = F.one_hot(labels, logits.shape[-1]).to(torch.float32)
    each = focal_loss(logits, targets, alpha=alpha, gamma=gamma).sum(-1)
    if present is None:
        return each.mean(1).sum()
    counted = each.where(present, 0.0).sum(1) / present.sum(1).clamp(min=1)
    return counted.sum()
