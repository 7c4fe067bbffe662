"""Padding masks read as lengths, which kernels serve without looking at a mask."""

from __future__ import annotations

import torch
from torch import Tensor

_HIDDEN = -9e3
"""From here down a key is hidden: -10000 is customary, and bf16 rounds it to -9984."""
_KEPT_AS = "_polyzoo_kv_lens"


def kv_lens_of(mask: Tensor) -> Tensor | None:
    """Read the lengths off a mask over keys, or return None where it has none.

    The values are looked at once per tensor (on a GPU that waits for it once), and not at all
    under torch.compile or while a CUDA graph is captured. A row of an additive mask without any
    visible key has no length: the softmax over equal biases sees all its keys.

    Args:
        mask: `(b, m)`: bool, True attends; or added to the scores.

    Returns:
        int32 `(b,)` where every row is visible keys followed by hidden ones (added: zeros, at
        least one, followed by -10000 or less).
    """
    if torch.compiler.is_compiling() or mask.requires_grad:
        return None
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    version = 0 if mask.is_inference() else mask._version
    kept = getattr(mask, _KEPT_AS, None)
    if kept is not None and kept[1] == version:
        return kept[0]
    additive = mask.dtype != torch.bool
    visible = mask == 0 if additive else mask
    lengths = visible.sum(dim=-1, dtype=torch.int32)
    positions = torch.arange(mask.shape[-1], device=mask.device)
    padded = visible == (positions < lengths[:, None])
    if additive:
        padded = padded & (visible | (mask <= _HIDDEN)) & (lengths > 0)[:, None]
    found = lengths if bool(padded.all()) else None
    setattr(mask, _KEPT_AS, (found, version))
    return found
