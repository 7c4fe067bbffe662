"""Training objectives as functions of networks and a batch: base, control, consistency."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polyzoo.pixart_delta.batches import LatentBatch
from polyzoo.pixart_delta.captions import PackedCaptions, RowCaptions
from polyzoo.pixart_delta.config import TRAIN_STEPS
from polyzoo.pixart_delta.diffusion import schedule
from polyzoo.pixart_delta.lcm import solver_grid
from polyzoo.pixart_delta.losses import (
    consistency,
    consistency_distance,
    diffusion_loss,
    solver_target,
)
from polyzoo.pixart_delta.model import Conditions
from polyzoo.pixart_delta.recipe import LcmRecipe, NoiseRecipe

Captions = PackedCaptions | RowCaptions
Network = Callable[[Tensor, Captions, Conditions, Tensor | None], Tensor]
"""Noisy latents, captions, conditions and control latents to the network's output."""


@dataclass(frozen=True)
class Objective:
    """What a step minimises, and what it tells."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step; given by tests, drawn in training."""

    noise: Tensor
    """Like the latents."""
    position: Tensor
    """int64 `(b,)`: timestep, or index into the solver's grid."""
    drop: Tensor | None = None
    """bool `(b,)`: captions that are replaced."""


def draw(
    batch: LatentBatch, generator: torch.Generator, *, positions: int, caption_dropout: float
) -> Draws:
    """Draw a step's noise, timesteps and dropped captions."""
    latents = batch.latents
    device, b = latents.device, len(batch)
    noise = torch.randn(latents.shape, generator=generator, device=device)
    position = torch.randint(0, positions, (b,), generator=generator, device=device)
    drop = None
    if caption_dropout > 0:
        drop = torch.rand(b, generator=generator, device=device) < caption_dropout
    return Draws(noise, position, drop)


def conditions_of(batch: LatentBatch, timestep: Tensor) -> Conditions:
    """Timestep, size and ratio; never rounded to half precision."""
    return Conditions(timestep=timestep.float(), size=batch.size, ratio=batch.ratio)


def noise_objective(
    network: Network, batch: LatentBatch, draws: Draws, recipe: NoiseRecipe, null: Tensor
) -> Objective:
    """Ordinary training (section 4), also of a control branch over a frozen base.

    Args:
        network: The model.
        batch: Data.
        draws: From `draw(positions=1000)`.
        recipe: Options of the loss.
        null: `(n, c)` what takes the place of dropped captions.
    """
    table = schedule(batch.latents.device)
    noisy = table.add_noise(batch.latents.float(), draws.noise, draws.position)
    captions = dropped(batch.captions, draws.drop, null, learned=recipe.null == "learned")
    conditions = conditions_of(batch, draws.position)
    output = network(noisy, captions, conditions, batch.control)
    parts = diffusion_loss(
        output,
        start=batch.latents,
        noisy=noisy,
        noise=draws.noise,
        timestep=draws.position,
        schedule=table,
        snr_loss=recipe.snr_loss,
    )
    metrics = {"mse": parts.mse.mean().detach(), "vb": parts.vb.mean().detach()}
    return Objective(parts.total.mean(), metrics)


def lcm_objective(
    student: Network,
    target: Network,
    teacher: Network,
    batch: LatentBatch,
    draws: Draws,
    recipe: LcmRecipe,
    null: Tensor,
) -> Objective:
    """One distillation step (section 5.2).

    Args:
        student: Trained.
        target: The average of the student, or for adapters the student itself; no gradient.
        teacher: The base model; asked once, for captions and null captions together.
        batch: Data.
        draws: From `draw(positions=recipe.grid_steps)`.
        recipe: Options.
        null: `(n, c)` the null caption.
    """
    latents = batch.latents.float()
    device = latents.device
    table, grid = schedule(device), solver_grid(recipe.grid_steps, str(device))
    channels = latents.shape[1]
    start, end = grid.timesteps[draws.position], grid.before[draws.position]
    noisy = table.add_noise(latents, draws.noise, start)
    learned = recipe.null == "learned"
    captions = dropped(batch.captions, draws.drop, null, learned=learned)
    eps = student(noisy, captions, conditions_of(batch, start), batch.control)[:, :channels]
    prediction, _ = consistency(noisy, eps, start, table)
    with torch.no_grad():
        everything = torch.ones(len(batch), dtype=torch.bool, device=device)
        uncond = dropped(batch.captions, everything, null, learned=learned)
        eps_cond, eps_uncond = _together(teacher, noisy, batch, uncond, start)
        before = solver_target(
            noisy, eps_cond, eps_uncond, draws.position,
            guidance=recipe.guidance, grid=grid, schedule=table,
        )  # fmt: skip
        eps_target = target(
            before.float(), batch.captions, conditions_of(batch, end), batch.control
        )[:, :channels]
        wanted, _ = consistency(before, eps_target.double(), end, table)
    loss = consistency_distance(prediction, wanted, kind=recipe.loss, c=recipe.huber_c)
    return Objective(loss)


def dropped(captions: Captions, drop: Tensor | None, null: Tensor, *, learned: bool) -> Captions:
    """Captions with the null caption in some rows; the learned one keeps the caption's mask."""
    if drop is None:
        return captions
    return captions.replaced(drop, null, keep_lengths=learned)


def _together(
    teacher: Network, noisy: Tensor, batch: LatentBatch, uncond: Captions, timestep: Tensor
) -> tuple[Tensor, Tensor]:
    """Noise for the captions and for the null captions, from one pass."""
    channels = noisy.shape[1]

    def twice(value: Tensor | None) -> Tensor | None:
        return None if value is None else torch.cat([value, value])

    conditions = Conditions(
        timestep=torch.cat([timestep, timestep]).float(),
        size=twice(batch.size),
        ratio=twice(batch.ratio),
    )
    both = torch.cat([noisy, noisy])
    out = teacher(both, stacked(batch.captions, uncond), conditions, twice(batch.control))
    cond, other = out[:, :channels].chunk(2)
    return cond, other


def stacked(first: Captions, second: Captions) -> Captions:
    """Two batches of captions as one."""
    if isinstance(first, RowCaptions) and isinstance(second, RowCaptions):
        return RowCaptions(
            torch.cat([first.states, second.states]), torch.cat([first.kv_lens, second.kv_lens])
        )
    assert isinstance(first, PackedCaptions) and isinstance(second, PackedCaptions)  # noqa: S101, PT018
    return PackedCaptions(torch.cat([first.tokens, second.tokens]), first.lengths + second.lengths)


STEPS = TRAIN_STEPS
"""Positions of `noise_objective`."""
