"""The `polyzoo pixart-delta` commands. Torch-free: what a command runs is named, imported then."""

from __future__ import annotations

from polyzoo.core.cli import Command, CommandGroup
from polyzoo.pixart_delta.presets import PRESETS, PixArtTrainConfig

GROUP = CommandGroup(
    summary="Images from text in 2-4 steps, steered by edge maps",
    commands={
        "train": Command(
            summary="Train the base, distil it, train control, or the small autoencoder",
            config=PixArtTrainConfig,
            run="polyzoo.pixart_delta.train:main",
            render="polyzoo.pixart_delta.train:render",
            presets=PRESETS,
        ),
    },
)
