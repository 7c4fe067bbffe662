"""Page-locked host memory of exactly the size asked for."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor


class PinnedMemory:
    """Allocates host buffers that the GPU copies from and to directly.

    torch's pinned memory is rounded up to the next power of two, up to twice what is needed, and is
    kept after use. Without a GPU the buffers are ordinary ones.

    Example:
        >>> pinned = PinnedMemory()
        >>> buffer = pinned.empty(1000, torch.bfloat16)
        >>> pinned.close()
    """

    def __init__(self) -> None:
        self._registered: list[Tensor] = []

    @property
    def is_useful(self) -> bool:
        """Whether there is a GPU to copy for."""
        return torch.cuda.is_available()

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return a flat buffer with any content."""
        if not self.is_useful or not numel:
            return torch.empty(numel, dtype=dtype)
        size = numel * dtype.itemsize
        # A mapping of its own: whole pages, which no other allocation shares.
        pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        whole = torch.frombuffer(mmap.mmap(-1, pages), dtype=torch.uint8)
        status = torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), pages, 0)
        if int(status) != 0:
            raise torch.OutOfMemoryError(
                f"{size:,} bytes of host memory could not be page-locked (CUDA error "
                f"{int(status)}); see ulimit -l, or set tier.pin_memory to false"
            )
        self._registered.append(whole)
        return whole[:size].view(dtype)

    def close(self) -> None:
        """Unlock all buffers; they stay usable as ordinary memory."""
        for whole in self._registered:
            torch.cuda.cudart().cudaHostUnregister(whole.data_ptr())
        self._registered.clear()
