"""What is minimised in each stage, as modules the training engine can drive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyzoo.seed.codebook import CodebookCare
from polyzoo.seed.codebook_config import CodebookConfig
from polyzoo.seed.config import IMAGENET_MEAN, IMAGENET_STD, SeedConfig
from polyzoo.seed.decoder import PixelDecoder, flow_loss
from polyzoo.seed.losses import contrastive_loss, stage2_loss
from polyzoo.seed.model import SeedModel
from polyzoo.seed.quantizer import Weighting, quantisation_loss
from polyzoo.seed.sketch import SketchDecoder, sketch_loss

Losses = tuple[Tensor, dict[str, Tensor]]


class _Stage(nn.Module):
    """A model of which named parts learn; the others are frozen, in eval mode."""

    def __init__(self, model: SeedModel, *, learning: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self._learning = learning
        model.requires_grad_(False)
        for name in learning:
            part = getattr(model, name)
            if part is not None:
                part.requires_grad_(True)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for name, part in self.model.named_children():
            if name not in self._learning:
                part.eval()
        return self


class TowerStage(_Stage):
    """Our small tower learns a teacher's features, token by token (distillation)."""

    def __init__(self, model: SeedModel, *, teacher_width: int) -> None:
        super().__init__(model, learning=("vision", "vision_norm"))
        self.project = nn.Linear(model.config.vision.width, teacher_width)

    def forward(self, rgb: Tensor, wanted: Tensor) -> Losses:
        """Compare with the teacher's tokens (b, m, d), class token first.

        Args:
            rgb: (b, 3, S, S) in 0 to 1.
            wanted: Features with zero mean and unit variance over channels.
        """
        found = self.project(self.model.context(self.model.features(normalise(rgb, self.model))))
        cosine = 1 - F.cosine_similarity(found.float(), wanted.float(), dim=-1)
        error = F.smooth_l1_loss(found.float(), wanted.float(), reduction="none").mean(-1)
        # The class token carries the meaning: as much weight as all patches.
        own = cosine[:, 0].mean() + error[:, 0].mean()
        others = cosine[:, 1:].mean() + error[:, 1:].mean()
        return own + others, {
            "cosine_class": cosine[:, 0].mean().detach(),
            "cosine_patch": cosine[:, 1:].mean().detach(),
        }


class Stage1(_Stage):
    """Causal Q-Former: images meet captions (section 3.1), and what the generator needs is kept.

    The paper has the first term only. With a sentence encoder's vectors beside, images and the text
    branch also meet those, so that words never seen in captions have their place.
    """

    def __init__(self, model: SeedModel, *, teacher: float, generation: float) -> None:
        parts = ("qformer", "queries", "vision_norm", "contrast")
        super().__init__(model, learning=(*parts, "prepare_head", "head") if generation else parts)
        self.teacher, self.generation = teacher, generation

    def forward(self, rgb: Tensor, batch: Mapping[str, Tensor], target: Tensor | None) -> Losses:
        """Return the loss of a batch.

        Args:
            rgb: (b, 3, S, S) in 0 to 1.
            batch: `ids`, `mask`, `meanings` (b,), and with a teacher `vectors` (b, d), `word_ids`,
                `word_mask`, `word_vectors`.
            target: What the generator is conditioned on, with `generation`.
        """
        model = self.model
        assert model.contrast is not None  # noqa: S101 - the recipe was checked
        causal = model.embed(model.features(normalise(rgb, model)))
        image = model.image_vectors(causal).float()
        text = model.text_vectors(batch["ids"], batch["mask"]).float()
        temperature = model.contrast.temperature.clamp(0.001, 0.5)
        same = batch["meanings"][:, None] == batch["meanings"][None]
        loss = contrastive_loss(image, text, temperature, same=same)
        parts = {"contrast": loss.detach()}
        if self.teacher:
            vectors = batch["vectors"].float()
            taught = contrastive_loss(image, vectors, temperature, same=same)
            words = model.text_vectors(batch["word_ids"], batch["word_mask"]).float()
            copied = (1 - (text * vectors).sum(-1)).mean()
            spelled = (1 - (words * batch["word_vectors"].float()).sum(-1)).mean()
            loss = loss + self.teacher * (taught + 5 * copied + 5 * spelled)
            parts |= {"taught": taught.detach(), "text": copied.detach(), "words": spelled.detach()}
        if self.generation and target is not None:
            found = model.head(model.prepare_head(causal))
            kept = F.mse_loss(found.float(), target.float())
            loss = loss + self.generation * kept
            parts["generation"] = kept.detach()
        hit = (image @ text.T).masked_fill(same & ~torch.eye(len(same), dtype=torch.bool,
               device=same.device), -1).argmax(1)  # fmt: skip
        right = hit == torch.arange(len(hit), device=hit.device)
        return loss, parts | {"recall_1": right.float().mean()}


