"""Large buffers in host memory: exact sizes, huge pages, page-locked where a GPU copies."""

from __future__ import annotations

import mmap
from typing import Any

import torch
from torch import Tensor


class HostMemory:
    """Allocates flat tensors that live as long as the run.

    torch's pinned memory is rounded up to the next power of two, up to twice what is needed, and is
    kept after use. Huge pages spare the optimizer step, which walks through all of it, most misses
    of the address cache.

    Example:
        >>> memory = HostMemory()
        >>> buffer = memory.empty(1000, torch.bfloat16, pinned=True)
        >>> memory.close()
    """

    def __init__(self) -> None:
        self._registered: list[Tensor] = []

    def empty(self, numel: int, dtype: torch.dtype, *, pinned: bool) -> Tensor:
        """Return a flat tensor; new pages read as zeros.

        Raises:
            torch.OutOfMemoryError: The system does not let that much be locked.
        """
        if not numel:
            return torch.empty(0, dtype=dtype)
        size = numel * dtype.itemsize
        # A mapping of its own: whole pages, which no other allocation shares.
        pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        mapping = mmap.mmap(-1, pages, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(mapping, dtype=torch.uint8)
        if pinned and torch.cuda.is_available():
            self._lock(whole, pages)
        return whole[:size].view(dtype)

    def _lock(self, whole: Tensor, pages: int) -> None:
        try:
            runtime: Any = torch.cuda.cudart()
            torch.cuda.check_error(runtime.cudaHostRegister(whole.data_ptr(), pages, 0))
        except RuntimeError as error:
            raise torch.OutOfMemoryError(
                f"{pages:,} bytes of host memory could not be page-locked ({error}); "
                "see ulimit -l, or set tier.pin_memory to false"
            ) from error
        self._registered.append(whole)

    def close(self) -> None:
        """Unlock all buffers; they stay usable as ordinary memory."""
        runtime: Any = torch.cuda.cudart() if self._registered else None
        for whole in self._registered:
            runtime.cudaHostUnregister(whole.data_ptr())
        self._registered.clear()
