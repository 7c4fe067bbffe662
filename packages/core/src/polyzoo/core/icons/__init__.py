"""Emoji and clip art with captions and fixed splits: what the image models are trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyzoo.core.lazy import attach

if TYPE_CHECKING:
    from polyzoo.core.icons.captions import caption as caption
    from polyzoo.core.icons.pack import IconPack as IconPack
    from polyzoo.core.icons.records import IconRecord as IconRecord

__getattr__, __dir__, __all__ = attach(
    __name__, {"IconPack": ".pack", "IconRecord": ".records", "caption": ".captions"}
)
