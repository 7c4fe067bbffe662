"""What the pipeline returns, and the formats other tools read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyzoo.core.errors import DataError
from polyzoo.core.lazy import import_extra
from polyzoo.regionspot.rle import Rle


@dataclass(frozen=True)
class Region:
    """One box and what it is."""

    box: tuple[float, float, float, float]
    """Corners in pixels of the upright image."""
    name: str
    score: float
    """0 to 1."""
    top: tuple[tuple[str, float], ...]
    """The best names with their scores, best first."""
    mask: Rle | None
    rejected: bool
    """Whether nothing among the names fits well enough (`min_similarity`)."""


@dataclass(frozen=True)
class RegionResult:
    """All boxes of one image.

    Example:
        >>> for region in result.regions():
        ...     print(region.name, round(region.score, 2), region.box)
    """

    width: int
    height: int
    names: tuple[str, ...]
    boxes: Tensor
    """float32 `(k, 4)` corners in pixels."""
    rows: Tensor
    """int64 `(k,)`: which of the given boxes each one is."""
    logits: Tensor
    """float32 `(k, c)`."""
    scores: Tensor
    """float32 `(k, c)`: probabilities over the names, or sigmoid scores where there is one name."""
    similarity: Tensor
    """float32 `(k, c)`: cosine to each name."""
    embeddings: Tensor
    """float32 `(k, t)`, unit length."""
    masks: tuple[Rle, ...] | None
    proposal_scores: Tensor | None
    """`(k,)` where the boxes were proposed automatically."""
    rejected: Tensor
    """bool `(k,)`."""
    made_by: Mapping[str, str]
    """Which towers, weights and templates produced this."""

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def labels(self) -> list[str]:
        """Best name of each box."""
        return [self.names[row] for row in self.best.tolist()]

    @property
    def best(self) -> Tensor:
        """int64 `(k,)`: index of each box's best name."""
        return self.logits.argmax(-1) if len(self.boxes) else torch.zeros(0, dtype=torch.long)

    def regions(self, *, top: int = 5) -> Iterator[Region]:
        """Go through the boxes in their order."""
        count = min(top, len(self.names))
        for place in range(len(self)):
            values, rows = self.scores[place].topk(count)
            best = tuple(
                (self.names[row], float(value))
                for row, value in zip(rows.tolist(), values, strict=True)
            )
            x0, y0, x1, y1 = self.boxes[place].tolist()
            yield Region(
                box=(x0, y0, x1, y1),
                name=best[0][0],
                score=best[0][1],
                top=best,
                mask=None if self.masks is None else self.masks[place],
                rejected=bool(self.rejected[place]),
            )

    def to_dict(self, *, top: int = 5) -> dict[str, Any]:
        """Return plain values, as `infer --json` prints them."""
        return {
            "width": self.width,
            "height": self.height,
            "regions": [
                {
                    "box": [round(v, 2) for v in region.box],
                    "name": region.name,
                    "score": round(region.score, 5),
                    "top": [[name, round(score, 5)] for name, score in region.top],
                    **({"rejected": True} if region.rejected else {}),
                    **({} if region.mask is None else {"mask": region.mask.to_coco()}),
                }
                for region in self.regions(top=top)
            ],
            "made_by": dict(self.made_by),
        }

    def to_coco(
        self, *, image_id: int, category_ids: Mapping[str, int] | None = None
    ) -> list[dict[str, Any]]:
        """Return a COCO result list: best name of each box, xywh, RLE masks.

        Args:
            image_id: Of the annotation file.
            category_ids: Name to id; 1, 2, ... in the order of the names where not given.

        Raises:
            DataError: A name has no id.
        """
        ids = category_ids or {name: place + 1 for place, name in enumerate(self.names)}
        missing = [name for name in self.names if name not in ids]
        if missing:
            raise DataError(f"category_ids lacks {missing[0]!r}")
        rows = []
        for region in self.regions(top=1):
            x0, y0, x1, y1 = region.box
            row: dict[str, Any] = {
                "image_id": image_id,
                "category_id": ids[region.name],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": region.score,
            }
            if region.mask is not None:
                row["segmentation"] = region.mask.to_coco()
            rows.append(row)
        return rows

    def to_supervision(self) -> Any:
        """Return `supervision.Detections`, with `class_name` in its data.

        Raises:
            MissingExtraError: supervision is not installed.
        """
        supervision = import_extra("supervision", install="polyzoo-regionspot[supervision]")
        masks = None
        if self.masks is not None and len(self):
            masks = np.stack([mask.decode() for mask in self.masks])
        best = self.best
        scores = self.scores.gather(1, best[:, None])[:, 0] if len(self) else torch.zeros(0)
        return supervision.Detections(
            xyxy=self.boxes.numpy().astype(np.float32).reshape(-1, 4),
            mask=masks,
            confidence=scores.numpy().astype(np.float32),
            class_id=best.numpy().astype(int),
            data={"class_name": np.array(self.labels, dtype=str)},
        )

    def chosen(self, rows: Sequence[int] | Tensor) -> RegionResult:
        """Return some of the boxes; what they are called stays as it was with all of them."""
        at = torch.as_tensor(rows, dtype=torch.long)
        return RegionResult(
            width=self.width,
            height=self.height,
            names=self.names,
            boxes=self.boxes[at],
            rows=self.rows[at],
            logits=self.logits[at],
            scores=self.scores[at],
            similarity=self.similarity[at],
            embeddings=self.embeddings[at],
            masks=None if self.masks is None else tuple(self.masks[i] for i in at.tolist()),
            proposal_scores=None if self.proposal_scores is None else self.proposal_scores[at],
            rejected=self.rejected[at],
            made_by=self.made_by,
        )
