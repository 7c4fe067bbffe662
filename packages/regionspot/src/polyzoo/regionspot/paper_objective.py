"""One training step of the module between SAM and CLIP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from polyzoo.regionspot.clip import MEAN, STD
from polyzoo.regionspot.compat import pad_labels, repeat_rows
from polyzoo.regionspot.integration import Integration, region_logits
from polyzoo.regionspot.losses import region_loss
from polyzoo.regionspot.model import RegionSpot


@dataclass(frozen=True)
class PaperObjective:
    """The loss of a step, and what is logged beside it."""

    loss: Tensor
    metrics: dict[str, Tensor]


class PaperStep:
    """From a batch to the published loss; SAM runs only where the batch holds no tokens."""

    def __init__(
        self,
        classes: Tensor,
        scale: float,
        *,
        alpha: float = 0.25,
        gamma: float = 2.0,
        compat: Literal["ours", "official"] = "ours",
    ) -> None:
        """Keep the vocabulary.

        Args:
            classes: Unit `(c, t)`.
            scale: Multiplies the cosine.
            alpha: Of the focal loss.
            gamma: Of the focal loss.
            compat: "official" repeats boxes to the batch's maximum instead of masking padding.
        """
        self.classes, self.scale = classes, scale
        self.alpha, self.gamma, self.compat = alpha, gamma, compat

    def __call__(
        self, module: Integration, towers: RegionSpot, batch: dict[str, Tensor]
    ) -> PaperObjective:
        """Compute the loss of a batch of `data.collate`."""
        pixels = batch["clip"].float() / 255
        mean, std = (pixels.new_tensor(v)[:, None, None] for v in (MEAN, STD))
        memory = towers.semantic_map((pixels - mean) / std)
        tokens = batch["tokens"] if "tokens" in batch else region_tokens(towers, batch)
        labels, present = batch["labels"], batch["present"]
        mask: Tensor | None = present
        if self.compat == "official":
            tokens, labels = _repeated(tokens, labels, present)
            mask = present = torch.ones_like(labels, dtype=torch.bool)
        if bool(present.all()):
            mask = None
        embeddings = module(tokens.to(memory.dtype), memory, mask)
        classes = self.classes.to(embeddings.device)
        logits = region_logits(embeddings, classes, self.scale)
        loss = region_loss(logits, labels, present=present, alpha=self.alpha, gamma=self.gamma)
        with torch.no_grad():
            own = logits.gather(-1, labels[..., None])[..., 0]
            right = (logits.argmax(-1) == labels)[present].float().mean()
        return PaperObjective(
            loss,
            {
                "loss_per_class": loss.detach() / (logits.shape[-1] * len(labels)),
                "positive_logit": own[present].mean(),
                "top1": right,
            },
        )


@torch.no_grad()
def region_tokens(towers: RegionSpot, batch: dict[str, Tensor]) -> Tensor:
    """Run SAM on a batch's images: `(b, k, c)` tokens, zeros where rows are padding."""
    sam, side = towers.sam, towers.config.sam.image_size
    images = batch["sam"].float()
    normal = (images - sam.pixel_mean) / sam.pixel_std
    rows = torch.arange(images.shape[-1], device=images.device)
    inside = (rows[None, :, None] < batch["sizes"][:, 0, None, None]) & (
        rows[None, None] < batch["sizes"][:, 1, None, None]
    )
    normal = normal * inside[:, None]
    padded = torch.nn.functional.pad(
        normal, (0, side - images.shape[-1], 0, side - images.shape[-2])
    )
    embeddings = towers.encode_pixels(padded)
    found = [
        towers.decode(embedding, boxes=boxes[present], want_masks=False).tokens[:, 0]
        for embedding, boxes, present in zip(
            embeddings, batch["boxes"], batch["present"], strict=True
        )
    ]
    out = found[0].new_zeros(*batch["present"].shape, found[0].shape[-1])
    out[batch["present"]] = torch.cat(found)
    return out


def _repeated(tokens: Tensor, labels: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    most = present.shape[1]
    rows = [repeat_rows(t[p], most) for t, p in zip(tokens, present, strict=True)]
    return torch.stack(rows), pad_labels([x[p] for x, p in zip(labels, present, strict=True)])


def vocabulary_of(names: tuple[str, ...], built: tuple[tuple[str, ...], Tensor]) -> Tensor:
    """Return class vectors in the order of the data set's names."""
    have, vectors = built
    rows = {name: row for row, name in enumerate(have)}
    return vectors[[rows[name.strip()] for name in names]]
