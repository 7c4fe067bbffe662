"""What training minimises: noise prediction with learned variance, and consistency (4, 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from polyzoo.pixart_delta.diffusion import NoiseSchedule, mean_flat
from polyzoo.pixart_delta.lcm import SolverGrid, boundary_scalings

_EDGE = 0.999
_BIN = 1 / 255


@dataclass(frozen=True)
class DiffusionLoss:
    """Per-sample parts of the loss, `(b,)` float32."""

    mse: Tensor
    vb: Tensor
    """Variational term in bits; zero where the model does not learn its variance."""

    @property
    def total(self) -> Tensor:
        """Their sum."""
        return self.mse + self.vb


def diffusion_loss(
    output: Tensor,
    *,
    start: Tensor,
    noisy: Tensor,
    noise: Tensor,
    timestep: Tensor,
    schedule: NoiseSchedule,
    snr_loss: bool = False,
) -> DiffusionLoss:
    """The loss of ordinary and ControlNet training.

    Args:
        output: `(b, 2c, H, W)` of the network, or `(b, c, H, W)` without learned variance.
        start: `(b, c, H, W)` clean latents.
        noisy: x_t.
        noise: What was added.
        timestep: `(b,)`.
        schedule: On the same device.
        snr_loss: Compare the noise above step 249 and the clean latents at and below it.
    """
    channels = start.shape[1]
    output = output.float()
    eps = output[:, :channels]
    error = mean_flat((noise.float() - eps) ** 2)
    if snr_loss:
        guess = schedule.predict_start(noisy.float(), eps, timestep)
        error = torch.where(timestep > 249, error, mean_flat((start.float() - guess) ** 2))
    if output.shape[1] == channels:
        return DiffusionLoss(error, torch.zeros_like(error))
    vb = variational_bound(
        eps.detach(), output[:, channels:], start=start, noisy=noisy, timestep=timestep,
        schedule=schedule,
    )  # fmt: skip
    return DiffusionLoss(error, vb)


def variational_bound(
    eps: Tensor,
    interpolation: Tensor,
    *,
    start: Tensor,
    noisy: Tensor,
    timestep: Tensor,
    schedule: NoiseSchedule,
) -> Tensor:
    """One term of the variational bound in bits per element, `(b,)`; only the variance learns.

    Args:
        eps: Noise prediction, without gradient.
        interpolation: From -1 (posterior variance) to 1 (beta), in the logarithm.
        start: Clean latents.
        noisy: x_t.
        timestep: `(b,)`; at 0 the discretised likelihood takes the place of the divergence.
        schedule: On the same device.
    """
    start, noisy = start.float(), noisy.float()
    low = schedule.take(schedule.posterior_log_variance, timestep, noisy)
    high = schedule.take(schedule.betas.log(), timestep, noisy)
    share = (interpolation + 1) / 2
    log_variance = share * high + (1 - share) * low
    mean = schedule.posterior_mean(schedule.predict_start(noisy, eps, timestep), noisy, timestep)
    true_mean = schedule.posterior_mean(start, noisy, timestep)
    divergence = 0.5 * (
        -1.0
        + log_variance
        - low
        + torch.exp(low - log_variance)
        + (true_mean - mean) ** 2 * torch.exp(-log_variance)
    )
    likelihood = -discretised_log_likelihood(start, mean=mean, log_scale=0.5 * log_variance)
    chosen = torch.where(timestep.view(-1, *([1] * (start.ndim - 1))) == 0, likelihood, divergence)
    return mean_flat(chosen) / math.log(2.0)


def discretised_log_likelihood(x: Tensor, *, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability of the bin of width 2/255 around x under a Gaussian, elementwise."""
    centred = x - mean
    inverse = torch.exp(-log_scale)
    above = _normal_cdf(inverse * (centred + _BIN))
    below = _normal_cdf(inverse * (centred - _BIN))
    inside = (above - below).clamp(min=1e-12).log()
    lowest = above.clamp(min=1e-12).log()
    highest = (1 - below).clamp(min=1e-12).log()
    return torch.where(x < -_EDGE, lowest, torch.where(x > _EDGE, highest, inside))


def _normal_cdf(x: Tensor) -> Tensor:
    """The usual tanh approximation, which the published loss uses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def pseudo_huber(prediction: Tensor, target: Tensor, *, c: float = 0.001) -> Tensor:
    """Mean of sqrt(error^2 + c^2) - c over all elements."""
    error = prediction.float() - target.float()
    return (torch.sqrt(error**2 + c**2) - c).mean()


def consistency_distance(
    prediction: Tensor, target: Tensor, *, kind: str = "huber", c: float = 0.001
) -> Tensor:
    """Distance of two consistency predictions: "huber" or "l2"."""
    if kind == "l2":
        return ((prediction.float() - target.float()) ** 2).mean()
    return pseudo_huber(prediction, target, c=c)


def consistency(
    x: Tensor, eps: Tensor, timestep: Tensor, schedule: NoiseSchedule
) -> tuple[Tensor, Tensor]:
    """f(x, t) = c_skip x + c_out x_0, and x_0 itself (section 5.1)."""
    start = schedule.predict_start(x.float(), eps.float(), timestep)
    skip, out = (s.view(-1, *([1] * (x.ndim - 1))) for s in boundary_scalings(timestep))
    return skip * x + out * start, start


def solver_target(
    x: Tensor,
    eps_cond: Tensor,
    eps_uncond: Tensor,
    index: Tensor,
    *,
    guidance: float,
    grid: SolverGrid,
    schedule: NoiseSchedule,
) -> Tensor:
    """The teacher's guided DDIM step from grid point `index` to the one before, float64.

    Args:
        x: x_t at the grid point.
        eps_cond: The teacher's noise for the caption.
        eps_uncond: And for the null caption.
        index: `(b,)` into the grid.
        guidance: w; both x_0 and noise are c + w (c - u), ordinary guidance of scale 1 + w.
        grid: The solver's points.
        schedule: On the same device.
    """
    timestep = grid.timesteps[index]
    cond = schedule.predict_start(x.double(), eps_cond.double(), timestep)
    uncond = schedule.predict_start(x.double(), eps_uncond.double(), timestep)
    start = cond + guidance * (cond - uncond)
    eps = eps_cond.double() + guidance * (eps_cond.double() - eps_uncond.double())
    before = grid.alphas_cumprod_before[index].view(-1, *([1] * (x.ndim - 1)))
    return before.sqrt() * start + (1 - before).sqrt() * eps
