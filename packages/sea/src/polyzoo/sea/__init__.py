"""SEA: natural-language search over long code by splitting, encoding and aggregating."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyzoo.core.lazy import attach

if TYPE_CHECKING:
    from polyzoo.sea.config import SeaConfig as SeaConfig
    from polyzoo.sea.config import SplitConfig as SplitConfig
    from polyzoo.sea.model import SeaModel as SeaModel
    from polyzoo.sea.pipeline import SeaPipeline as SeaPipeline
    from polyzoo.sea.splitting import split as split
    from polyzoo.sea.units import extract_units as extract_units

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "SeaConfig": ".config",
        "SeaModel": ".model",
        "SeaPipeline": ".pipeline",
        "SplitConfig": ".config",
        "extract_units": ".units",
        "split": ".splitting",
    },
)
