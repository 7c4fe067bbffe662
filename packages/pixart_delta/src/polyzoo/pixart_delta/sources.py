"""Pictures a run starts from or is steered by, as latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from torch import Tensor

from polyzoo.core.errors import DataError
from polyzoo.pixart_delta.edges import edge_maps
from polyzoo.pixart_delta.hed import HedNetwork
from polyzoo.pixart_delta.pictures import Picture, cover, read_picture, to_tensor
from polyzoo.pixart_delta.request import Plan
from polyzoo.pixart_delta.vae import encode_images


def source_latents(
    vae: AutoencoderKL,
    image: Picture | Sequence[Picture] | None,
    plan: Plan,
    device: torch.device,
) -> Tensor | None:
    """Clean latents `(1 or b, 4, h, w)` float32 of the picture a run starts from."""
    if image is None:
        return None
    pictures = _prepared(image, plan, "image")
    return encode_images(vae, to_tensor(pictures).to(device) * 2 - 1).sample().float()


def control_latents(
    vae: AutoencoderKL, hed: HedNetwork | None, plan: Plan, device: torch.device
) -> Tensor:
    """Latents `(b, 4, h, w)` of control maps: the posterior's mean, so that a seed decides all.

    Raises:
        DataError: The number of pictures fits neither one nor all, or the edge detector is missing.
    """
    assert plan.control is not None  # noqa: S101 - our caller's promise
    pictures = _prepared(plan.control.image, plan, "control_image")
    images = to_tensor(pictures).to(device)
    maps = control_maps(images, plan.control.kind, hed)
    latents = encode_images(vae, maps * 2 - 1).sample()
    return (
        latents if len(latents) == len(plan.seeds) else latents.expand(len(plan.seeds), -1, -1, -1)
    )


def control_maps(images: Tensor, kind: str, hed: HedNetwork | None) -> Tensor:
    """`(b, 3, H, W)` maps in [0, 1] of images in [0, 1]."""
    if kind == "raw":
        return images
    if kind == "edges":
        return edge_maps(images).expand(-1, 3, -1, -1)
    if hed is None:
        raise DataError(
            "control_type='hed' needs the edge detector: load the pipeline with hed=FILE "
            "(convert ControlNetHED.pth), give a ready map with control_type='raw', or use 'edges'"
        )
    hed = hed.to(images.device)
    return hed(images.to(hed.norm.dtype)).edge.float().expand(-1, 3, -1, -1)


def _prepared(given: Picture | Sequence[Picture], plan: Plan, name: str) -> list[Image.Image]:
    sources = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    images = len(plan.seeds)
    prompts = max(len(plan.negatives), 1)
    if len(sources) not in (1, prompts, images):
        raise DataError(
            f"{len(sources)} {name}s for {prompts} prompts and {images} images: give one for all, "
            "one a prompt, or one an image"
        )
    if len(sources) == prompts and prompts != images:
        sources = [source for source in sources for _ in range(images // prompts)]
    return [
        cover(read_picture(source, name=name), plan.sizes.height, plan.sizes.width)
        for source in sources
    ]