class Stage2(_Stage):
    """Codebook and de-tokeniser (section 3.2): everything before the codes is frozen."""

    def __init__(self, model: SeedModel, *, codebook: CodebookConfig, weighting: Weighting) -> None:
        learning = (
            "to_code", "quantizer", "from_code", "reconstruct", "prepare_head", "head"
        )  # fmt: skip
        super().__init__(model, learning=learning)
        self.weighting: Weighting = weighting
        self.care = CodebookCare(model.config.codes, codebook)

    def forward(
        self, rgb: Tensor, target: Tensor, *, step: int, total: int, generator: torch.Generator
    ) -> Losses:
        """Return the loss of a batch; the codebook may be started or repaired on the way."""
        model = self.model
        with torch.no_grad():
            causal = model.embed(model.features(normalise(rgb, model)))
        z = model.pre_quant(causal)
        book = model.quantizer.codebook.data
        if self.training:
            self.care.before(book, z, generator=generator)
        quantised = model.quantizer(z)
        decoded = model.decode_vectors(quantised.vectors)
        assert decoded.causal is not None  # noqa: S101 - the recipe was checked
        losses = stage2_loss(
            quantisation=quantisation_loss(z, quantised.entries, weighting=self.weighting),
            recon=decoded.causal,
            causal=causal,
            condition=decoded.condition,
            target=target,
        )
        if self.training:
            self.care.after(book, z, quantised.codes, step=step, total=total, generator=generator)
        return losses.total, {
            "quantisation": losses.quantisation.detach(),
            "reconstruction": losses.reconstruction.detach(),
            "generation": losses.generation.detach(),
            "used_in_batch": (
                torch.bincount(quantised.codes.flatten(), minlength=len(book)) > 0
            ).float().mean(),
        }  # fmt: skip


class DecoderStage(_Stage):
    """Our small picture decoder learns to draw what the frozen tokenizer wrote."""

    def __init__(self, model: SeedModel, decoder: PixelDecoder | SketchDecoder) -> None:
        super().__init__(model, learning=())
        self.decoder = decoder

    def forward(self, rgb: Tensor, *, generator: torch.Generator) -> Losses:
        """Return the decoder's loss on pictures (b, 3, S, S) in 0 to 1."""
        size = self.decoder.config.size
        # In fp32, as they will be written: rounding in the tower would change some codes.
        with torch.no_grad(), torch.autocast(rgb.device.type, enabled=False):
            context = self.model.context_of(self.model.encode(normalise(rgb, self.model)))
            if rgb.shape[-1] != size:
                rgb = F.interpolate(rgb, size=(size, size), mode="area")
        if isinstance(self.decoder, SketchDecoder):
            return sketch_loss(self.decoder, rgb, context), {}
        return flow_loss(self.decoder, rgb, context, generator=generator), {}


class GeneratorTarget(nn.Module):
    """What our own generator is told of a picture: teacher embedding, and an 8 x 8 thumbnail.

    It stands where CLIP's image embedding stands for unCLIP. Without the thumbnail, colour and
    place would be lost, as they are with the paper's first version.
    """

    def __init__(self, teacher: nn.Module, *, thumbnail: int, teacher_size: int) -> None:
        super().__init__()
        self.teacher, self.thumbnail, self.size = teacher, thumbnail, teacher_size

    @torch.no_grad()
    def tokens(self, rgb: Tensor) -> Tensor:
        """Return the teacher's tokens (b, m, d), each with zero mean and unit variance."""
        pixels = F.interpolate(
            rgb.float(), size=(self.size, self.size), mode="bilinear", align_corners=False
        )
        mean = pixels.new_tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
        std = pixels.new_tensor(IMAGENET_STD).view(1, 3, 1, 1)
        tokens = self.teacher((pixels - mean) / std).float()
        return F.layer_norm(tokens, tokens.shape[-1:])

    @torch.no_grad()
    def forward(self, rgb: Tensor) -> Tensor:
        """Return (b, d + 3 * thumbnail ** 2)."""
        own = self.tokens(rgb)[:, 0]
        if not self.thumbnail:
            return own
        small = F.adaptive_avg_pool2d(rgb.float(), self.thumbnail)
        # Icons on white: about this mean and spread, so that both parts weigh alike.
        return torch.cat((own, ((small - 0.75) / 0.3).flatten(1)), 1)


def normalise(rgb: Tensor, model: SeedModel) -> Tensor:
    """Return what the model's tower takes of pictures in 0 to 1, resized where needed."""
    config: SeedConfig = model.config
    size = config.vision.image_size
    if rgb.shape[-1] != size:
        rgb = F.interpolate(
            rgb.float(), size=(size, size), mode=config.preprocess.resample, align_corners=False,
            antialias=True,
        ).clamp(0, 1)  # fmt: skip
    mean = rgb.new_tensor(config.preprocess.mean).view(1, 3, 1, 1)
    std = rgb.new_tensor(config.preprocess.std).view(1, 3, 1, 1)
    return (rgb - mean) / std


def as_floats(parts: Mapping[str, Any]) -> dict[str, float]:
    """Return metrics as numbers."""
    return {name: float(value) for name, value in parts.items()}
