"""Places on the device through which host blocks stream, loaded ahead of their use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from torch import Tensor

from polyzoo.attention.lanes import Lane, Mark
from polyzoo.attention.offloaded_layer import HostBlock, OffloadedLayer

Wanted = Sequence[tuple[OffloadedLayer, int]]
"""Blocks in the order of use: the layer, and the number of the block."""


class Slot:
    """One place."""

    def __init__(self, k: Tensor, v: Tensor, keys: int) -> None:
        """Reserve room for so many keys like these."""
        self.k = k.new_empty((*k.shape[:2], keys, k.shape[3]))
        self.v = v.new_empty((*v.shape[:2], keys, v.shape[3]))
        self.filled: Mark | None = None
        self.used: Mark | None = None


class Staging:
    """Loads blocks while those before are used."""

    def __init__(self, k: Tensor, v: Tensor, *, slots: int, keys: int) -> None:
        """Reserve the places.

        Args:
            k: Of the batch, heads, channels and device that keys will have.
            v: The same for values.
            slots: How many places.
            keys: Of a block.
        """
        self._slots = [Slot(k, v, keys) for _ in range(slots)]
        self._turn = 0
        self._ahead: deque[tuple[HostBlock, int, Slot]] = deque()
        self._up = Lane(k.device)
        for slot in self._slots:
            self._up.uses(slot.k, slot.v)

    def fetch(self, wanted: Wanted, index: int) -> tuple[Tensor, Tensor, Slot]:
        """Return the keys and values of a wanted block, which the current stream may use.

        Those after it are loaded as far as there is room. Call `release` behind the last use.
        """
        layer, number = wanted[index]
        block = layer.blocks[number]
        if not self._ahead or self._ahead[0][:2] != (block, block.filled):
            self._ahead.clear()  # loaded for another order of calls, or before more keys came
        self.load_ahead(wanted, index)
        slot = self._ahead.popleft()[2]
        if slot.filled is not None:
            slot.filled.wait()
        return slot.k[:, :, : block.filled], slot.v[:, :, : block.filled], slot

    def release(self, slot: Slot) -> None:
        """Say that what is queued in the current stream is the last use of a place."""
        slot.used = self._up.mark_current()

    def load_ahead(self, wanted: Wanted, first: int) -> None:
        """Load wanted blocks from the first on, as far as there is room."""
        for layer, number in wanted[first + len(self._ahead) :]:
            if len(self._ahead) == len(self._slots):
                return
            block, slot = layer.blocks[number], self._slots[self._turn]
            self._turn = (self._turn + 1) % len(self._slots)
            self._fill(slot, block, layer.spilled)
            self._ahead.append((block, block.filled, slot))

    def bring(self, blocks: Sequence[HostBlock]) -> Callable[[], float]:
        """Load blocks over one another; returns what waits for them and tells the seconds."""
        self._ahead.clear()

        def copy() -> None:
            for index, block in enumerate(blocks):
                self._fill(self._slots[index % len(self._slots)], block, None)

        return self._up.timed(copy)

    def _fill(self, slot: Slot, block: HostBlock, spilled: Mark | None) -> None:
        with self._up.after(slot.used, spilled):
            slot.k.copy_(block.k, non_blocking=True)
            slot.v.copy_(block.v, non_blocking=True)
        slot.filled = self._up.mark()
