"""SEA: natural-language search over long code by splitting, encoding and aggregating."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyzoo.core.lazy import attach

if TYPE_CHECKING:
    from polyzoo.sea.config import SeaConfig as SeaConfig
    from polyzoo.sea.config import SplitConfig as SplitConfig
    from polyzoo.sea.model import SeaModel as SeaModel
    from polyzoo.sea.pipeline import SeaPipeline as SeaPipeline
    from polyzoo.sea.search.config import IndexConfig as IndexConfig
    from polyzoo.sea.search.config import SearchRequest as SearchRequest
    from polyzoo.sea.search.searcher import Searcher as Searcher
    from polyzoo.sea.search.units import extract_units as extract_units
    from polyzoo.sea.search.update import build_index as build_index
    from polyzoo.sea.splitting import split as split

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "IndexConfig": ".search.config",
        "SeaConfig": ".config",
        "SeaModel": ".model",
        "SeaPipeline": ".pipeline",
        "SearchRequest": ".search.config",
        "Searcher": ".search.searcher",
        "SplitConfig": ".config",
        "build_index": ".search.update",
        "extract_units": ".search.units",
        "split": ".splitting",
    },
)
