"""RegionSpot as one CUDA graph: images and boxes of fixed shapes in, region embeddings out."""

from __future__ import annotations

import torch
from torch import Tensor

from polyzoo.core.errors import ConfigError
from polyzoo.regionspot.model import RegionSpot


class GraphedRegions:
    """The whole forward pass, recorded once and replayed.

    Example:
        >>> run = GraphedRegions(model.cuda().bfloat16(), images=1, boxes=50)
        >>> embeddings = run(sam_pixels, clip_pixels, boxes)
    """

    def __init__(
        self,
        model: RegionSpot,
        *,
        images: int,
        boxes: int,
        compiled: bool = True,
        want_masks: bool = False,
    ) -> None:
        """Warm up and record.

        Args:
            model: On a CUDA device, in the dtype it is to compute in.
            images: In a batch.
            boxes: For each of them.
            compiled: Compile the towers' blocks first.
            want_masks: Also compute low-resolution mask logits; found in `self.masks`.

        Raises:
            ConfigError: The model is not on a CUDA device.
        """
        device = next(model.parameters()).device
        if device.type != "cuda":
            raise ConfigError(f"the model is on {device}; a CUDA graph needs a CUDA device")
        if compiled:
            model.compile_blocks()
        self.model, self.want_masks = model, want_masks
        dtype = model.integration.to_clip.weight.dtype
        side = model.config.sam.image_size
        clip = model.clip.visual.image_size
        size = (clip, clip) if isinstance(clip, int) else tuple(clip)
        self._sam = torch.zeros(images, 3, side, side, device=device, dtype=dtype)
        self._clip = torch.zeros(images, 3, *size, device=device, dtype=dtype)
        self._boxes = torch.tensor([8.0, 8.0, 64.0, 64.0], device=device).repeat(images, boxes, 1)
        self.masks: Tensor | None = None
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(3):
                self._forward()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self._graph):
            self._out = self._forward()

    def __call__(self, sam: Tensor, clip: Tensor, boxes: Tensor) -> Tensor:
        """Return `(b, k, t)` embeddings; the tensor is overwritten by the next call.

        Args:
            sam: `(b, 3, S, S)`, normalised and padded.
            clip: `(b, 3, C, C)`, normalised.
            boxes: `(b, k, 4)` in SAM's frame.
        """
        self._sam.copy_(sam)
        self._clip.copy_(clip)
        self._boxes.copy_(boxes)
        self._graph.replay()
        return self._out

    def _forward(self) -> Tensor:
        model = self.model
        # The towers do not depend on each other: CLIP runs on a second stream.
        main = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            memory = model.semantic_map(self._clip)
        embeddings = model.encode_pixels(self._sam)
        decoded = [
            model.decode(embedding, boxes=boxes, want_masks=self.want_masks)
            for embedding, boxes in zip(embeddings, self._boxes, strict=True)
        ]
        tokens = torch.stack([part.tokens[:, 0] for part in decoded])
        if self.want_masks:
            self.masks = torch.stack([p.logits for p in decoded if p.logits is not None])
        main.wait_stream(side)
        return model(tokens, memory)
