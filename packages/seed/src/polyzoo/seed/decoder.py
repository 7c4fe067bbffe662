"""A small de-tokeniser of our own: pictures of 64 pixels from codes, by a few steps of a flow.

A picture is integrated from noise (rectified flow) by a U-Net that looks at the decoded codes. As
with the paper's diffusion model, the result means the same as the source; pixels may differ.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyzoo.attention import attention
from polyzoo.core.errors import ConfigError
from polyzoo.seed.decoder_config import DecoderConfig


class _Residual(nn.Module):
    """Two convolutions whose norms are shifted and scaled by the embedding."""

    def __init__(self, inside: int, outside: int, embedding: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(inside // 16, inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * outside)
        self.norm2 = nn.GroupNorm(outside // 16, outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        self.skip = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.modulate.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        out = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulate(embedding)[:, :, None, None].chunk(2, 1)
        out = self.conv2(F.silu(self.norm2(out) * (1 + scale) + shift))
        return self.skip(x) + out


class _Look(nn.Module):
    """Every place looks at the code vectors, and at all places."""

    def __init__(self, width: int, context_width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 32)
        self.norm = nn.GroupNorm(width // 16, width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.context = nn.Linear(context_width, 2 * width)
        self.output = nn.Linear(width, width)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        b, d, rows, columns = x.shape
        flat = self.norm(x).flatten(2).transpose(1, 2)
        both = torch.cat((self.key_value(flat), self.context(context)), 1)
        k, v = both.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.query(flat).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = self.output(attention(q, k, v).transpose(1, 2).flatten(2))
        return x + out.transpose(1, 2).reshape(b, d, rows, columns)


class PixelDecoder(nn.Module):
    """From code vectors (b, n, d) to the velocity of a noisy picture.

    Example:
        >>> decoder = PixelDecoder(DecoderConfig(context_width=128)).eval()
        >>> draw(decoder, torch.zeros(2, 16, 128), seeds=[0, 1]).shape
        torch.Size([2, 3, 64, 64])
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        e, (first, second, third) = config.embedding, config.widths
        self.time = nn.Sequential(nn.Linear(e, e), nn.SiLU(), nn.Linear(e, e))
        self.pooled = nn.Linear(config.context_width, e)
        self.nothing = nn.Parameter(torch.randn(1, 1, config.context_width) * 0.02)
        self.enter = nn.Conv2d(12, first, 3, padding=1)
        self.down1 = _Residual(first, first, e)
        self.down2 = nn.ModuleList((_Residual(first, second, e), _Residual(second, second, e)))
        self.down3 = nn.ModuleList((_Residual(second, third, e), _Residual(third, third, e)))
        self.look3 = nn.ModuleList((_Look(third, config.context_width),
                                    _Look(third, config.context_width)))  # fmt: skip
        self.up2 = _Residual(third + second, second, e)
        self.look2 = _Look(second, config.context_width)
        self.up1 = nn.ModuleList((_Residual(second + first, first, e), _Residual(first, first, e)))
        self.leave = nn.Sequential(
            nn.GroupNorm(first // 16, first), nn.SiLU(), nn.Conv2d(first, 12, 3, padding=1)
        )

    def forward(self, noisy: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """Return the velocity (b, 3, S, S) from noise to picture.

        Args:
            noisy: (b, 3, S, S), `(1 - t) noise + t picture` with pictures in -1 to 1.
            time: (b,) in 0 to 1.
            context: (b, n, d) code vectors.
        """
        embedding = self.time(_waves(time, self.config.embedding)) + self.pooled(context.mean(1))
        embedding = F.silu(embedding)
        x = self.enter(F.pixel_unshuffle(noisy, 2))
        half = self.down1(x, embedding)
        x = F.avg_pool2d(half, 2)
        for block in self.down2:
            x = block(x, embedding)
        quarter, x = x, F.avg_pool2d(x, 2)
        for block, look in zip(self.down3, self.look3, strict=True):
            x = look(block(x, embedding), context)
        x = torch.cat((F.interpolate(x, scale_factor=2.0), quarter), 1)
        x = self.look2(self.up2(x, embedding), context)
        x = torch.cat((F.interpolate(x, scale_factor=2.0), half), 1)
        for block in self.up1:
            x = block(x, embedding)
        return F.pixel_shuffle(self.leave(x), 2)

    def without(self, context: Tensor, drop: Tensor) -> Tensor:
        """Return the context with some pictures' vectors replaced by the learned nothing."""
        return torch.where(drop[:, None, None], self.nothing.to(context.dtype), context)


def flow_loss(
    decoder: nn.Module, pictures: Tensor, context: Tensor, *, generator: torch.Generator,
    drop: float = 0.1,
) -> Tensor:  # fmt: skip
    """Mean squared error of the velocity, at logit-normal times.

    Args:
        decoder: A PixelDecoder.
        pictures: (b, 3, S, S) in 0 to 1.
        context: (b, n, d).
        generator: Draws times, noise and what is dropped.
        drop: Share of pictures trained without codes, for guidance.
    """
    target = pictures.float() * 2 - 1
    b, device = len(target), target.device
    noise = torch.randn(target.shape, generator=generator, device=device)
    time = torch.randn(b, generator=generator, device=device).sigmoid()
    at = time[:, None, None, None]
    dropped = torch.rand(b, generator=generator, device=device) < drop
    context = decoder.without(context, dropped)  # pyright: ignore[reportCallIssue]
    velocity = decoder((1 - at) * noise + at * target, time, context)
    return F.mse_loss(velocity.float(), target - noise)


@torch.no_grad()
def draw(
    decoder: PixelDecoder,
    context: Tensor,
    *,
    seeds: list[int],
    steps: int | None = None,
    guidance: float | None = None,
) -> Tensor:
    """Draw pictures (b, 3, S, S) in 0 to 1; each depends on its own seed only.

    Args:
        decoder: In eval mode.
        context: (b, n, d) code vectors.
        seeds: One for each picture.
        steps: Of the integration (midpoint rule, two evaluations each).
        guidance: 1 draws without the unconditional pass.

    Raises:
        ConfigError: Steps below 1, or seeds that are not as many as pictures.
    """
    steps = decoder.config.steps if steps is None else steps
    guidance = decoder.config.guidance if guidance is None else guidance
    if steps < 1:
        raise ConfigError(f"steps={steps} must be at least 1")
    if len(seeds) != len(context):
        raise ConfigError(f"{len(seeds)} seeds for {len(context)} pictures; give one for each")
    size, device = decoder.config.size, context.device
    x = torch.stack(
        [torch.randn(3, size, size, generator=torch.Generator().manual_seed(s)) for s in seeds]
    ).to(device)
    nothing = decoder.nothing.to(context.dtype).expand_as(context)

    def velocity(x: Tensor, t: float) -> Tensor:
        time = torch.full((len(x),), t, device=device)
        if guidance == 1:
            return decoder(x, time, context).float()
        both = decoder(x.repeat(2, 1, 1, 1), time.repeat(2), torch.cat((context, nothing)))
        with_codes, without = both.float().chunk(2)
        return without + guidance * (with_codes - without)

    times = [i / steps for i in range(steps + 1)]
    for now, then in pairwise(times):
        x = x + (then - now) * velocity(x, now)
    return (x / 2 + 0.5).clamp(0, 1)


def _waves(time: Tensor, width: int) -> Tensor:
    """Sines and cosines of a time in 0 to 1: (b, width)."""
    half = width // 2
    rates = torch.exp(-math.log(1000.0) * torch.arange(half, device=time.device) / half)
    angles = 1000.0 * time[:, None].float() * rates
    return torch.cat((angles.sin(), angles.cos()), 1)
