"""SceneSpot, as the pipeline uses it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from polyzoo.regionspot import scene_proposals
from polyzoo.regionspot.engine import Proposals, View
from polyzoo.regionspot.rle import Rle
from polyzoo.regionspot.scene_model import SceneMaps, SceneSpot
from polyzoo.regionspot.text import TextClassifier
from polyzoo.regionspot.words import TextSide

_MASK_GRID = 56
_NEARNESS = 0.6
_SINGLE_NAME = 0.35
"""Cosine at which one name alone scores one half."""


@dataclass
class SceneView:
    """One image in the tower."""

    image: Image.Image
    engine: SceneEngine
    maps: SceneMaps

    def propose(self, *, limit: int) -> Proposals:
        """Find things."""
        found = scene_proposals.propose(self.maps, limit=limit)
        return Proposals(self._pixels(found.boxes), found.scores)

    def boxes_at(self, points: Tensor, labels: Tensor) -> Tensor:
        """Return the box the model sees at each prompt's points inside."""
        shares = points.float() / points.new_tensor(self.image.size, dtype=torch.float32)
        return self._pixels(scene_proposals.boxes_at(self.maps, shares, labels))

    @torch.inference_mode()
    def masks(self, boxes: Tensor) -> tuple[Rle, ...]:
        """Outline what is in each box."""
        if not len(boxes):
            return ()
        model = self.engine.model
        shares = self.shares(boxes)[None].to(self.engine.device)
        out = model.regions(self.maps, shares, mask_size=_MASK_GRID)
        assert out.masks is not None  # noqa: S101 - asked for
        found = []
        for logits, box in zip(out.masks[0].float().cpu(), boxes.tolist(), strict=True):
            found.append(Rle.encode(self._paste(logits, box)))
        return tuple(found)

    def shares(self, boxes: Tensor) -> Tensor:
        """Return boxes as shares of the image."""
        width, height = self.image.size
        return boxes.float() / boxes.new_tensor([width, height, width, height], dtype=torch.float32)

    def _pixels(self, boxes: Tensor) -> Tensor:
        width, height = self.image.size
        return boxes * boxes.new_tensor([width, height, width, height])

    def _paste(self, logits: Tensor, box: list[float]) -> np.ndarray:
        width, height = self.image.size
        x0, y0 = int(box[0]), int(box[1])
        x1, y1 = min(width, -int(-box[2] // 1)), min(height, -int(-box[3] // 1))
        size = (max(1, y1 - y0), max(1, x1 - x0))
        large = F.interpolate(logits[None, None], size, mode="bilinear", align_corners=False)[0, 0]
        mask = np.zeros((height, width), dtype=np.bool_)
        mask[y0 : y0 + size[0], x0 : x0 + size[1]] = (large > 0).numpy()
        return mask


class SceneEngine:
    """The model on its device, with its words."""

    def __init__(
        self,
        model: SceneSpot,
        words: TextSide,
        *,
        device: torch.device,
        name: str = "scenes",
    ) -> None:
        """Move the model to its device.

        Args:
            model: With its weights.
            words: Text side.
            device: Where it computes, in float32.
            name: Shown in results.
        """
        self.model = model.to(device).eval().requires_grad_(False)
        self.words, self.device, self.name = words, device, name

    def describe(self) -> dict[str, str]:
        """Say which towers and weights answer."""
        return {"model": self.name, "tower": "efficientnet-lite0", "text": self.words.source}

    @torch.inference_mode()
    def open(self, images: Sequence[Image.Image]) -> list[View]:
        """Look at each image once."""
        return [
            SceneView(image, self, self.model.maps(self._pixels(image)[None])) for image in images
        ]

    @torch.inference_mode()
    def embed(
        self, views: Sequence[View], boxes: Sequence[Tensor], *, independent: bool = False
    ) -> list[Tensor]:
        """Embed the boxes of each image."""
        found: list[Tensor] = []
        for view, given in zip(views, boxes, strict=True):
            assert isinstance(view, SceneView)  # noqa: S101 - made by open
            shares = view.shares(given)[None].to(self.device)
            if not len(given):
                found.append(torch.zeros(0, self.model.config.text_dim))
            elif independent:
                parts = [self.model.regions(view.maps, box[None, None]) for box in shares[0]]
                found.append(torch.cat([part.embeddings[0] for part in parts]).cpu())
            else:
                found.append(self.model.regions(view.maps, shares).embeddings[0].cpu())
        return found

    def classifier(self, names: str | Sequence[str]) -> TextClassifier:
        """Turn names into class vectors."""
        scale = self.model.config.scale
        made = self.words.classifier(names, scale=scale, bias=-scale * _SINGLE_NAME)
        if not self.words.composed:
            return made
        # A mean of words is nearer to everything than a name read as a whole: take that away.
        near = (made.vectors @ self.model.class_names.cpu().T).mean(1)
        return replace(made, offsets=_NEARNESS * near)

    def _pixels(self, image: Image.Image) -> Tensor:
        side = self.model.config.side
        factor = side / max(image.size)
        width, height = (max(32, round(length * factor / 32) * 32) for length in image.size)
        resized = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
        array = torch.from_numpy(np.array(resized, copy=True)).permute(2, 0, 1)
        return (array.float() / 255).to(self.device)
