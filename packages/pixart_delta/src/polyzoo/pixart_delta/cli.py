"""The `polyzoo pixart-delta` commands. Torch-free: what a command runs is named, imported then."""

from __future__ import annotations

from polyzoo.core.cli import Command, CommandGroup
from polyzoo.pixart_delta.options import ConvertConfig, EvalConfig, ExtractConfig, InferConfig
from polyzoo.pixart_delta.presets import PRESETS, PixArtTrainConfig

GROUP = CommandGroup(
    summary="Images from text in 1-8 steps, steered by edge maps",
    commands={
        "infer": Command(
            summary="Draw images",
            config=InferConfig,
            run="polyzoo.pixart_delta.infer:main",
            render="polyzoo.pixart_delta.infer:render",
        ),
        "extract": Command(
            summary="Encode images and captions once, to train on",
            config=ExtractConfig,
            run="polyzoo.pixart_delta.extract:main",
        ),
        "train": Command(
            summary="Train the base, distil it, train control, or the small autoencoder",
            config=PixArtTrainConfig,
            run="polyzoo.pixart_delta.train:main",
            render="polyzoo.pixart_delta.train:render",
            presets=PRESETS,
        ),
        "eval": Command(
            summary="Measure the small model on the icon pack",
            config=EvalConfig,
            run="polyzoo.pixart_delta.evaluate:main",
            render="polyzoo.pixart_delta.evaluate:render",
        ),
        "convert": Command(
            summary="Convert weights between the official layout and diffusers'",
            config=ConvertConfig,
            run="polyzoo.pixart_delta.convert:main",
        ),
    },
)
