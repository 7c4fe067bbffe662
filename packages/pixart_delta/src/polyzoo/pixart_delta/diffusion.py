"""The forward process: noise schedule, and what follows from it (section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from polyzoo.pixart_delta.config import BETA_END, BETA_START, TRAIN_STEPS


@dataclass(frozen=True)
class NoiseSchedule:
    """Linear betas and what is derived from them, float64, one entry per step.

    Example:
        >>> noisy = schedule().add_noise(latents, noise, timestep)
    """

    betas: Tensor
    alphas_cumprod: Tensor
    posterior_log_variance: Tensor
    """Of q(x_{t-1} | x_t, x_0), in logarithm; its first entry repeats the second."""
    posterior_of_start: Tensor
    """Factor of x_0 in the mean of that posterior."""
    posterior_of_noisy: Tensor
    """Factor of x_t in it."""

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """x_t of latents `(b, ...)`, at timestep `(b,)`."""
        kept = self.take(self.alphas_cumprod, timestep, latents)
        return kept.sqrt() * latents + (1 - kept).sqrt() * noise

    def predict_start(self, noisy: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """x_0 that noise would have made noisy."""
        kept = self.take(self.alphas_cumprod, timestep, noisy)
        return (noisy - (1 - kept).sqrt() * noise) / kept.sqrt()

    def posterior_mean(self, start: Tensor, noisy: Tensor, timestep: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0)."""
        of_start = self.take(self.posterior_of_start, timestep, noisy)
        return of_start * start + self.take(self.posterior_of_noisy, timestep, noisy) * noisy

    @staticmethod
    def take(table: Tensor, timestep: Tensor, like: Tensor) -> Tensor:
        """Entries of a table, shaped to multiply a batch; float32 at least."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        values = table.to(timestep.device)[timestep].to(dtype)
        return values.view(-1, *([1] * (like.ndim - 1)))

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The tables on another device."""
        return _on(str(device))


@lru_cache(maxsize=8)
def _on(device: str) -> NoiseSchedule:
    betas = torch.linspace(BETA_START, BETA_END, TRAIN_STEPS, dtype=torch.float64)
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    variance = betas * (1 - before) / (1 - alphas_cumprod)
    variance[0] = variance[1]
    tables = (
        betas,
        alphas_cumprod,
        variance.log(),
        betas * before.sqrt() / (1 - alphas_cumprod),
        (1 - before) * (1 - betas).sqrt() / (1 - alphas_cumprod),
    )
    return NoiseSchedule(*(table.to(device) for table in tables))


def schedule(device: torch.device | str = "cpu") -> NoiseSchedule:
    """The schedule PixArt was trained with; its tables are made once a device."""
    return _on(str(device))


def mean_flat(values: Tensor) -> Tensor:
    """Mean over everything but the batch, in float32."""
    return values.float().flatten(1).mean(dim=1)
