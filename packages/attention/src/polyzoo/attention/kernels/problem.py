"""One attention call as the kernels see it: tensors, rules and what follows from their shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from polyzoo.attention.kernels.tiles import head_blocks

UNBOUNDED = 1 << 30
"""Windows are cut to this, so that position arithmetic cannot overflow 32 bits."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """Checked inputs of one call; nothing here is validated again.

    `causal` is `right = 0`; `left` and `right` are -1 where unbounded. `mask` (bool) and `bias`
    have four axes, each of full size or 1. Packed calls have `cu_q` and `cu_k` and a batch of one.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    left: int = -1
    right: int = -1
    kv_lens: Tensor | None = None
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None
    max_q: int = 0
    max_k: int = 0
    mask: Tensor | None = None
    bias: Tensor | None = None
    rel_h: Tensor | None = None
    rel_w: Tensor | None = None
    dropout: float = 0.0
    rng: Tensor | None = None

    @property
    def batch(self) -> int:
        """Batch items; 1 when packed."""
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.q.shape[1]

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // max(self.k.shape[1], 1)

    @property
    def queries(self) -> int:
        """Length of the query axis; all sequences together when packed."""
        return self.q.shape[2]

    @property
    def keys(self) -> int:
        """Length of the key axis."""
        return self.k.shape[2]

    @property
    def packed(self) -> bool:
        """Whether several sequences lie behind each other in one batch item."""
        return self.cu_q is not None

    @property
    def longest(self) -> tuple[int, int]:
        """Queries and keys of the longest sequence."""
        return (self.max_q, self.max_k) if self.packed else (self.queries, self.keys)

    @property
    def width(self) -> int:
        """Columns of the key grid of a relative position, or 0."""
        return 0 if self.rel_w is None else self.rel_w.shape[-1]

    @cached_property
    def signature(self) -> tuple[object, ...]:
        """Everything but the contents of the tensors: calls with equal ones start alike."""
        return (
            self.q.device,
            *(
                None if t is None else (t.dtype, t.shape, t.stride())
                for t in (
                    self.q,
                    self.k,
                    self.v,
                    self.kv_lens,
                    self.cu_q,
                    self.cu_k,
                    self.mask,
                    self.bias,
                    self.rel_h,
                    self.rel_w,
                )
            ),
            self.scale,
            self.left,
            self.right,
            self.max_q,
            self.max_k,
            self.dropout,
            self.exact_products,
        )

    @property
    def exact_products(self) -> bool:
        """Whether fp32 products keep all bits; TF32 only if torch was told to use it."""
        return self.q.dtype != torch.float32 or not torch.backends.cuda.matmul.allow_tf32

    @cached_property
    def constants(self) -> dict[str, Any]:
        """Compile-time constants that every kernel takes."""
        d, dv = self.q.shape[-1], self.v.shape[-1]
        d0, d1 = head_blocks(d)
        dv0, dv1 = head_blocks(dv)
        width = self.width
        return {
            "GROUP": self.group,
            "D": d,
            "D0": d0,
            "D1": d1,
            "DV": dv,
            "DV0": dv0,
            "DV1": dv1,
            "HAS_LEFT": self.left >= 0,
            "HAS_RIGHT": self.right >= 0,
            "KVLENS": self.kv_lens is not None,
            "PACKED": self.packed,
            "HAS_MASK": self.mask is not None,
            "HAS_BIAS": self.bias is not None,
            "NATURAL": self.natural,
            "KW": width,
            "KWP": self.key_block,
            "DROPOUT": self.dropout > 0.0,
            "PRECISION": "ieee" if self.exact_products else "tf32",
        }

    @property
    def raw(self) -> bool:
        """Whether the scale can be folded into the exponent: the maximum commutes with it."""
        return self.scale > 0 and self.bias is None and self.rel_w is None

    @property
    def edges(self) -> bool:
        """Whether some tile may need mask code whatever the tile size."""
        return (
            self.left >= 0
            or self.right >= 0
            or self.kv_lens is not None
            or self.packed
            or self.mask is not None
        )

    @property
    def key_block(self) -> int:
        """Least number of keys per tile: a whole padded grid row under a relative position."""
        return 1 << (self.width - 1).bit_length() if self.width else 1

    @property
    def grid_rows(self) -> int:
        """Rows of the key grid of a relative position, or 0."""
        return 0 if self.rel_h is None else self.rel_h.shape[-1]

    @property
    def natural(self) -> bool:
        """Whether scores are in natural instead of log2 units inside the kernels.

        A bias of finfo.min times log2(e) would overflow, and in fp32 the extra rounding shows.
        """
        has_terms = self.bias is not None or self.rel_w is not None
        return self.bias is not None or (has_terms and self.q.dtype == torch.float32)

    @property
    def kernel_scale(self) -> float:
        """The scale in the units of the kernel."""
        return self.scale if self.natural else self.scale * math.log2(math.e)

    @property
    def aligned(self) -> Problem:
        """The same call with rows that can be read 16 bytes at a time, copied where they cannot.

        Triton reads other rows element by element and, up to 3.6 at least, such loads race with the
        asynchronous matrix products that consume them on sm_90.
        """
        # Kept only where it is another one: a problem that held itself would keep its tensors in
        # memory until Python next collects cycles.
        return self if all(reads_whole(t) for t in (self.q, self.k, self.v)) else self._copied

    @cached_property
    def _copied(self) -> Problem:
        q, k, v = (
            t if reads_whole(t) else heads_last(t, t.shape[-1]).copy_(t)
            for t in (self.q, self.k, self.v)
        )
        return replace(self, q=q, k=k, v=v)

    @property
    def threshold(self) -> int:
        """ceil(dropout * 2**32) as the bit pattern of an int32."""
        whole = min(math.ceil(self.dropout * 2.0**32), 2**32 - 1)
        return whole - 2**32 if whole >= 2**31 else whole

    @property
    def window(self) -> tuple[int, int]:
        """`left` and `right` in a range whose sums fit 32 bits."""
        return min(self.left, UNBOUNDED), min(self.right, UNBOUNDED)


def strides(tensor: Tensor | None, axes: int) -> list[int]:
    """First `axes` strides of a tensor, 0 for axes of size 1 and for a missing tensor."""
    if tensor is None:
        return [0] * axes
    pairs = zip(tensor.shape[:axes], tensor.stride()[:axes], strict=True)
    return [0 if size == 1 else stride for size, stride in pairs]


def reads_whole(tensor: Tensor) -> bool:
    """Whether the rows of a `(b, h, n, d)` tensor are dense and start at multiples of 16 bytes."""
    return (
        tensor.data_ptr() % 16 == 0
        and tensor.stride(-1) == 1
        and all(stride % 8 == 0 for stride in strides(tensor, 3))
    )


def alignment(groups: list[list[int]]) -> int:
    """8 if every stride is a multiple of 8 elements, so that rows are read 16 bytes at a time."""
    return 8 if all(stride % 8 == 0 for group in groups for stride in group) else 1


def heads_last(like: Tensor, dv: int) -> Tensor:
    """An empty `(b, h, n, dv)` tensor laid out `(b, n, h, dv)`: merging the heads costs no copy."""
    b, h, n, _ = like.shape
    return like.new_empty((b, n, h, dv)).transpose(1, 2)
