"""The objectives of both stages, as pure functions (sections 3.1 and 3.2 of the specification)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

QUANTISATION, RECONSTRUCTION, GENERATION = 5.0, 2.0, 0.5


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    temperature: Tensor,
    *,
    all_images: Tensor | None = None,
    all_texts: Tensor | None = None,
    first: int = 0,
    smoothing: float = 0.1,
    same: Tensor | None = None,
) -> Tensor:
    """Symmetric cross-entropy between images and their captions (stage 1).

    Gathered vectors carry no gradient, not even the own ones: it flows through the rows only.

    Args:
        image: (b, d) unit vectors.
        text: (b, d) unit vectors of their captions.
        temperature: Scalar that divides the similarities.
        all_images: (n, d) of all processes; the own ones where not given.
        all_texts: The same for captions.
        first: Row of the own first pair among all.
        smoothing: Label smoothing.
        same: bool (b, n), True where another pair has the same meaning; it is no negative.
    """
    images = (image if all_images is None else all_images).detach()
    texts = (text if all_texts is None else all_texts).detach()
    own = torch.arange(len(image), device=image.device) + first
    total = image.new_zeros(())
    for rows, columns in ((image, texts), (text, images)):
        logits = rows @ columns.T / temperature
        if same is not None:
            other = same.clone()
            other[torch.arange(len(own), device=own.device), own] = False
            logits = logits.masked_fill(other, -1e4)
            # Smoothing would pull the left-out columns up without end: spread it over the others.
            total = total + _smoothed(logits, own, ~other, smoothing)
        else:
            total = total + F.cross_entropy(logits, own, label_smoothing=smoothing)
    return total / 2


def _smoothed(logits: Tensor, own: Tensor, valid: Tensor, smoothing: float) -> Tensor:
    logs = logits.log_softmax(1)
    hit = logs.gather(1, own[:, None])[:, 0]
    spread = (logs * valid).sum(1) / valid.sum(1)
    return -((1 - smoothing) * hit + smoothing * spread).mean()


def reconstruction_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean cosine distance of (b, n, d) embeddings at every position."""
    return (1 - F.cosine_similarity(found.float(), wanted.detach().float(), dim=-1)).mean()


def generation_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error to the generator's own condition."""
    return F.mse_loss(found.float(), wanted.detach().float())


class Stage2Loss(NamedTuple):
    """The sum and its parts, each with its weight already in."""

    total: Tensor
    quantisation: Tensor
    reconstruction: Tensor
    generation: Tensor


def stage2_loss(
    *, quantisation: Tensor, recon: Tensor, causal: Tensor, condition: Tensor, target: Tensor
) -> Stage2Loss:
    """`5 L_vq + 2 L_rec + 0.5 L_gen`.

    Args:
        quantisation: What `quantizer.quantisation_loss` gave.
        recon: (b, n, w) causal embeddings from codes.
        causal: (b, n, w) causal embeddings of the image, frozen.
        condition: What the head gave.
        target: What the generator's own encoder gives.
    """
    parts = (
        QUANTISATION * quantisation,
        RECONSTRUCTION * reconstruction_loss(recon, causal),
        GENERATION * generation_loss(condition, target),
    )
    return Stage2Loss(parts[0] + parts[1] + parts[2], *parts)


def caption_loss(logits: Tensor, ids: Tensor, mask: Tensor, *, smoothing: float = 0.1) -> Tensor:
    """Next-piece cross-entropy of captions: logits (b, n, v), ids and mask (b, n)."""
    labels = ids.masked_fill(~mask.bool(), -100)[:, 1:]
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels.flatten(), label_smoothing=smoothing
    )
