"""Autoencoders: diffusers' AutoencoderKL, checked, and a small one for icons."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from polyzoo.attention import attention
from polyzoo.core.errors import WeightsError
from polyzoo.core.weights import load_into, read_weights
from polyzoo.pixart_delta.config import LATENT_SCALE


@dataclass(frozen=True)
class Posterior:
    """What the encoder says of images: unscaled mean and standard deviation, `(b, 4, h, w)`."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """Latents: the mean, or a draw where noise is given, times the autoencoder's factor."""
        value = self.mean if noise is None else self.mean + self.std * noise.to(self.mean)
        return value * LATENT_SCALE


def check_vae(vae: AutoencoderKL) -> AutoencoderKL:
    """Refuse an autoencoder of another family: its latents would mean nothing to the transformer.

    Raises:
        WeightsError: Another factor, or other than 4 channels.
    """
    scale, channels = vae.config["scaling_factor"], vae.config["latent_channels"]
    if channels != 4 or abs(scale - LATENT_SCALE) > 1e-6:
        raise WeightsError(
            f"the autoencoder has {channels} latent channels and scaling_factor={scale}; PixArt "
            f"needs 4 and {LATENT_SCALE} (Stable Diffusion's sd-vae-ft-ema); 0.13025 belongs to "
            "SDXL and PixArt-Sigma"
        )
    return vae


def vae_factor(vae: AutoencoderKL) -> int:
    """Image pixels along a side of a latent pixel."""
    return 2 ** (len(vae.config["block_out_channels"]) - 1)


def encode_images(vae: AutoencoderKL, images: Tensor) -> Posterior:
    """Posterior of images `(b, 3, H, W)` in [-1, 1]."""
    posterior = vae.encode(images.to(vae.dtype)).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
    return Posterior(posterior.mean, posterior.std)


def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images `(b, 3, H, W)` in [-1, 1] of scaled latents, not clamped."""
    return vae.decode((latents / LATENT_SCALE).to(vae.dtype), return_dict=False)[0]  # pyright: ignore[reportArgumentType]


class MidAttention:
    """The autoencoder's one attention, through polyzoo.attention (a processor for diffusers)."""

    def __call__(
        self,
        layer: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,  # noqa: ARG002 - diffusers' signature
        attention_mask: Tensor | None = None,  # noqa: ARG002
        temb: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """`(b, c, H, W)` to the same."""
        b, c, height, width = hidden_states.shape
        x = layer.group_norm(hidden_states.flatten(2)).transpose(1, 2)
        q, k, v = (
            proj(x).unflatten(2, (layer.heads, -1)).transpose(1, 2)
            for proj in (layer.to_q, layer.to_k, layer.to_v)
        )
        out = layer.to_out[0](attention(q, k, v).transpose(1, 2).flatten(2))
        out = out.transpose(1, 2).reshape(b, c, height, width)
        if layer.residual_connection:
            out = out + hidden_states
        return out / layer.rescale_output_factor


def small_vae() -> AutoencoderKL:
    """An untrained autoencoder of 1.6 M parameters, four pixels to a latent pixel, no attention."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 96),  # pyright: ignore[reportArgumentType]
        down_block_types=("DownEncoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        norm_num_groups=16,
        mid_block_add_attention=False,
        latent_channels=4,
        sample_size=64,
        scaling_factor=LATENT_SCALE,
    )


@torch.no_grad()
def whiten(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Make scaled latents of zero mean and unit deviation in every channel, in place.

    The change goes into the 1x1 convolutions around the latents, and the images stay the same.

    Args:
        vae: Trained.
        mean: `(4,)` of the unscaled latents over the training images.
        std: `(4,)`.
    """
    quant, post = vae.quant_conv, vae.post_quant_conv
    assert quant is not None and post is not None  # noqa: S101, PT018 - our own shape
    assert quant.bias is not None and post.bias is not None  # noqa: S101, PT018
    channels = len(mean)
    factor = std * LATENT_SCALE
    quant.bias[:channels] -= mean
    quant.bias[:channels] /= factor
    quant.weight[:channels] /= factor[:, None, None, None]
    quant.bias[channels:] -= 2 * factor.log()
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= factor[None, :, None, None]


def load_vae(folder: str | Path, *, dtype: torch.dtype | None = None) -> AutoencoderKL:
    """Read an autoencoder's folder, strictly.

    Raises:
        WeightsError: Files are missing, do not fit, or belong to another family.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise WeightsError(f"{folder}: no config.json, so not an autoencoder's folder")
    vae: AutoencoderKL = AutoencoderKL.from_config(AutoencoderKL.load_config(str(folder)))  # pyright: ignore[reportAssignmentType, reportArgumentType]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{folder}: no .safetensors file; convert a pickled one first")
    load_into(vae, read_weights(files[0], dtype=torch.float32), source=str(files[0]))
    if dtype is not None:
        nn.Module.to(vae, dtype)
    return check_vae(vae).eval()
