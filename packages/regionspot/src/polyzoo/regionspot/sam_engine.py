"""RegionSpot on SAM and CLIP, as the pipeline uses it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from polyzoo.regionspot import geometry, sam_proposals
from polyzoo.regionspot.clip import input_size
from polyzoo.regionspot.config import Names
from polyzoo.regionspot.engine import Proposals, View
from polyzoo.regionspot.model import RegionSpot, pad_tokens
from polyzoo.regionspot.rle import Rle
from polyzoo.regionspot.text import TextClassifier, Tokenize, build_classifier, fingerprint

_MASK_CHUNK = 16
"""Masks brought to the image's size at a time: memory does not grow with the boxes."""


@dataclass
class SamView:
    """One image in both towers."""

    image: Image.Image
    engine: SamEngine
    frame: geometry.SamFrame
    embedding: Tensor
    """`(c, h, w)`."""
    memory: Tensor
    """`(m, d)`."""

    def propose(self, *, limit: int) -> Proposals:
        """Prompt SAM with a grid of points and keep the stable masks' boxes."""
        found = sam_proposals.propose(
            self.engine.model, self.embedding, self.frame,
            points_per_side=self.engine.points_per_side,
        )  # fmt: skip
        return Proposals(found.boxes[:limit], found.scores[:limit])

    def boxes_at(self, points: Tensor, labels: Tensor) -> Tensor:
        """Return the box of the best of SAM's three masks for each prompt."""
        return sam_proposals.boxes_at(self.engine.model, self.embedding, self.frame, points, labels)

    def masks(self, boxes: Tensor) -> tuple[Rle, ...]:
        """Outline each box with SAM's single mask."""
        side = self.engine.model.config.sam.image_size
        found: list[Rle] = []
        device = self.embedding.device
        for start in range(0, len(boxes), _MASK_CHUNK):
            part = self.frame.boxes(boxes[start : start + _MASK_CHUNK].to(device))
            decoded = self.engine.model.decode(self.embedding, boxes=part)
            logits = decoded.selected(multimask=False).logits
            assert logits is not None  # noqa: S101 - asked for
            for row in logits:
                mask = geometry.upscale_masks(row[None], self.frame, side)[0, 0]
                found.append(Rle.encode(mask.cpu().numpy().astype(np.bool_)))
        return tuple(found)


class SamEngine:
    """The model on its device, with the text tower's tokenizer and cache."""

    def __init__(
        self,
        model: RegionSpot,
        tokenize: Tokenize,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        templates: str = "imagenet81",
        cleaning: Names = "readable",
        cache: Path | None = None,
        points_per_side: int = 32,
        token_chunk: int = 256,
    ) -> None:
        """Move the model to its device.

        Args:
            model: With its weights.
            tokenize: From texts to ids.
            device: Where it computes.
            dtype: Of the towers and the module; normalisation and logits stay float32.
            templates: See `names.templates`.
            cleaning: See `clean_name`.
            cache: Folder of class vectors.
            points_per_side: Of the grid that finds things by itself.
            token_chunk: Boxes that SAM decodes at a time.
        """
        self.model = model.to(device, dtype).eval().requires_grad_(False)
        self.tokenize = tokenize
        self.device, self.dtype = device, dtype
        self.cleaning: Names = cleaning
        self.templates, self.cache = templates, cache
        self.points_per_side, self.token_chunk = points_per_side, token_chunk

    def describe(self) -> dict[str, str]:
        """Say which towers and weights answer."""
        model = self.model
        shape = model.config.clip
        return {
            "sam": fingerprint(model.sam)[:16],
            "clip": shape.name if shape.shape is None else "custom",
            "clip_weights": fingerprint(model.clip)[:16],
            "weights": fingerprint(model.integration)[:16],
            "templates": self.templates,
            "names": self.cleaning,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @torch.inference_mode()
    def open(self, images: Sequence[Image.Image]) -> list[View]:
        """Run both image towers on a batch."""
        model, side = self.model, self.model.config.sam.image_size
        frames = [geometry.sam_frame(i.height, i.width, side) for i in images]
        pixels = []
        for image, frame in zip(images, frames, strict=True):
            raw = geometry.sam_pixels(image, frame).to(self.device).float()
            normal = (raw - model.sam.pixel_mean) / model.sam.pixel_std
            pixels.append(F.pad(normal, (0, side - raw.shape[2], 0, side - raw.shape[1])))
        embeddings = model.encode_pixels(torch.stack(pixels))
        size = input_size(model.clip)
        antialias = model.config.clip_antialias
        squashed = [geometry.clip_pixels(image, size, antialias=antialias) for image in images]
        memory = model.semantic_map(torch.stack(squashed).to(self.device))
        return [
            SamView(image, self, frame, embedding, tokens)
            for image, frame, embedding, tokens in zip(
                images, frames, embeddings, memory, strict=True
            )
        ]

    @torch.inference_mode()
    def embed(
        self, views: Sequence[View], boxes: Sequence[Tensor], *, independent: bool = False
    ) -> list[Tensor]:
        """Embed boxes; those of one image together, those of several padded."""
        tokens: list[Tensor] = []
        memories: list[Tensor] = []
        for view, given in zip(views, boxes, strict=True):
            assert isinstance(view, SamView)  # noqa: S101 - made by open
            framed = view.frame.boxes(given.to(self.device))
            decoded = self.model.decode(
                view.embedding, boxes=framed, want_masks=False, chunk=self.token_chunk
            )
            tokens.append(decoded.selected(multimask=False).tokens[:, 0])
            memories.append(view.memory)
        most = max((len(t) for t in tokens), default=0)
        width = self.model.integration.projector.out_features
        if not most:
            return [torch.zeros(0, width) for _ in views]
        padded, present = pad_tokens(tokens)
        memory = torch.stack(memories)
        if independent:
            found = self.model.integration.independent(padded, memory)
        else:
            found = self.model(padded, memory, present)
        found = F.normalize(found.float(), dim=-1).cpu()
        return [row[: len(part)] for row, part in zip(found, tokens, strict=True)]

    @torch.inference_mode()
    def classifier(self, names: str | Sequence[str]) -> TextClassifier:
        """Turn names into class vectors, or read them from the cache."""
        return build_classifier(
            self.model.clip, self.tokenize, names,
            kind=self.templates, cleaning=self.cleaning, cache=self.cache,
        )  # fmt: skip
