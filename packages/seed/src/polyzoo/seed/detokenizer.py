"""Codes to pixels by published diffusion models, through diffusers.

SEED-2 conditions an unCLIP Stable Diffusion 2.1 on one image embedding; SEED's first version
conditions Stable Diffusion 1.4 on 77 text features. A decoded picture means the same as its source;
it is not the same pixel by pixel.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from polyzoo.core.errors import ConfigError, WeightsError
from polyzoo.core.lazy import import_extra
from polyzoo.seed.config import Target
from polyzoo.seed.model import SeedModel

_EXTRA = "polyzoo-seed[diffusers]"
_DEFAULTS = {"image": (20, 10.0), "text": (50, 7.5)}
"""Steps and guidance of the reference, by target."""


class Detokenizer:
    """Draws codes with a diffusers pipeline; each picture depends on its own seed only.

    Example:
        >>> generator = load_detokenizer("stabilityai/stable-diffusion-2-1-unclip", target="image")
        >>> seed.use_detokenizer(generator)
        >>> seed.decode(codes, seed=1, guidance=10.0)
    """

    def __init__(self, pipeline: Any, *, target: Target) -> None:
        self.pipeline, self.target = pipeline, target
        pipeline.set_progress_bar_config(disable=True)

    def __call__(
        self,
        model: SeedModel,
        codes: Tensor,
        *,
        seeds: list[int],
        steps: int | None = None,
        guidance: float | None = None,
        negative: Tensor | None = None,
    ) -> list[Image.Image]:
        """Return a picture of each row of codes (b, n).

        Args:
            model: The tokenizer.
            codes: Checked codes.
            seeds: One for each picture; decides its latents and the noise on its embedding.
            steps: Of the diffusion; 20 for unCLIP, 50 for v1.
            guidance: 10 for unCLIP, 7.5 for v1; 1 needs half of the work.
            negative: Codes to push away from, instead of from nothing.

        Raises:
            ConfigError: The tokenizer's head does not fit the generator, or numbers are out of
                range.
        """
        default_steps, default_guidance = _DEFAULTS[self.target]
        steps = default_steps if steps is None else steps
        guidance = default_guidance if guidance is None else guidance
        if steps < 1 or guidance < 1:
            raise ConfigError(f"steps={steps} and guidance={guidance} must both be at least 1")
        if model.config.head.target != self.target:
            raise ConfigError(
                f"the tokenizer's head gives {model.config.head.target} features and this "
                f"generator takes {self.target} features: v2 goes with unCLIP, v1 with Stable "
                "Diffusion 1.4"
            )
        with torch.no_grad():
            condition = model.decode(codes).condition
            away = None if negative is None else model.decode(negative).condition
        self._check(condition)
        call = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pil"}
        call["generator"] = self._generators(seeds)
        call["latents"] = self._latents(seeds)
        draw = self._unclip if self.target == "image" else self._stable
        return list(draw(condition, away, guidance, call).images)

    def _unclip(
        self, condition: Tensor, away: Tensor | None, guidance: float, call: dict[str, Any]
    ) -> Any:
        dtype = self.pipeline.unet.dtype
        given = condition.to(self.pipeline.device, dtype)
        if away is not None and guidance > 1:
            given = torch.stack((away.to(given), given))
        return self.pipeline(
            prompt=[""] * len(condition), image_embeds=given, noise_level=0, **call
        )

    def _stable(
        self, condition: Tensor, away: Tensor | None, guidance: float, call: dict[str, Any]
    ) -> Any:
        pipe = self.pipeline
        dtype = pipe.unet.dtype
        if away is None and guidance > 1:
            away = pipe.encode_prompt([""] * len(condition), pipe.device, 1, False)[0]
        return pipe(
            prompt_embeds=condition.to(pipe.device, dtype),
            negative_prompt_embeds=None if away is None else away.to(pipe.device, dtype),
            **call,
        )

    def _latents(self, seeds: list[int]) -> Tensor:
        unet = self.pipeline.unet
        size = unet.config.sample_size
        shape = (unet.config.in_channels, size, size)
        latents = torch.stack([torch.randn(shape, generator=_seeded(seed)) for seed in seeds])
        latents = latents.to(self.pipeline.device, unet.dtype)
        # diffusers scales only latents that it draws itself in some pipelines.
        scale = self.pipeline.scheduler.init_noise_sigma if self.target == "image" else 1.0
        return latents * scale

    def _generators(self, seeds: list[int]) -> list[torch.Generator]:
        # Another stream than the latents': one must not repeat the other.
        return [_seeded(seed + 2**40) for seed in seeds]

    def _check(self, condition: Tensor) -> None:
        unet = self.pipeline.unet.config
        if self.target == "image":
            wanted = (unet.projection_class_embeddings_input_dim or 0) // 2
        else:
            wanted = unet.cross_attention_dim
        if condition.shape[-1] != wanted:
            raise ConfigError(
                f"the tokenizer gives embeddings of {condition.shape[-1]} channels and the "
                f"generator takes {wanted}: they do not belong together"
            )


def load_detokenizer(
    name: str | Path,
    *,
    target: Target,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    local_files_only: bool = False,
) -> Detokenizer:
    """Load a diffusers pipeline: a folder or a repository on the hub.

    The image encoder of unCLIP is not loaded: codes already stand for what it would say.

    Args:
        name: Such as stabilityai/stable-diffusion-2-1-unclip.
        target: image (v2) or text (v1).
        device: Where it runs.
        dtype: Of its weights.
        local_files_only: Never use the network.

    Raises:
        WeightsError: There is no such pipeline.
        MissingExtraError: diffusers is not installed.
    """
    diffusers = import_extra("diffusers", install=_EXTRA)
    options: dict[str, Any] = {"torch_dtype": dtype, "local_files_only": local_files_only}
    try:
        if target == "image":
            pipeline = unclip_class().from_pretrained(str(name), image_encoder=None, **options)
        else:
            pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
                str(name), safety_checker=None, **options
            )
            pipeline.scheduler = diffusers.PNDMScheduler.from_config(pipeline.scheduler.config)
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{name}: is no diffusers pipeline: {first}") from error
    return Detokenizer(pipeline.to(device), target=target)


@cache
def unclip_class() -> Any:
    """Return unCLIP's pipeline with negative image embeddings, which diffusers lacks."""
    diffusers = import_extra("diffusers", install=_EXTRA)

    class SeedUnCLIPPipeline(diffusers.StableUnCLIPImg2ImgPipeline):
        """Takes image_embeds (b, d), or (2, b, d) with the negative ones first."""

        def _encode_image(
            self,
            image: Any,
            device: Any,
            batch_size: int,
            num_images_per_prompt: int,
            do_classifier_free_guidance: bool,
            noise_level: Any,
            generator: Any,
            image_embeds: Tensor,
        ) -> Tensor:
            del image, device, batch_size, num_images_per_prompt
            parts = image_embeds if image_embeds.ndim == 3 else image_embeds[None]
            noised = [
                self.noise_image_embeddings(
                    image_embeds=part, noise_level=noise_level, generator=generator
                )
                for part in parts
            ]
            if do_classifier_free_guidance and len(noised) == 1:
                noised.insert(0, torch.zeros_like(noised[0]))
            return torch.cat(noised)

    return SeedUnCLIPPipeline


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
