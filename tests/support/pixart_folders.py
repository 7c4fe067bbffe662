"""A whole tiny model on disk: untrained, but every part real."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from polyzoo.pixart_delta.config import PixArtConfig
from polyzoo.pixart_delta.folders import save_control, save_null, save_transformer, save_vae
from polyzoo.pixart_delta.vae import small_vae
from polyzoo.pixart_delta.words import WordEncoder
from support.pixart_models import shaken, tiny_branch, tiny_model

WORDS = ("red", "apple", "cat", "face", "flat", "style", "house", "blue")
CHANNELS = 16


def word_encoder() -> WordEncoder:
    generator = torch.Generator().manual_seed(7)
    return WordEncoder(WORDS, torch.randn(len(WORDS), CHANNELS, generator=generator), length=10)


def write_model(
    folder: Path, *, kind: str = "base", control: bool = True, multi_scale: bool = True
) -> PixArtConfig:
    """A folder as training leaves it: images of 32 pixels, 4 pixels to a latent pixel."""
    model = tiny_model(use_additional_conditions=multi_scale, caption_channels=CHANNELS)
    save_transformer(folder, model, kind=kind)
    torch.manual_seed(5)
    save_vae(folder, shaken(small_vae()))
    word_encoder().save(folder / "text")
    save_null(folder, torch.randn(10, CHANNELS, generator=torch.Generator().manual_seed(1)))
    if control:
        save_control(folder, tiny_branch(model))
    return model.shape


def picture(seed: int = 0, size: tuple[int, int] = (40, 40)) -> Image.Image:
    """Coloured squares on white."""
    generator = torch.Generator().manual_seed(seed)
    made = Image.new("RGB", size, "white")
    for _ in range(3):
        left, top, r, g, b = torch.randint(0, 24, (5,), generator=generator).tolist()
        made.paste((r * 10, g * 10, b * 10), (left, top, left + 14, top + 14))
    return made
