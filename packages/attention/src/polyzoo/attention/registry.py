"""Which backend serves a call: one literal table, one fixed order of checks, and the reasons."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from polyzoo.attention.backend import Backend
from polyzoo.attention.backend_table import AUTO_ORDER as AUTO_ORDER
from polyzoo.attention.backend_table import BACKENDS
from polyzoo.attention.features import BIT, FEATURES
from polyzoo.attention.limits import MATRIX_LIMIT
from polyzoo.attention.torch_build import build_problem
from polyzoo.attention.types import Call
from polyzoo.core.log import get_logger

logger = get_logger(__name__)

_OTHER_DEVICES = ("sdpa", "reference")

_BY_NAME = {backend.name: backend for backend in BACKENDS}
_override: ContextVar[str | None] = ContextVar("polyzoo_attention_backend", default=None)
_VARIABLE = "POLYZOO_ATTENTION"


class Request(NamedTuple):
    """What of a call decides who can serve it."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    features: int
    """Bits of FEATURES."""
    scores: int
    """Elements of the largest score matrix, or 0 where it is small enough for every backend."""
    long_square: bool = False
    """As many keys as queries, and no few: see `features.long_square`."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability to suppose; that of the device here if left out."""


@dataclass(frozen=True)
class Choice:
    """Who serves a call, and why the others do not."""

    backend: Backend | None
    """None: nobody does."""
    reasons: tuple[str, ...]
    """One line per refused backend."""
    tile_plan: None = None
    """Tile sizes, for backends that have them."""

    def __str__(self) -> str:
        if self.backend is None:
            head = "no backend serves this call"
        else:
            head = f"{self.backend.name}: {self.backend.summary}"
        return "\n".join([head, *(f"  not {reason}" for reason in self.reasons)])


def backends() -> tuple[Backend, ...]:
    """Return every backend, in table order."""
    return BACKENDS


