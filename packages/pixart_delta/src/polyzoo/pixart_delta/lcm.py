"""Latent consistency: boundary scalings, the solver's grid, and the inference steps (section 5)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from polyzoo.core.errors import ConfigError
from polyzoo.pixart_delta.config import TRAIN_STEPS
from polyzoo.pixart_delta.diffusion import schedule

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0
GRID_STEPS = 50

Spacing = Literal["even", "skip"]


def boundary_scalings(timestep: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of f(x, t) = c_skip x + c_out x_0, float32; f(x, 0) = x."""
    scaled = timestep.float() * TIMESTEP_SCALING
    sum_of_squares = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / sum_of_squares, scaled / sum_of_squares.sqrt()


@dataclass(frozen=True)
class SolverGrid:
    """The steps between which the teacher's solver goes in distillation."""

    timesteps: Tensor
    """int64, ascending: 19, 39, ..., 999 for 50 points."""
    before: Tensor
    """The timestep that each point leads to; 0 for the first."""
    alphas_cumprod: Tensor
    """float64, at the points."""
    alphas_cumprod_before: Tensor
    """At the points they lead to; the first leads to timestep 0."""


@lru_cache(maxsize=8)
def solver_grid(steps: int = GRID_STEPS, device: str = "cpu") -> SolverGrid:
    """The grid of `steps` points on a device."""
    if not 1 <= steps <= TRAIN_STEPS:
        raise ConfigError(f"steps={steps} of the solver must be 1 to {TRAIN_STEPS}")
    skip = TRAIN_STEPS // steps
    timesteps = torch.arange(1, steps + 1) * skip - 1
    table = schedule().alphas_cumprod
    kept = table[timesteps]
    made = (timesteps, (timesteps - skip).clamp(min=0), kept, torch.cat([table[:1], kept[:-1]]))
    return SolverGrid(*(tensor.to(device) for tensor in made))


def lcm_timesteps(
    steps: int, *, spacing: Spacing = "even", grid_steps: int = GRID_STEPS, strength: float = 1.0
) -> list[int]:
    """The timesteps of a few-step run, descending.

    Args:
        steps: Network evaluations.
        spacing: "even" spreads them over the grid as diffusers does; "skip" takes every
            (grid // steps)-th as the official code does, which ends early for odd numbers.
        grid_steps: Points of the grid the student was distilled on.
        strength: Share of the grid that is used, from its clean end: below 1 for image-to-image.

    Raises:
        ConfigError: More steps than grid points in use, or a value out of range.
    """
    if not 0 < strength <= 1:
        raise ConfigError(f"strength={strength} must be above 0 and at most 1")
    usable = int(grid_steps * strength)
    if not 1 <= steps <= usable:
        share = f" with strength={strength}" if strength < 1 else ""
        raise ConfigError(
            f"steps={steps} must be 1 to {usable}{share}: the student knows {usable} points"
            + ("; raise strength or lower steps" if usable < GRID_STEPS else "")
        )
    skip = TRAIN_STEPS // grid_steps
    points = [skip * (i + 1) - 1 for i in reversed(range(usable))]
    if spacing == "skip":
        return points[:: usable // steps][:steps]
    # np.linspace(0, n, steps, endpoint=False), floored, in exact arithmetic
    return [points[usable * i // steps] for i in range(steps)]
