"""Scenes made on the device: cut-outs pasted on backgrounds, with exact boxes, masks and labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_VISIBLE = 0.5
_LEAST_SHARE = 0.25
"""A thing of which less than this is left is not labelled."""
_CANDIDATES = 8


@dataclass(frozen=True)
class Scenes:
    """A batch of composed images."""

    images: Tensor
    """`(b, c, S, S)` of 0..1; channels behind the third are the background's own."""
    boxes: Tensor
    """`(b, k, 4)` as shares of the side."""
    masks: Tensor
    """bool `(b, k, S / 4, S / 4)`: what is visible of each thing."""
    cutouts: Tensor
    """int64 `(b, k)`: index of each cut-out."""
    present: Tensor
    """bool `(b, k)`."""


def compose(
    cutouts: Tensor,
    backgrounds: Tensor,
    *,
    scenes: int,
    side: int,
    most: int = 6,
    generator: torch.Generator,
    chances: Tensor | None = None,
) -> Scenes:
    """Paste 2 to `most` cut-outs on random parts of backgrounds.

    Args:
        cutouts: uint8 `(n, 4, s, s)`: red, green, blue, alpha.
        backgrounds: uint8 `(m, c, t, t)`: three colours, and further channels that are only moved
            along with them.
        scenes: How many images.
        side: Of the images, in pixels.
        most: Cut-outs in an image.
        generator: Draws everything; on the tensors' device.
        chances: `(n,)` weights of the cut-outs; equal where not given.
    """
    device = cutouts.device

    def draw(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*shape, device=device, generator=generator)

    canvas = _grounds(backgrounds, scenes, side, draw, generator)
    if chances is None:
        chosen = torch.randint(len(cutouts), (scenes, most), device=device, generator=generator)
    else:
        drawn = torch.multinomial(chances, scenes * most, replacement=True, generator=generator)
        chosen = drawn.view(scenes, most)
    sizes = draw(scenes, most, low=0.12, high=0.55)
    # Some scenes have a large thing first, as photographs do.
    large = draw(scenes) < 0.25
    sizes[:, 0] = torch.where(large, draw(scenes, low=0.5, high=1.1), sizes[:, 0])
    centers, apart = _places(sizes, draw)
    count = 2 + (draw(scenes) * (most - 1)).long()
    wanted = apart & (torch.arange(most, device=device) < count[:, None])
    angle = draw(scenes, most, low=-0.25, high=0.25)
    flip = torch.where(draw(scenes, most) < 0.5, -1.0, 1.0)
    stretch = draw(scenes, most, low=0.85, high=1.18)
    alphas: list[Tensor] = []
    for slot in range(most):
        grid = _grid(
            centers[:, slot], sizes[:, slot], angle[:, slot], flip[:, slot], stretch[:, slot], side
        )
        picture = cutouts[chosen[:, slot]].float() / 255
        # Colours are multiplied by alpha first: transparent pixels have none to lend to edges.
        picture = torch.cat([picture[:, :3] * picture[:, 3:], picture[:, 3:]], 1)
        pasted = F.grid_sample(picture, grid, align_corners=False)
        pasted = pasted * wanted[:, slot, None, None, None]
        colours = canvas[:, :3] * (1 - pasted[:, 3:]) + _tinted(pasted[:, :3], draw)
        canvas = torch.cat([colours, canvas[:, 3:]], 1)
        alphas = [alpha * (1 - pasted[:, 3]) for alpha in alphas]
        alphas.append(pasted[:, 3])
    alpha = torch.stack(alphas, 1)
    visible = alpha > _VISIBLE
    boxes, area = _bounds(visible)
    full = (sizes * side) ** 2
    present = wanted & (area > 64) & (area > _LEAST_SHARE * 0.3 * full)
    masks = F.max_pool2d(visible.float(), 4) > 0
    images = torch.cat([_weathered(canvas[:, :3], draw), canvas[:, 3:]], 1)
    return Scenes(images, boxes, masks, chosen, present)


def _grounds(backgrounds: Tensor, scenes: int, side: int, draw, generator) -> Tensor:  # noqa: ANN001
    """Random squares of the backgrounds, flipped half of the time."""
    device = backgrounds.device
    which = torch.randint(len(backgrounds), (scenes,), device=device, generator=generator)
    scale = draw(scenes, low=0.35, high=1.0)
    shift = draw(scenes, 2, low=-1.0, high=1.0) * (1 - scale)[:, None]
    mirrored = torch.where(draw(scenes) < 0.5, -1.0, 1.0)
    theta = torch.zeros(scenes, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 1, 1] = scale * mirrored, scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, [scenes, 3, side, side], align_corners=False)
    return F.grid_sample(
        backgrounds[which].float() / 255, grid, align_corners=False, padding_mode="reflection"
    )