def forwards() -> dict[str, Callable[[Call], tuple[Tensor, Tensor | None]]]:
    """Return every backend's function by name."""
    return {backend.name: backend.forward for backend in BACKENDS}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every call in the block, of this thread or task, with one backend.

    An argument `backend=` still wins; the environment variable POLYZOO_ATTENTION loses.

    Args:
        name: A backend, or "auto".

    Raises:
        ValueError: There is no such backend.

    Example:
        >>> with use_backend("reference"):
        ...     out = attention(q, k, v)
    """
    _check_name(name, "use_backend(name)")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def requested(backend: str) -> str:
    """Resolve the argument, the context and the environment, in this order."""
    if backend != "auto":
        _check_name(backend, "backend")
        return backend
    name = _override.get()
    if name is None:
        name = os.environ.get(_VARIABLE) or "auto"
        if name != "auto":
            _check_name(name, f"the environment variable {_VARIABLE}")
    return name


def choose(request: Request, backend: str = "auto") -> Choice:
    """Pick the backend for a request.

    Args:
        request: What the call needs.
        backend: "auto", or a name: a named backend never falls back.

    Raises:
        ValueError: No backend, or not the named one, can serve it; the message holds the reasons.
    """
    choice = decide(request, backend)
    if choice.backend is None:
        lines = "; ".join(choice.reasons)
        if backend == "auto":
            raise ValueError(f"no backend serves this call: {lines}")
        raise ValueError(
            f'backend="{backend}" cannot serve this call: {lines}; '
            'backend="auto" picks one that can, if there is any'
        )
    return choice


@lru_cache(maxsize=4096)
def decide(request: Request, backend: str) -> Choice:
    """Do as `choose`, and return the choice where nobody serves the request too."""
    order = AUTO_ORDER.get(request.device.type, _OTHER_DEVICES)
    names = order if backend == "auto" else (backend,)
    return pick([_BY_NAME[name] for name in names], request, by_name=backend != "auto")


def pick(candidates: Sequence[Backend], request: Request, *, by_name: bool = False) -> Choice:
    """Take the first candidate that can serve a request; falling back is logged once per reason.

    Args:
        candidates: In order of preference.
        request: What the call needs.
        by_name: The caller named the candidates: what `auto` would pass over is taken too.
    """
    chosen: Backend | None = None
    reasons: list[str] = []
    refused: list[str] = []
    for candidate in candidates:
        reason = refusal(candidate, request)
        kept_back = None if by_name else _kept_back(candidate, request)
        if reason is not None:
            reasons.append(reason)
            refused.append(reason)
        elif kept_back is not None:
            reasons.append(kept_back)  # our own preference: nothing to warn of
        elif chosen is None:
            chosen = candidate
            for line in refused:
                _log_once(f"attention falls back to {candidate.name}; {line}")
        else:
            reasons.append(f"{candidate.name}: {chosen.name} comes first")
    return Choice(backend=chosen, reasons=tuple(reasons))


def refusal(backend: Backend, request: Request) -> str | None:
    """Say in one line why a backend cannot serve a request, or return None."""
    device = request.device
    problem = backend.available()
    if problem is None and backend.devices is not None and device.type not in backend.devices:
        problem = f"runs on {', '.join(sorted(backend.devices))}, this is {device}"
    if problem is None and device.type == "cuda":
        problem = _capability_problem(backend, request)
    if problem is None and request.dtype not in backend.dtypes:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in backend.dtypes))
        problem = f"computes {names}, not {str(request.dtype).removeprefix('torch.')}"
        if request.dtype == torch.bfloat16 and torch.float16 in backend.dtypes:
            problem += ": use torch.float16"
    if problem is None and backend.head_dims is not None:
        for size in (request.head_dim, request.value_dim):
            if not backend.head_dims(size):
                problem = f"head size {size} is not served (allowed: {backend.head_dims_text})"
                break
    if problem is None:
        asked = {name for name in FEATURES if request.features & BIT[name]}
        missing = [name for name in FEATURES if name in asked - backend.features]
        if not backend.only_for <= asked:
            wanted = ", ".join(f'precision="{name}"' for name in sorted(backend.only_for))
            problem = f"serves only calls with {wanted}"
        elif missing:
            problem = f"has no {', '.join(missing)}{_advice(missing)}"
        elif request.scores and backend.matrix_for & (asked | {"always"}):
            problem = _matrix_problem(backend, request, asked)
    return None if problem is None else f"{backend.name}: {problem}"


def _kept_back(backend: Backend, request: Request) -> str | None:
    for feature, why in backend.by_name_only:
        if request.features & BIT[feature]:
            return f"{backend.name}: by name only for {why}"
    slower = None if backend.kept_back is None else backend.kept_back(request)
    if slower is not None:
        return f"{backend.name}: {slower}"
    newest = backend.auto_max_cc
    if newest is not None and (have := _capability(request)) is not None and have > newest:
        return f"{backend.name}: by name only above sm_{newest[0]}{newest[1]}"
    return None


def _capability(request: Request) -> tuple[int, int] | None:
    """What the GPU of a request is, supposed or real."""
    if request.capability is not None or request.device.type != "cuda":
        return request.capability
    return torch.cuda.get_device_capability(request.device) if torch.cuda.is_available() else None


def _capability_problem(backend: Backend, request: Request) -> str | None:
    low, high = backend.min_cc, backend.max_cc
    have = request.capability
    if have is not None:
        this = f"this is sm_{have[0]}{have[1]}"
    elif torch.cuda.is_available():
        have = torch.cuda.get_device_capability(request.device)
        this = f"this is {torch.cuda.get_device_name(request.device)} (sm_{have[0]}{have[1]})"
    elif low or high:
        need = "from sm_{}{} on".format(*low) if low else "up to sm_{}{}".format(*high or "")
        return f"needs a GPU {need}, and there is none here to ask"
    else:
        return None
    if low is not None and have < low:
        return f"needs sm_{low[0]}{low[1]}, {this}"
    if high is not None and have > high:
        return f"ends at sm_{high[0]}{high[1]}, {this}"
    return build_problem(have, torch.cuda.get_arch_list())


def _advice(missing: list[str]) -> str:
    return ' (use precision="exact")' if {"int8", "fp8"} & set(missing) else ""


def _matrix_problem(backend: Backend, request: Request, asked: set[str]) -> str | None:
    size = request.scores * (8 if request.dtype == torch.float64 else 4)
    if "always" in backend.matrix_for:
        what = "its score matrix"
        instead = "smaller batches, or a backend that tiles"
    elif "relpos" in backend.matrix_for & asked:
        what = "bias=DecomposedBias(...) as a dense n x m bias"
        instead = "smaller batches, or smaller windows of the grid"
    else:
        what = f"{' and '.join(sorted(backend.matrix_for & asked))} as a dense n x m matrix"
        instead = "cu_seqlens with causal or window in place of masks, or smaller batches"
    if size <= MATRIX_LIMIT:
        return None
    return f"{what} would take {size:,} bytes (limit {MATRIX_LIMIT:,}); use {instead}"


def _check_name(name: str, where: str) -> None:
    if name != "auto" and name not in _BY_NAME:
        raise ValueError(
            f"{where} is {name!r}; backends are auto, {', '.join(sorted(_BY_NAME))} "
            "(`polyzoo.attention.registry` lists them)"
        )


@lru_cache(maxsize=1024)
def _log_once(line: str) -> None:
    logger.warning(line)
