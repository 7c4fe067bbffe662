"""The loop over diffusion steps: one function for every scheduler, with or without guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyzoo.core.errors import PolyzooError
from polyzoo.core.log import get_logger
from polyzoo.pixart_delta.scheduler import LcmStep, PixArtLCMScheduler

_log = get_logger(__name__)


class NotFiniteError(PolyzooError):
    """Latents became NaN or infinite."""


@dataclass(frozen=True, kw_only=True)
class Inpainting:
    """What stays of an image: outside the mask the original is put back after every step."""

    original: Tensor
    """`(b, 4, h, w)` clean latents."""
    mask: Tensor
    """`(1 or b, 1, h, w)`: 1 is painted anew."""
    noise: Tensor
    """`(b, 4, h, w)` that the original is laid under."""


@dataclass(frozen=True)
class StepState:
    """What a callback sees after a step."""

    index: int
    timestep: int
    latents: Tensor
    """Where the next step starts."""
    denoised: Tensor
    """Clean latents as this step sees them."""


Predict = Callable[[Tensor, Tensor, int], Tensor]
"""Latents, timestep `()` and index of the step to the guided noise prediction."""
OnStep = Callable[[StepState], Tensor | None]
"""Gets each step's state; returns latents to go on with, or None. May raise StopDrawing."""


class StopDrawing(Exception):  # noqa: N818 - a wish, not a failure
    """Raised by a step callback to end the loop with what there is."""


def sample(
    predict: Predict,
    scheduler: Any,
    timesteps: Sequence[int] | Tensor,
    latents: Tensor,
    *,
    generators: Sequence[torch.Generator],
    inpainting: Inpainting | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Take noisy latents to clean ones.

    Args:
        predict: The network with its guidance.
        scheduler: Ours or diffusers', with its timesteps set.
        timesteps: Those in use, descending.
        latents: `(b, 4, h, w)` at the noise of the first timestep.
        generators: One for each image.
        inpainting: What to keep.
        on_step: Called after each step.

    Raises:
        NotFiniteError: Latents held NaN or infinity; names the first such step.
    """
    steps = [int(t) for t in timesteps]
    sound: list[Tensor] = []
    denoised = latents
    for index, timestep in enumerate(steps):
        t = torch.tensor(timestep, device=latents.device)
        eps = predict(latents, t, index)
        made = _step(scheduler, eps, timestep, latents, generators)
        latents, denoised = made.prev_sample, made.denoised
        if inpainting is not None:
            latents = _put_back(scheduler, latents, inpainting, steps, index)
        sound.append(latents.isfinite().all())
        if on_step is not None:
            try:
                changed = on_step(StepState(index, timestep, latents, denoised))
            except StopDrawing:
                latents = denoised
                break
            if changed is not None:
                latents = changed.to(latents)
    check_finite(sound, steps)
    return latents


def check_finite(sound: Sequence[Tensor], steps: Sequence[int]) -> None:
    """Raise at the first step whose latents were not finite; waits for the device once."""
    if not sound:
        return
    flags = torch.stack(list(sound)).tolist()
    for index, good in enumerate(flags):
        if not good:
            raise NotFiniteError(
                f"latents became NaN or infinite in step {index + 1} of {len(steps)} (timestep "
                f"{steps[index]}); half precision overflowed or weights are damaged: try dtype "
                "bfloat16 or float32, or find the layer with first_bad_layer"
            )


def _step(
    scheduler: Any,
    eps: Tensor,
    timestep: int,
    latents: Tensor,
    generators: Sequence[torch.Generator],
) -> LcmStep:
    if isinstance(scheduler, PixArtLCMScheduler):
        made = scheduler.step(eps, timestep, latents, list(generators))
        assert isinstance(made, LcmStep)  # noqa: S101 - return_dict is on
        return made
    kept = float(scheduler.alphas_cumprod[timestep])
    denoised = (latents.float() - (1 - kept) ** 0.5 * eps.float()) / kept**0.5
    previous = scheduler.step(eps, timestep, latents, return_dict=False)[0]
    return LcmStep(previous, denoised.to(latents.dtype))


def _put_back(
    scheduler: Any, latents: Tensor, inpainting: Inpainting, steps: Sequence[int], index: int
) -> Tensor:
    original = inpainting.original
    if index + 1 < len(steps):
        following = torch.full((len(latents),), steps[index + 1], device=latents.device)
        original = scheduler.add_noise(original, inpainting.noise, following)
    mask = inpainting.mask.to(latents)
    return mask * latents + (1 - mask) * original.to(latents)


@torch.no_grad()
def first_bad_layer(network: torch.nn.Module, call: Callable[[], Any]) -> str | None:
    """Name the first layer whose output holds NaN or infinity in a call; None if none does.

    Example:
        >>> first_bad_layer(model, lambda: model(latents, captions, conditions))
        'transformer_blocks.12.ff.net.2'
    """
    bad: list[str] = []
    hooks = []
    for name, module in network.named_modules():
        if next(module.children(), None) is not None:
            continue

        def hook(_: Any, __: Any, out: Any, name: str = name) -> None:
            if isinstance(out, Tensor) and not bad and not bool(out.isfinite().all()):
                bad.append(name)

        hooks.append(module.register_forward_hook(hook))
    try:
        call()
    finally:
        for handle in hooks:
            handle.remove()
    return bad[0] if bad else None
