"""What one implementation of attention needs and offers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyzoo.attention.features import FEATURES
from polyzoo.attention.types import Call

_EXACT = frozenset(FEATURES) - {"int8", "fp8"}
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def _always() -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What one implementation needs and offers, as data."""

    name: str
    summary: str
    """One line for people."""
    forward: Callable[[Call], tuple[Tensor, Tensor | None]]
    """Serves a checked call. Autograd differentiates it, or it brings its own Function."""
    devices: frozenset[str] | None = None
    """Device types; None is any."""
    min_cc: tuple[int, int] | None = None
    """Lowest CUDA compute capability."""
    max_cc: tuple[int, int] | None = None
    """Highest CUDA compute capability."""
    auto_max_cc: tuple[int, int] | None = None
    """Highest capability on which `auto` takes it; on newer GPUs it serves by name."""
    dtypes: frozenset[torch.dtype] = _FLOATS
    head_dims: Callable[[int], bool] | None = None
    """Tells whether a head size (keys' or values') is served; None is any."""
    head_dims_text: str = "any"
    """The same in words."""
    features: frozenset[str] = _EXACT
    only_for: frozenset[str] = frozenset()
    """Features that a call must ask for: without them it is not served, even by name."""
    matrix_for: frozenset[str] = frozenset()
    """Features that make it allocate an n x m matrix per head; "always" is every call."""
    kept_back: Callable[[Any], str | None] | None = None
    """Says why `auto` passes it over for a `registry.Request`: another one is faster."""
    by_name_only: tuple[tuple[str, str], ...] = ()
    """Features with which `auto` passes it over although it serves them, and what it then says."""
    available: Callable[[], str | None] = _always
    """Returns why it cannot run here and the fix, or None. Imports nothing heavy until asked."""
