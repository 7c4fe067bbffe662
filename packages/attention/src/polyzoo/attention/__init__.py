"""One attention for every model: describe the mask, and the best backend serves the call.

Importing this package does not load torch; naming one of its functions does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyzoo.core.lazy import attach

if TYPE_CHECKING:
    from polyzoo.attention.api import attention as attention
    from polyzoo.attention.backend import Backend as Backend
    from polyzoo.attention.cooperative import CooperativeCache as CooperativeCache
    from polyzoo.attention.explaining import explain as explain
    from polyzoo.attention.merge import merge_states as merge_states
    from polyzoo.attention.registry import Choice as Choice
    from polyzoo.attention.registry import Request as Request
    from polyzoo.attention.registry import backends as backends
    from polyzoo.attention.registry import choose as choose
    from polyzoo.attention.registry import use_backend as use_backend
    from polyzoo.attention.tiling_allreduce import (
        attention_linear_allreduce as attention_linear_allreduce,
    )
    from polyzoo.attention.tiling_allreduce import overlap_group as overlap_group
    from polyzoo.attention.types import CuSeqlens as CuSeqlens
    from polyzoo.attention.types import DecomposedBias as DecomposedBias

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Backend": ".backend",
        "Choice": ".registry",
        "CooperativeCache": ".cooperative",
        "CuSeqlens": ".types",
        "DecomposedBias": ".types",
        "Request": ".registry",
        "attention": ".api",
        "attention_linear_allreduce": ".tiling_allreduce",
        "backends": ".registry",
        "choose": ".registry",
        "explain": ".explaining",
        "merge_states": ".merge",
        "overlap_group": ".tiling_allreduce",
        "use_backend": ".registry",
    },
)
