"""Small towers with random weights, and pictures drawn on the spot."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from polyzoo.towers.dinov2 import DinoV2, DinoV2Config

SMALL = DinoV2Config(dim=48, depth=3, heads=4, patch=14, grid=5, head_channels=(16, 12, 8))
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", "cat", "kitten", "racing", "car")


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and statistic a random value, none of them 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator)
                value.copy_(noise.abs() + 0.1 if name.endswith("running_var") else 0.2 * noise)
    return module.eval()


def small_dinov2(seed: int = 0) -> DinoV2:
    model = randomised(DinoV2(SMALL), seed)
    assert isinstance(model, DinoV2)
    return model


def word_tokenizer() -> Tokenizer:
    """A tokenizer that knows a few words and puts [CLS] and [SEP] around them, as BERT's does."""
    tokenizer = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def scene(size: int = 224) -> Image.Image:
    """A red ball with a shine in front of a grey-blue gradient."""
    row = np.linspace(90, 200, size)
    colours = np.stack([row * 0.8, row * 0.9, row], axis=-1)
    image = Image.fromarray(np.repeat(colours[:, None], size, axis=1).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    unit = size / 224
    draw.ellipse([70 * unit, 60 * unit, 170 * unit, 160 * unit], fill=(200, 30, 25))
    draw.ellipse([90 * unit, 75 * unit, 120 * unit, 100 * unit], fill=(250, 200, 190))
    return image
