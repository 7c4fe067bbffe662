"""RegionSpot: names for any region of any image, with frozen towers and a small trained module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyzoo.core.lazy import attach

if TYPE_CHECKING:
    from polyzoo.regionspot.config import RegionSpotConfig as RegionSpotConfig
    from polyzoo.regionspot.config import SceneSpotConfig as SceneSpotConfig
    from polyzoo.regionspot.integration import Integration as Integration
    from polyzoo.regionspot.model import RegionSpot as RegionSpot
    from polyzoo.regionspot.pipeline import RegionSpotPipeline as RegionSpotPipeline
    from polyzoo.regionspot.results import RegionResult as RegionResult
    from polyzoo.regionspot.scene_model import SceneSpot as SceneSpot
    from polyzoo.regionspot.text import TextClassifier as TextClassifier

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Integration": ".integration",
        "RegionResult": ".results",
        "RegionSpot": ".model",
        "RegionSpotConfig": ".config",
        "RegionSpotPipeline": ".pipeline",
        "SceneSpot": ".scene_model",
        "SceneSpotConfig": ".config",
        "TextClassifier": ".text",
    },
)
