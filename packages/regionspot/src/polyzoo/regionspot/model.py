"""RegionSpot: SAM says where a region is, CLIP what there is to see, the module joins them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from polyzoo.regionspot import clip as clips
from polyzoo.regionspot import sam as sams
from polyzoo.regionspot.config import RegionSpotConfig
from polyzoo.regionspot.integration import Integration
from polyzoo.regionspot.mask_decoder import Decoded, decode


class RegionSpot(nn.Module):
    """The two frozen towers and the trained module.

    Example:
        >>> model = RegionSpot(RegionSpotConfig())
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        38853376
    """

    def __init__(self, config: RegionSpotConfig) -> None:
        """Build it with random weights."""
        super().__init__()
        self.config = config
        # Modules of others: their attributes are not typed.
        self.sam: Any
        self.clip: Any
        self.sam = sams.build_sam(config.sam)
        self.clip = clips.build_clip(config.clip)
        self.integration = Integration(
            config.sam.prompt_dim,
            clips.map_width(self.clip),
            clips.text_width(self.clip),
            config.integration,
        )
        self._sam_block: sams.BlockForward | None = None
        self._clip_block: Any = None
        self.freeze()

    def compile_blocks(self) -> None:
        """Compile one block of each image tower; all its blocks share the compiled code."""
        self._sam_block = torch.compile(sams.block_forward, dynamic=False)
        self._clip_block = torch.compile(clips.block_forward, dynamic=False)

    def freeze(self) -> None:
        """Leave gradients to the integration module alone."""
        self.requires_grad_(False)
        self.integration.requires_grad_(True)

    def train(self, mode: bool = True) -> RegionSpot:
        """Set the module's mode; the frozen towers always stay in evaluation mode."""
        super().train(mode)
        self.sam.eval()
        self.clip.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast; what half precision would spoil stays in fp32."""
        kept = {
            (module, name): getattr(module, name).detach().clone()
            for module, name in (
                (self.sam.prompt_encoder.pe_layer, "positional_encoding_gaussian_matrix"),
                (self.sam, "pixel_mean"),
                (self.sam, "pixel_std"),
                (self.clip, "logit_scale"),
            )
        }
        super()._apply(fn, recurse)
        for (module, name), value in kept.items():
            tensor = getattr(module, name)
            if not tensor.is_meta:
                tensor.data = value.to(tensor.device)
        return self

    def image_embedding(self, images: Tensor) -> Tensor:
        """Return SAM's embedding of `(b, 3, H, W)` pixels, 0 to 255, longer side its input."""
        return self.encode_pixels(sams.preprocess(self.sam, images.float()))

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Return SAM's embedding of normalised and padded `(b, 3, S, S)` images."""
        with torch.no_grad():
            weight = self.sam.image_encoder.patch_embed.proj.weight
            return sams.encode_image(
                self.sam.image_encoder, pixels.to(weight.dtype), block=self._sam_block
            )

    def decode(
        self,
        embedding: Tensor,
        *,
        boxes: Tensor | None = None,
        points: Tensor | None = None,
        labels: Tensor | None = None,
        masks: Tensor | None = None,
        want_masks: bool = True,
        chunk: int = 256,
    ) -> Decoded:
        """Return tokens, and masks where wanted, for prompts of one image.

        Args:
            embedding: `(c, h, w)` of one image.
            boxes: `(k, 4)` in SAM's input pixels.
            points: `(k, p, 2)`, likewise.
            labels: `(k, p)`.
            masks: `(k, 1, 4h, 4w)` logits.
            want_masks: Whether logits and quality are wanted; tokens alone are faster.
            chunk: Regions decoded at a time; they do not depend on one another here.
        """
        given = [x for x in (boxes, points, masks) if x is not None]
        count = len(given[0])
        positions = self._positions()
        parts: list[Decoded] = []
        with torch.no_grad():
            for start in range(0, max(count, 1), chunk):
                part = slice(start, start + chunk)
                sparse, dense = sams.encode_prompts(
                    self.sam.prompt_encoder,
                    boxes=_cut(boxes, part),
                    points=_cut(points, part),
                    labels=_cut(labels, part),
                    masks=_cut(masks, part),
                )
                parts.append(
                    decode(
                        self.sam.mask_decoder,
                        embedding[None],
                        positions,
                        sparse,
                        dense,
                        masks=want_masks,
                    )
                )
        return _joined(parts)

    def semantic_map(self, pixels: Tensor) -> Tensor:
        """Return CLIP's tokens `(b, m, d)` of normalised, squashed images `(b, 3, S, S)`."""
        with torch.no_grad():
            weight = next(self.clip.visual.parameters())
            return clips.feature_map(self.clip, pixels.to(weight.dtype), block=self._clip_block)

    def forward(self, tokens: Tensor, memory: Tensor, present: Tensor | None = None) -> Tensor:
        """Return region embeddings `(b, k, t)`, not normalised; see `Integration`."""
        weight = self.integration.to_clip.weight
        return self.integration(tokens.to(weight.dtype), memory.to(weight.dtype), present)

    def logit_scale(self) -> Tensor:
        """Factor of the cosine: 100 in OpenAI's models."""
        return self.clip.logit_scale.detach().float().exp()

    def trained_tensors(self) -> dict[str, Tensor]:
        """The integration module's tensors under their published names."""
        return dict(self.integration.state_dict())

    def _positions(self) -> Tensor:
        weight = self.sam.mask_decoder.iou_token.weight
        return self.sam.prompt_encoder.get_dense_pe().to(weight.dtype)


def split_official(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Sort the tensors of a published checkpoint into "sam", "clip" and "integration".

    The prefix `model.` is optional; `ln_clip`, which the published code never calls, is left out.
    """
    parts: dict[str, dict[str, Tensor]] = {"sam": {}, "clip": {}, "integration": {}}
    for name, tensor in tensors.items():
        short = name.removeprefix("model.")
        if short.startswith("ln_clip"):
            continue
        for prefix, part in (("sam.", "sam"), ("clip_model.", "clip")):
            if short.startswith(prefix):
                parts[part][short.removeprefix(prefix)] = tensor
                break
        else:
            parts["integration"][short] = tensor
    return parts


def pad_tokens(tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stack `(k_i, d)` token lists to `(b, k, d)` and the mask of real rows; None if all are."""
    most = max(len(t) for t in tokens)
    if all(len(t) == most for t in tokens):
        return torch.stack(list(tokens)), None
    first = tokens[0]
    out = first.new_zeros(len(tokens), most, first.shape[-1])
    present = torch.zeros(len(tokens), most, dtype=torch.bool, device=first.device)
    for row, part in enumerate(tokens):
        out[row, : len(part)] = part
        present[row, : len(part)] = True
    return out, present


def _cut(values: Tensor | None, part: slice) -> Tensor | None:
    return None if values is None else values[part]


def _joined(parts: Sequence[Decoded]) -> Decoded:
    if len(parts) == 1:
        return parts[0]

    def together(values: Iterator[Tensor | None]) -> Tensor | None:
        found = [value for value in values if value is not None]
        return torch.cat(found) if found else None

    return Decoded(
        torch.cat([part.tokens for part in parts]),
        together(part.logits for part in parts),
        together(part.iou for part in parts),
    )
