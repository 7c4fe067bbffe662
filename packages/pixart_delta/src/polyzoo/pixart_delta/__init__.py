"""PIXART-delta: images in 2-4 steps, controlled, from 8 GB up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyzoo.core.lazy import attach

if TYPE_CHECKING:
    from polyzoo.pixart_delta.captions import PackedCaptions as PackedCaptions
    from polyzoo.pixart_delta.config import ControlConfig as ControlConfig
    from polyzoo.pixart_delta.config import PixArtConfig as PixArtConfig
    from polyzoo.pixart_delta.control import Control as Control
    from polyzoo.pixart_delta.control import ControlBranch as ControlBranch
    from polyzoo.pixart_delta.model import Conditions as Conditions
    from polyzoo.pixart_delta.model import PixArtTransformer as PixArtTransformer

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Conditions": ".model",
        "Control": ".control",
        "ControlBranch": ".control",
        "ControlConfig": ".config",
        "PackedCaptions": ".captions",
        "PixArtConfig": ".config",
        "PixArtTransformer": ".model",
    },
)
