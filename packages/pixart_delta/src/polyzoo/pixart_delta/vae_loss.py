"""What the small autoencoder is trained on and measured by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from polyzoo.pixart_delta.icons import to_unit
from polyzoo.pixart_delta.objectives import Objective
from polyzoo.pixart_delta.recipe import VaeRecipe


def vae_objective(
    vae: Any, images: Tensor, generator: torch.Generator, recipe: VaeRecipe
) -> Objective:
    """Absolute error of pixels, of their differences and means, and a little divergence.

    Args:
        vae: An AutoencoderKL in training.
        images: `(b, 3, H, W)` in [-1, 1].
        generator: Draws from the posterior.
        recipe: Weights.
    """
    posterior = vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator, device=images.device)
    latents = posterior.mean.float() + posterior.std.float() * noise
    found = vae.decode(latents).sample.float()
    pixels = (found - images).abs().mean()
    edges = sum((found.diff(dim=axis) - images.diff(dim=axis)).abs().mean() for axis in (2, 3))
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    coarse = sum(F.avg_pool2d(found - images, side).abs().mean() for side in (4, 8))
    loss = pixels + recipe.edges * edges + recipe.coarse * coarse + recipe.kl * kl
    return Objective(loss, {"pixels": pixels.detach(), "kl": kl.detach()})


@torch.no_grad()
def psnr(vae: Any, images: Tensor, *, batch: int = 256) -> float:
    """Mean PSNR in dB of uint8 pictures `(n, 3, H, W)` through the posterior's mean."""
    values: list[Tensor] = []
    for part in images.split(batch):
        wanted = to_unit(part)
        found = vae.decode(vae.encode(wanted).latent_dist.mean).sample.float().clamp(-1, 1)
        error = ((found - wanted) / 2).square().flatten(1).mean(1)
        values.append(-10 * error.clamp(min=1e-10).log10())
    return float(torch.cat(values).mean())