def _places(sizes: Tensor, draw) -> tuple[Tensor, Tensor]:  # noqa: ANN001
    """Centres that overlap earlier ones little, and whether such a place was found."""
    scenes, most = sizes.shape
    centers = sizes.new_zeros(scenes, most, 2)
    apart = torch.ones(scenes, most, dtype=torch.bool, device=sizes.device)
    for slot in range(most):
        half = sizes[:, slot, None, None] / 2
        tries = half * 0.8 + draw(scenes, _CANDIDATES, 2) * (1 - 1.6 * half)
        worst = sizes.new_zeros(scenes, _CANDIDATES)
        for earlier in range(slot):
            other = sizes[:, earlier, None, None] / 2
            gap = (half + other) - (tries - centers[:, earlier, None]).abs()
            overlap = gap.clamp(min=0)
            overlap = torch.minimum(overlap, 2 * torch.minimum(half, other)).prod(-1)
            union = (4 * half**2 + 4 * other**2).squeeze(-1) - overlap
            counts = apart[:, earlier, None]
            worst = torch.maximum(worst, overlap / union * counts)
        least, place = worst.min(1)
        centers[:, slot] = tries[torch.arange(scenes, device=sizes.device), place]
        apart[:, slot] = least <= 0.3
    return centers, apart


def _grid(
    center: Tensor, size: Tensor, angle: Tensor, flip: Tensor, stretch: Tensor, side: int
) -> Tensor:
    """Where each pixel of the canvas reads the cut-out."""
    theta = center.new_zeros(len(center), 2, 3)
    cos, sin = angle.cos() / size, angle.sin() / size
    theta[:, 0, 0], theta[:, 0, 1] = flip * cos * stretch, flip * sin
    theta[:, 1, 0], theta[:, 1, 1] = -sin * stretch, cos
    middle = (2 * center - 1)[..., None]
    theta[:, :, 2] = -(theta[:, :, :2] @ middle)[..., 0]
    return F.affine_grid(theta, [len(center), 4, side, side], align_corners=False)


def _bounds(visible: Tensor) -> tuple[Tensor, Tensor]:
    """Box and area of bool `(b, k, S, S)` masks."""
    side = visible.shape[-1]
    columns, rows = visible.any(-2), visible.any(-1)
    places = torch.arange(side, device=visible.device)

    def ends(line: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.where(line, places, side).amin(-1)
        last = torch.where(line, places + 1, 0).amax(-1)
        return first, last

    (x0, x1), (y0, y1) = ends(columns), ends(rows)
    boxes = torch.stack([x0, y0, x1, y1], -1).float() / side
    area = visible.sum((-2, -1))
    empty = (area == 0)[..., None]
    return torch.where(empty, boxes.new_tensor([0.0, 0.0, 1.0, 1.0]), boxes), area


def _tinted(colours: Tensor, draw) -> Tensor:  # noqa: ANN001
    """Change brightness of a pasted thing a little, as another light would."""
    return (colours * draw(len(colours), 1, 1, 1, low=0.8, high=1.15)).clamp(max=1)


def _weathered(images: Tensor, draw) -> Tensor:  # noqa: ANN001
    """Contrast, colour, noise and blur over the whole image; some become grey."""
    n = len(images)
    grey = images.mean(1, keepdim=True)
    amount = draw(n, 1, 1, 1, low=0.5, high=1.3)
    amount = torch.where(draw(n, 1, 1, 1) < 0.1, torch.zeros_like(amount), amount)
    images = grey + (images - grey) * amount
    images = (images - 0.5) * draw(n, 1, 1, 1, low=0.7, high=1.2) + 0.5
    images = images + draw(n, 1, 1, 1, low=-0.1, high=0.1)
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    images = torch.where(draw(n, 1, 1, 1) < 0.4, blurred, images)
    noise = draw(n, 3, images.shape[-2], images.shape[-1], low=-1.0, high=1.0)
    return (images + 0.04 * draw(n, 1, 1, 1) * noise).clamp(0, 1)
