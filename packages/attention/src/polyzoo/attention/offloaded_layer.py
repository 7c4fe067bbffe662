"""One layer's keys and values: the newest in a device buffer, the older ones in host blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from polyzoo.attention.host_decode import KeyBlock
from polyzoo.attention.lanes import Lane, Mark


@dataclass(eq=False)
class HostBlock:
    """Some keys in host memory, filled from the front."""

    k: Tensor
    v: Tensor
    filled: int = 0

    @classmethod
    def like(cls, k: Tensor, v: Tensor, keys: int) -> HostBlock:
        """Reserve room for so many keys of the batch, heads and channels of `k` and `v`."""
        pinned = k.device.type == "cuda"

        def reserve(part: Tensor) -> Tensor:
            shape = (*part.shape[:2], keys, part.shape[3])
            return torch.empty(shape, dtype=part.dtype, pin_memory=pinned)

        return cls(reserve(k), reserve(v))

    def part(self) -> KeyBlock:
        """Return what is filled, as the CPU's kernel takes it."""
        return KeyBlock(self.k[:, :, : self.filled], self.v[:, :, : self.filled])


class OffloadedLayer:
    """Stores keys in order and moves the oldest out when the buffer is full."""

    def __init__(
        self, k: Tensor, v: Tensor, *, capacity: int, down: Lane, new_block: Callable[[], HostBlock]
    ) -> None:
        """Reserve the buffer.

        Args:
            k: Of the batch, heads, channels and device that keys will have.
            v: The same for values.
            capacity: Keys of the buffer.
            down: Where copies to the host are queued.
            new_block: Gives an empty block.
        """
        self.k = k.new_empty((*k.shape[:2], capacity, k.shape[3]))
        self.v = v.new_empty((*v.shape[:2], capacity, v.shape[3]))
        self.held = 0
        self.blocks: list[HostBlock] = []
        self.spilled: Mark | None = None
        self._down = down
        self._new_block = new_block

    @property
    def capacity(self) -> int:
        """Keys that the buffer holds."""
        return self.k.shape[2]

    @property
    def on_host(self) -> int:
        """Keys in the blocks."""
        return sum(block.filled for block in self.blocks)

    def near(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values in the buffer."""
        return self.k[:, :, : self.held], self.v[:, :, : self.held]

    def store(self, k: Tensor, v: Tensor, *, piece: int) -> None:
        """Add the newest keys, moving older ones out in pieces of at least so many."""
        count = k.shape[2]
        over = self.held + count - self.capacity
        if over > 0:
            self.spill(min(self.held, -(-over // piece) * piece))
        gone = max(0, count - self.capacity)
        if gone:
            self._to_host(k[:, :, :gone], v[:, :, :gone])
        end = self.held + count - gone
        self.k[:, :, self.held : end] = k[:, :, gone:]
        self.v[:, :, self.held : end] = v[:, :, gone:]
        self.held = end

    def spill(self, count: int) -> None:
        """Move the oldest keys of the buffer to the host and close the gap."""
        if count == 0:
            return
        self._to_host(self.k[:, :, :count], self.v[:, :, :count])
        for start in range(0, self.held - count, count):  # pieces that do not overlap
            end = min(start + count, self.held - count)
            for part in (self.k, self.v):
                part[:, :, start:end] = part[:, :, start + count : end + count]
        self.held -= count

    def _to_host(self, k: Tensor, v: Tensor) -> None:
        done = 0
        while done < k.shape[2]:
            if not self.blocks or self.blocks[-1].filled == self.blocks[-1].k.shape[2]:
                self.blocks.append(self._new_block())
            block = self.blocks[-1]
            count = min(k.shape[2] - done, block.k.shape[2] - block.filled)
            place = slice(block.filled, block.filled + count)
            for mine, given in ((block.k, k), (block.v, v)):
                self._down.copy_out(mine[:, :, place], given[:, :, done : done + count])
            block.filled += count
            done += count
        self.spilled = self._down.mark()
