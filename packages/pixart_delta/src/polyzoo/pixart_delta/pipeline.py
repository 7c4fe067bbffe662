"""PixArtDeltaPipeline: text, and where wanted a picture or an edge map, to images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from polyzoo.core.errors import ConfigError, DataError
from polyzoo.core.log import get_logger, progress
from polyzoo.pixart_delta import request as requests
from polyzoo.pixart_delta.captions import PackedCaptions, join
from polyzoo.pixart_delta.control import ControlBranch
from polyzoo.pixart_delta.decoding import decode, preview
from polyzoo.pixart_delta.fast import FastTransformer, Replayed
from polyzoo.pixart_delta.hed import HedNetwork
from polyzoo.pixart_delta.lcm import Spacing
from polyzoo.pixart_delta.lora import Adapters, read_adapter
from polyzoo.pixart_delta.model import PixArtTransformer
from polyzoo.pixart_delta.pictures import Picture, cover, mask_tensor, to_pictures
from polyzoo.pixart_delta.prediction import Predictor
from polyzoo.pixart_delta.record import RunRecord, fingerprint, versions
from polyzoo.pixart_delta.request import ControlRequest, ControlType, Plan, Uncond
from polyzoo.pixart_delta.sampling import Inpainting, StepState, StopDrawing, sample
from polyzoo.pixart_delta.scheduler import (
    SchedulerName,
    check_betas,
    draw_like,
    make_scheduler,
)
from polyzoo.pixart_delta.sources import control_latents, source_latents
from polyzoo.pixart_delta.stages import StageTimes, visiting
from polyzoo.pixart_delta.text import encode_prompts
from polyzoo.pixart_delta.vae import check_vae, vae_factor

_log = get_logger(__name__)
Memory = Literal["full", "8gb"]
StepCallback = Callable[["PixArtDeltaPipeline", int, int, dict[str, Tensor]], dict[str, Any] | None]


@dataclass(frozen=True)
class PixArtOutput:
    """Images with how they were made."""

    images: list[Image.Image] | Tensor
    """Pictures, or the tensor that `output_type` asked for."""
    records: list[RunRecord]
    """One for each image."""
    seconds: dict[str, float]
    """Of each stage, where profile=True."""
    peak_bytes: dict[str, int]
    """Of GPU memory in each stage, where profile=True."""
    interrupted: bool = False
    """Whether a callback stopped the run; the images are then what the last step saw."""


class PixArtDeltaPipeline(DiffusionPipeline):
    """Draws images in 1 to 8 steps (LCM) or with guidance (DPM-Solver++, DDIM).

    Example:
        >>> pipe = PixArtDeltaPipeline.from_pretrained("embedded")
        >>> pipe("red apple, 3d render style", seed=0).images[0].save("apple.png")
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ("tokenizer", "text_encoder", "controlnet", "hed")
    _callback_tensor_inputs = ("latents", "denoised")

    def __init__(
        self,
        transformer: PixArtTransformer,
        vae: AutoencoderKL,
        scheduler: Any,
        tokenizer: Any = None,
        text_encoder: Any = None,
        controlnet: ControlBranch | None = None,
        hed: HedNetwork | None = None,
    ) -> None:
        super().__init__()
        check_vae(vae)
        check_betas(scheduler.config, type(scheduler).__name__)
        self.register_modules(
            transformer=transformer, vae=vae, scheduler=scheduler, tokenizer=tokenizer,
            text_encoder=text_encoder, controlnet=controlnet, hed=hed,
        )  # fmt: skip
        self.adapters = Adapters(transformer)
        self.null_caption: Tensor | None = None
        self.kind = ""
        self.name = "pixart-delta"
        self.memory: Memory = "full"
        self.work_device: torch.device | None = None
        self._interrupt = False
        self._fast: FastTransformer | None = None
        self._fast_vae: Replayed | None = None
        self._hashes: dict[str, str] = {}

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        name_or_path: str | Path = "embedded",
        *,
        dtype: str | torch.dtype | None = None,
        device: str = "auto",
        memory: Memory = "full",
        compile: bool = False,
        controlnet: str | Path | None = None,
        hed: str | Path | None = None,
        vae: str | Path | None = None,
        text: str | Path | None = None,
        lora: Sequence[str | Path] = (),
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | None = None,
        force_scheduler: bool = False,
    ) -> PixArtDeltaPipeline:
        """Compose a pipeline.

        Args:
            name_or_path: "embedded" (the small model of this package), a folder or hub repository
                in diffusers' layout, or a .safetensors or converted .pth of a transformer alone
                (then give vae and text).
            dtype: Of the networks; bfloat16 on a GPU and float32 elsewhere where not given.
            device: auto, cpu, cuda, ...
            memory: "8gb" has the parts take turns on the GPU, with an int8 text encoder.
            compile: Compile and capture the networks; the first image of a shape takes a minute.
            controlnet: Folder or file of a control branch.
            hed: Weights of the edge detector, for control_type="hed".
            vae: Folder of another autoencoder.
            text: Folder that holds tokenizer/ and text_encoder/.
            lora: Adapters, merged in this order; NAME=SCALE after the path weighs one.
            revision: Branch, tag or commit on the hub.
            local_files_only: Never use the network.
            token: For private repositories.
            force_scheduler: Take a scheduler with other betas as it is.
        """
        from polyzoo.pixart_delta.loading import load_pipeline

        return load_pipeline(
            cls, str(name_or_path), dtype=dtype, device=device, memory=memory, compiled=compile,
            controlnet=controlnet, hed=hed, vae=vae, text=text, lora=lora, revision=revision,
            local_files_only=local_files_only, token=token, force_scheduler=force_scheduler,
        )  # fmt: skip

    def save_pretrained(self, folder: str | Path) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write the parts in diffusers' places; adapters must be taken out first."""
        from polyzoo.pixart_delta.loading import save_pipeline

        save_pipeline(self, Path(folder))

    def load_lora_weights(
        self, path: str | Path, *, name: str | None = None, scale: float = 1.0,
        alpha: float | None = None,
    ) -> str:  # fmt: skip
        """Merge adapters of any of the three formats; returns their name."""
        chosen = name or Path(path).stem
        self.adapters.add(chosen, read_adapter(path, alpha=alpha), scale=scale)
        self._weights_changed()
        return chosen

    def unload_lora_weights(self, name: str | None = None) -> None:
        """Take adapters out; the weights are then bit for bit what they were."""
        self.adapters.remove(name)
        self._weights_changed()

    def interrupt(self) -> None:
        """Stop the run at its next step; to be called from a callback or another thread."""
        self._interrupt = True

    @property
    def lcm_weights(self) -> bool | None:
        """Whether the weights are a consistency student's; None if nothing says so."""
        if "lcm" in self.adapters.kinds or self.kind == "lcm":
            return True
        return False if self.kind == "base" else None

    @property
    def compute_device(self) -> torch.device:
        """Where the networks work, also while they wait elsewhere."""
        if self.work_device is not None:
            return self.work_device
        return torch.device(self._execution_device)

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], *, clean_caption: bool = True, negative: bool = False
    ) -> PackedCaptions:
        """The text pass alone: states to hand over as prompt_embeds, also in another process."""
        staged = self.memory != "full"
        with visiting(self.text_encoder, self.compute_device, staged=staged):
            captions = encode_prompts(
                prompts,
                encoder=self.text_encoder,
                tokenizer=self.tokenizer,
                length=self.transformer.shape.caption_length,
                cleaning=clean_caption,
                negative=negative,
            )
        return captions.to(self.compute_device, self.transformer.dtype)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        scheduler: SchedulerName | None = None,
        spacing: Spacing | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_images_per_prompt: int = 1,
        latents: Tensor | None = None,
        prompt_embeds: PackedCaptions | None = None,
        negative_prompt_embeds: PackedCaptions | None = None,
        image: Picture | Sequence[Picture] | None = None,
        mask_image: Picture | None = None,
        strength: float = 0.6,
        control_image: Picture | Sequence[Picture] | None = None,
        control_type: ControlType = "hed",
        control_scale: float = 1.0,
        control_start: float = 0.0,
        control_end: float = 1.0,
        uncond: Uncond = "negative_prompt",
        use_resolution_binning: bool = True,
        original_size: tuple[float, float] | None = None,
        aspect_ratio: float | None = None,
        clean_caption: bool = True,
        output_type: Literal["pil", "pt", "latent"] = "pil",
        callback_on_step_end: StepCallback | None = None,
        vae_tiling: bool | None = None,
        decode_batch: int | None = None,
        profile: bool = False,
    ) -> PixArtOutput:
        """Draw.

        Args:
            prompt: One or several; each gets `num_images_per_prompt` images.
            negative_prompt: What guidance leads away from; without guidance it does nothing.
            num_inference_steps: 4 with LCM, 20 with DPM-Solver++, 25 with DDIM where not given.
            guidance_scale: 4.5 where not given, 1 (none) with LCM.
            scheduler: lcm, dpm or ddim; what suits the weights where not given.
            spacing: Of LCM's steps: even (default) or skip, the official one.
            height: Of the images; the model's own where not given.
            width: The same.
            seed: Of the first image, the next ones count up; or one for each. An image depends on
                its own seed alone, not on its batch.
            generator: In place of seeds, one or one for each image.
            num_images_per_prompt: Images of each prompt.
            latents: `(b, 4, h, w)` start noise.
            prompt_embeds: From `encode`, in place of prompts.
            negative_prompt_embeds: The same for the negative prompts.
            image: Picture to start from (image-to-image), or to keep outside mask_image.
            mask_image: White is painted anew, black stays.
            strength: Share of the noise that image is laid under, above 0 to 1.
            control_image: Steers the outlines; resized to cover the image, middle cut out.
            control_type: hed or edges find the edges in control_image; raw takes it as a map.
            control_scale: 0 to 2.
            control_start: Share of the steps before which control is off.
            control_end: Share of the steps after which it is off again.
            uncond: What guidance compares with: the negative prompt, or the learned null caption
                under the prompt's own mask as in the official code.
            use_resolution_binning: Draw the nearest trained size and resize back.
            original_size: Size condition (height, width) other than what is drawn.
            aspect_ratio: Ratio condition (height / width) other than what is drawn.
            clean_caption: Clean prompts as training did.
            output_type: pil, pt (`(b, 3, H, W)` in [0, 1]), or latent.
            callback_on_step_end: `(pipeline, index, timestep, tensors)` after each step, where
                tensors holds latents and denoised; may return {"latents": ...}.
            vae_tiling: Decode in tiles; by default above 1536 x 1536 pixels.
            decode_batch: Images decoded at a time.
            profile: Time each stage, and record its peak memory.
        """
        self._interrupt = False
        times = StageTimes(self.compute_device, enabled=profile)
        plan, captions, negatives = self._plan(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, num_images_per_prompt,
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
            scheduler=scheduler, spacing=spacing, seed=seed, strength=strength, uncond=uncond,
            sizes=requests.plan_sizes(
                self.transformer.shape, vae_factor(self.vae), height=height, width=width,
                binning=use_resolution_binning, original_size=original_size,
                aspect_ratio=aspect_ratio,
            ),
            control=None if control_image is None else ControlRequest(
                image=control_image, kind=control_type, scale=control_scale,
                start=control_start, end=control_end,
            ),
        )  # fmt: skip
        if mask_image is not None and image is None:
            raise DataError("mask_image needs image: the picture that stays outside the mask")
        with times.stage("text"):
            captions, negatives = self._texts(
                plan, captions, negatives, num_images_per_prompt, clean_caption
            )
        with (
            times.stage("sources"),
            visiting(self.vae, self.compute_device, staged=self.memory != "full"),
        ):
            control = self._control(plan)
            start = source_latents(self.vae, image, plan, self.compute_device)
        with times.stage("transformer"):
            generators = self._generators(plan, generator)
            result = self._draw(
                plan, captions, negatives, control, start, mask_image, latents, generators,
                callback_on_step_end,
            )  # fmt: skip
        if output_type == "latent":
            images: Any = result
        else:
            with times.stage("vae"):
                images = self._decode(result, plan, vae_tiling, decode_batch, output_type)
        return PixArtOutput(
            images,
            self._records(plan, image is not None),
            times.seconds,
            times.peak_bytes,
            interrupted=self._interrupt,
        )

    def show(self, denoised: Tensor, *, side: int = 32) -> list[Image.Image]:
        """Small pictures of latents, for a callback to show while drawing."""
        with torch.no_grad():
            return to_pictures(preview(self.vae, denoised.to(self.vae.device), side=side))

    def _plan(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None,
        embeds: PackedCaptions | None,
        negative_embeds: PackedCaptions | None,
        per_prompt: int,
        *,
        num_inference_steps: int | None,
        guidance_scale: float | None,
        scheduler: SchedulerName | None,
        spacing: Spacing | None,
        seed: int | Sequence[int] | None,
        strength: float,
        uncond: Uncond,
        sizes: requests.Sizes,
        control: ControlRequest | None,
    ) -> tuple[Plan, PackedCaptions | None, PackedCaptions | None]:
        if per_prompt < 1:
            raise ConfigError(f"num_images_per_prompt={per_prompt} must be at least 1")
        if (prompt is None) == (embeds is None):
            raise DataError("give prompt or prompt_embeds, one of them")
        if not 0 < strength <= 1:
            raise ConfigError(f"strength={strength} must be above 0 and at most 1")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
        count = len(embeds) if embeds is not None else len(prompts)
        if not count:
            raise DataError("there is no prompt: give one, or prompt_embeds")
        chosen = scheduler or self._suited()
        steps, guidance, notes = requests.plan_steps(
            chosen, num_inference_steps, guidance_scale, lcm_weights=self.lcm_weights
        )
        if guidance <= 1 and (negative_prompt or negative_embeds is not None):
            notes += ("negative_prompt does nothing without guidance: set guidance_scale above 1",)
        if uncond == "learned_null" and self.null_caption is None:
            raise ConfigError(
                "uncond='learned_null': this model was loaded without its null caption (diffusers' "
                "files have none; convert the official .pth)"
            )
        for note in notes:
            _log.warning("%s", note)
        given = negative_prompt if negative_prompt is not None else ""
        negatives = [given] * count if isinstance(given, str) else list(given)
        if len(negatives) != count:
            raise DataError(f"{len(negatives)} negative prompts for {count} prompts: give one each")
        images = count * per_prompt
        plan = Plan(
            prompts=tuple(prompts),
            negatives=tuple(negatives),
            seeds=requests.plan_seeds(seed, images),
            sizes=sizes,
            steps=steps,
            guidance=guidance,
            scheduler=chosen,
            spacing=(spacing or "even") if chosen == "lcm" else None,
            strength=strength,
            uncond=uncond,
            control=control,
            warnings=notes,
        )
        return plan, embeds, negative_embeds

    def _suited(self) -> SchedulerName:
        if self.lcm_weights:
            return "lcm"
        kind = type(self.scheduler).__name__
        if "LCM" in kind and self.lcm_weights is None:
            return "lcm"
        return "ddim" if kind.startswith("DDIM") else "dpm"

    def _texts(
        self,
        plan: Plan,
        captions: PackedCaptions | None,
        negatives: PackedCaptions | None,
        per_prompt: int,
        cleaning: bool,
    ) -> tuple[PackedCaptions, PackedCaptions | None]:
        device, dtype = self.compute_device, self.transformer.dtype
        wanted: list[str] = [] if captions is not None else list(plan.prompts)
        own_negatives = plan.guided and negatives is None and plan.uncond == "negative_prompt"
        if (wanted or own_negatives) and self.text_encoder is None:
            raise DataError(
                "this pipeline has no text encoder: load it with text=FOLDER, or give "
                "prompt_embeds (and negative_prompt_embeds for guidance)"
            )
        if captions is None:
            captions = self.encode(wanted, clean_caption=cleaning)
        captions = captions.to(device, dtype).repeat(per_prompt)
        if not plan.guided:
            return captions, None
        if plan.uncond == "learned_null":
            assert self.null_caption is not None  # noqa: S101 - checked with the plan
            everything = torch.ones(len(captions), dtype=torch.bool)
            return captions, captions.replaced(everything, self.null_caption, keep_lengths=True)
        if negatives is None:
            different = list(dict.fromkeys(plan.negatives))
            encoded = self.encode(different, clean_caption=cleaning, negative=True)
            negatives = encoded.rows([different.index(text) for text in plan.negatives])
        return captions, negatives.to(device, dtype).repeat(per_prompt)

    def _control(self, plan: Plan) -> Tensor | None:
        if plan.control is None:
            return None
        if self.controlnet is None:
            raise DataError(
                "control_image needs a control branch: load the pipeline with controlnet=FOLDER"
            )
        return control_latents(self.vae, self.hed, plan, self.compute_device)

    def _generators(
        self, plan: Plan, given: torch.Generator | Sequence[torch.Generator] | None
    ) -> list[torch.Generator]:
        count = len(plan.seeds)
        if given is None:  # on the CPU: a seed then means the same on every device
            return [torch.Generator().manual_seed(seed) for seed in plan.seeds]
        if isinstance(given, torch.Generator):
            return [given] * count
        if len(given) != count:
            raise DataError(f"{len(given)} generators for {count} images: give one for each")
        return list(given)

    def _draw(
        self,
        plan: Plan,
        captions: PackedCaptions,
        negatives: PackedCaptions | None,
        control: Tensor | None,
        start: Tensor | None,
        mask_image: Picture | None,
        latents: Tensor | None,
        generators: list[torch.Generator],
        callback: StepCallback | None,
    ) -> Tensor:
        device = self.compute_device
        factor = vae_factor(self.vae)
        sizes = plan.sizes
        shape = (
            len(plan.seeds), self.transformer.shape.in_channels,
            sizes.height // factor, sizes.width // factor,
        )  # fmt: skip
        scheduler = make_scheduler(plan.scheduler, self.scheduler.config)
        timesteps = self._timesteps(scheduler, plan, image=start is not None)
        noise = draw_like(torch.empty(shape, device=device), generators)
        if latents is not None:
            if tuple(latents.shape) != shape:
                raise DataError(f"latents of shape {tuple(latents.shape)}: expected {shape}")
            noise = latents.to(device, torch.float32)
        first = noise * scheduler.init_noise_sigma
        inpainting = None
        if start is not None:
            start = start.expand(shape).float()
            moment = torch.full((shape[0],), int(timesteps[0]), device=device)
            first = scheduler.add_noise(start, noise, moment)
            if mask_image is not None:
                mask = mask_tensor(mask_image, sizes.height, sizes.width, factor).to(device)
                inpainting = Inpainting(original=start, mask=mask, noise=noise)
        staged = self.memory != "full"
        bar = progress(total=len(timesteps), description="Drawing", unit="step")
        with (
            visiting(self.transformer, device, staged=staged),
            visiting(self.controlnet if control is not None else None, device, staged=staged),
            bar,
        ):
            predict = Predictor(
                self.transformer, plan, join([captions, negatives]) if negatives else captions,
                control, self.controlnet, self._fast, len(timesteps), device, shape[2:],
            )  # fmt: skip

            def on_step(state: StepState) -> Tensor | None:
                bar.update(1)
                changed = None
                if callback is not None:
                    tensors = {"latents": state.latents, "denoised": state.denoised}
                    changed = callback(self, state.index, state.timestep, tensors)
                if self._interrupt:
                    raise StopDrawing
                return (changed or {}).get("latents")

            return sample(
                predict, scheduler, timesteps, first,
                generators=generators, inpainting=inpainting, on_step=on_step,
            )  # fmt: skip

    def _timesteps(self, scheduler: Any, plan: Plan, *, image: bool) -> list[int]:
        if plan.scheduler == "lcm":
            scheduler.set_timesteps(
                plan.steps, spacing=plan.spacing, strength=plan.strength if image else 1.0
            )
            return scheduler.timesteps.tolist()
        with warnings.catch_warnings():
            # diffusers hands torch tensors to numpy in a way that numpy 2 frowns upon
            warnings.simplefilter("ignore", DeprecationWarning)
            scheduler.set_timesteps(plan.steps)
        points = scheduler.timesteps.tolist()
        if not image:
            return points
        kept = max(int(plan.steps * plan.strength), 1)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(len(points) - kept)
        return points[len(points) - kept :]

    def _decode(
        self,
        latents: Tensor,
        plan: Plan,
        tiling: bool | None,
        batch: int | None,
        output_type: str,
    ) -> list[Image.Image] | Tensor:
        staged = self.memory != "full"
        with visiting(self.vae, self.compute_device, staged=staged):
            if self._fast_vae is not None and tiling is None and latents.is_cuda:
                images = self._fast_vae(latents.to(self.vae.dtype)).clone()
            else:
                if staged and batch is None:
                    batch = 1
                images = decode(self.vae, latents, tiling=tiling, batch=batch)
        if not bool(images.isfinite().all()):
            raise DataError(
                "the decoded image holds NaN or infinity: the autoencoder overflowed in "
                f"{self.vae.dtype}; load it in float32 or bfloat16"
            )
        sizes = plan.sizes
        if output_type == "pt":
            return (images.float().clamp(-1, 1) + 1) / 2
        return [
            cover(picture, sizes.out_height, sizes.out_width) for picture in to_pictures(images)
        ]

    def _records(self, plan: Plan, from_image: bool) -> list[RunRecord]:
        weights = {
            name: self._hash(name, part)
            for name, part in (
                ("transformer", self.transformer), ("vae", self.vae),
                ("controlnet", self.controlnet if plan.control else None),
            )
            if part is not None
        }  # fmt: skip
        control = None
        if plan.control is not None:
            own = replace(plan.control, image=())
            control = {k: v for k, v in vars(own).items() if k != "image"}
        per_prompt = len(plan.seeds) // max(len(plan.prompts), 1)
        return [
            RunRecord(
                prompt=plan.prompts[i // per_prompt] if plan.prompts else "",
                negative_prompt=plan.negatives[i // per_prompt] if plan.prompts else "",
                seed=seed,
                height=plan.sizes.height,
                width=plan.sizes.width,
                steps=plan.steps,
                guidance=plan.guidance,
                scheduler=plan.scheduler,
                spacing=plan.spacing,
                model=self.name,
                weights=weights,
                adapters=self.adapters.active,
                control=control,
                strength=plan.strength if from_image else None,
                dtype=str(self.transformer.dtype).removeprefix("torch."),
                device=self.compute_device.type,
                versions=versions(),
            )
            for i, seed in enumerate(plan.seeds)
        ]

    def _hash(self, name: str, part: nn.Module) -> str:
        if name not in self._hashes:
            self._hashes[name] = fingerprint(part)
        return self._hashes[name]

    def _weights_changed(self) -> None:
        self._hashes.pop("transformer", None)
