"""Prepared kernel starts: what does not change between equal calls is worked out once.

A start through Triton's own front costs about 60 us of Python for kernels with as many arguments
as these; a prepared one hands the pointers to the compiled kernel directly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

_Plan = TypeVar("_Plan")
_LIMIT = 4096
_PLANS: dict[tuple[object, ...], Any] = {}


@dataclass(eq=False)
class Start:
    """A kernel with its grid, its scalars and its compile-time constants, waiting for pointers."""

    kernel: Any
    grid: tuple[int, ...]
    scalars: tuple[object, ...]
    """Run-time numbers, in the kernel's order after the tensors."""
    constants: dict[str, object]
    options: dict[str, object]
    """Warps and stages."""
    _compiled: Any = field(default=None, init=False)
    _values: tuple[object, ...] = field(default=(), init=False)

    def __call__(self, *tensors: object) -> None:
        """Start the kernel on the current device and stream.

        Args:
            tensors: Its first arguments: tensors, descriptors and None.
        """
        aligned = all(not isinstance(t, Tensor) or t.data_ptr() % 16 == 0 for t in tensors)
        if aligned and self._compiled is not None:
            self._compiled[self.grid](*tensors, *self.scalars, *self._values)
            return
        made = self.kernel[self.grid](*tensors, *self.scalars, **self.constants, **self.options)
        # Interpreted kernels return nothing; unaligned pointers compile to other code.
        if aligned and hasattr(made, "packed_metadata"):
            names = self.kernel.arg_names[len(tensors) + len(self.scalars) :]
            self._values = tuple(self.constants[name] for name in names)
            self._compiled = made


def prepared(key: tuple[object, ...], build: Callable[[], _Plan]) -> _Plan:
    """Return what `build` made for an equal key before, or build it."""
    plan = _PLANS.get(key)
    if plan is None:
        if len(_PLANS) >= _LIMIT:
            _PLANS.clear()
        plan = _PLANS[key] = build()
    return plan
