"""SEED: an image as 32 discrete codes that a language model reads and writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyzoo.core.lazy import attach

if TYPE_CHECKING:
    from polyzoo.seed.codebook import CodebookHealth as CodebookHealth
    from polyzoo.seed.config import SeedConfig as SeedConfig
    from polyzoo.seed.constraint import WellFormedImages as WellFormedImages
    from polyzoo.seed.model import SeedModel as SeedModel
    from polyzoo.seed.pipeline import SeedPipeline as SeedPipeline
    from polyzoo.seed.processor import SeedProcessor as SeedProcessor
    from polyzoo.seed.vocabulary import ImageVocabulary as ImageVocabulary

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "CodebookHealth": ".codebook",
        "ImageVocabulary": ".vocabulary",
        "SeedConfig": ".config",
        "SeedModel": ".model",
        "SeedPipeline": ".pipeline",
        "SeedProcessor": ".processor",
        "WellFormedImages": ".constraint",
    },
)
