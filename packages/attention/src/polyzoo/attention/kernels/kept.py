"""Values derived from a tensor, kept until it changes: layers share masks and lengths."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TypeVar, cast

from torch import Tensor

from polyzoo.attention.kernels.graph_memory import borrowed_memory

_Built = TypeVar("_Built")


class _Cache:
    """Derived values per tensor, dropped with the tensor or when it changes in place."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], int, dict[object, object]]] = {}

    def values(self, tensor: Tensor) -> dict[object, object]:
        """What is kept for a tensor as it is now."""
        number = id(tensor)
        entry = self._entries.get(number)
        if entry is not None and entry[0]() is tensor and entry[1] == tensor._version:
            return entry[2]
        values: dict[object, object] = {}
        reference = weakref.ref(tensor, lambda _: self._entries.pop(number, None))
        self._entries[number] = (reference, tensor._version, values)
        return values


_CACHE = _Cache()


def kept(tensor: Tensor, key: object, build: Callable[[], _Built]) -> _Built:
    """Build once per tensor; again for tensors whose changes cannot be seen.

    Inference tensors have no version counter, and a graph being captured must hold the building
    itself, since a replay may see other contents.
    """
    if borrowed_memory(tensor.device) or tensor.is_inference():
        return build()
    # Views are made anew by every call; they share their base's version counter.
    root = tensor if tensor._base is None else tensor._base
    values = _CACHE.values(root)
    place = (key, tensor.storage_offset(), tensor.shape, tensor.stride())
    if place not in values:
        values[place] = build()
    return cast(_Built, values[place])
