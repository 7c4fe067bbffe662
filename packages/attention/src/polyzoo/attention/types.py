"""What describes a call besides its tensors: packed lengths and separable biases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """Neighbouring packed sequences of the same lengths: one batched call serves them as views."""

    first: int
    """Number of the first sequence."""
    sequences: int
    """How many sequences."""
    q_length: int
    """Queries of each."""
    k_length: int
    """Keys of each."""


@dataclass(frozen=True, eq=False)
class CuSeqlens:
    """Where the sequences of a packed batch begin and end.

    Sequence i attends from `q[cu_q[i]:cu_q[i + 1]]` to `k[cu_k[i]:cu_k[i + 1]]`; either may be
    empty. Keep one object for all layers of a forward pass: what depends on the lengths is worked
    out once. Sequences sorted by length are served fastest on a CPU.

    Example:
        >>> lengths = CuSeqlens.from_lengths([3, 5])
        >>> lengths.q.tolist(), lengths.max_q
        ([0, 3, 8], 5)
    """

    q: Tensor
    """int32 `(sequences + 1,)`: starts of the queries, and their total."""
    k: Tensor
    """The same for the keys."""
    max_q: int
    """Longest query sequence; kernels allocate by it."""
    max_k: int
    """Longest key sequence."""
    _kept: dict[str, object] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_lengths(
        cls,
        lengths_q: Sequence[int] | Tensor,
        lengths_k: Sequence[int] | Tensor | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> CuSeqlens:
        """Build it from the length of each sequence.

        Args:
            lengths_q: Queries per sequence. A tensor on a GPU costs one synchronisation, here only.
            lengths_k: Keys per sequence; the same as the queries if left out.
            device: Where the tensors go; the device of `lengths_q`, or the CPU.

        Raises:
            ValueError: A negative length, or as many query as key lengths are not given.
        """
        if device is None:
            device = lengths_q.device if isinstance(lengths_q, Tensor) else "cpu"
        queries = _as_list(lengths_q, "lengths_q")
        keys = queries if lengths_k is None else _as_list(lengths_k, "lengths_k")
        if len(queries) != len(keys):
            raise ValueError(
                f"lengths_q has {len(queries)} sequences and lengths_k has {len(keys)}; "
                "give one length of each per sequence (0 for an empty one)"
            )
        ends_q, ends_k = ([0, *accumulate(lengths)] for lengths in (queries, keys))
        cu_q = torch.tensor(ends_q, dtype=torch.int32, device=device)
        same = lengths_k is None
        cu_k = cu_q if same else torch.tensor(ends_k, dtype=torch.int32, device=device)
        made = cls(q=cu_q, k=cu_k, max_q=max(queries, default=0), max_k=max(keys, default=0))
        made._kept["starts"] = (ends_q, ends_k)
        return made

    @property
    def sequences(self) -> int:
        """How many sequences are packed."""
        return self.q.shape[0] - 1

    def starts(self) -> tuple[list[int], list[int]]:
        """Return both tables as lists; from GPU tensors this waits for the GPU the first time."""
        kept = self._kept.get("starts")
        if kept is None:
            queries = self.q.tolist()
            kept = self._kept["starts"] = (
                queries,
                queries if self.k is self.q else self.k.tolist(),
            )
        return kept  # pyright: ignore[reportReturnType]

    def runs(self) -> list[Run]:
        """Group neighbouring sequences of equal lengths; worked out once."""
        kept = self._kept.get("runs")
        if kept is None:
            kept = self._kept["runs"] = _find_runs(*self.starts())
        return kept  # pyright: ignore[reportReturnType]

    def is_checked(self) -> bool:
        """Tell whether the values were found in order."""
        return "checked" in self._kept

    def mark_checked(self) -> None:
        """Remember that the values are in order: the tensors must not be changed afterwards."""
        self._kept["checked"] = True


@dataclass(frozen=True, eq=False)
class DecomposedBias:
    """A bias over a grid of keys that is a row part plus a column part.

    Key j of a `kh x kw` grid gets `rel_h[..., j // kw] + rel_w[..., j % kw]`: the relative
    positions of SAM's image encoder, without an n x m matrix where a kernel supports it.
    """

    rel_h: Tensor
    """`(b, h, n, kh)`."""
    rel_w: Tensor
    """`(b, h, n, kw)`."""

    def dense(self) -> Tensor:
        """Return the `(b, h, n, kh * kw)` bias, in fp32 at least; differentiable."""
        work = torch.promote_types(self.rel_h.dtype, torch.float32)
        rows, columns = self.rel_h.to(work), self.rel_w.to(work)
        return (rows.unsqueeze(-1) + columns.unsqueeze(-2)).flatten(-2)


class Call(NamedTuple):
    """A checked call, as backends get it."""

    q: Tensor
    k: Tensor
    v: Tensor
    left: int
    """Keys a query sees before its own position; -1 is all."""
    right: int
    """Keys it sees after; -1 is all. `causal` is 0."""
    kv_lens: Tensor | None
    cu_seqlens: CuSeqlens | None
    mask: Tensor | None
    """bool, 4-d, broadcastable to `(b, h, n, m)`."""
    bias: Tensor | DecomposedBias | None
    """floating, 4-d, broadcastable to `(b, h, n, m)`."""
    scale: float
    dropout: float
    rng: Tensor | None
    """int64 `(2,)` seed and offset, where dropout is not 0."""
    want_lse: bool
    deterministic: bool


def _as_list(lengths: Sequence[int] | Tensor, name: str) -> list[int]:
    if isinstance(lengths, Tensor):
        if lengths.dim() != 1 or lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise ValueError(
                f"{name} is a {lengths.dtype} tensor of shape {tuple(lengths.shape)}; "
                "give one whole number per sequence"
            )
        values: list[int] = lengths.tolist()
    else:
        values = [int(length) for length in lengths]
    for index, length in enumerate(values):
        if length < 0:
            raise ValueError(f"{name}[{index}] is {length}; a length is 0 or more")
    return values


def _find_runs(starts_q: list[int], starts_k: list[int]) -> list[Run]:
    runs: list[Run] = []
    for index, ((q0, q1), (k0, k1)) in enumerate(
        zip(pairwise(starts_q), pairwise(starts_k), strict=True)
    ):
        last = runs[-1] if runs else None
        if last is not None and (last.q_length, last.k_length) == (q1 - q0, k1 - k0):
            runs[-1] = last._replace(sequences=last.sequences + 1)
        else:
            runs.append(Run(first=index, sequences=1, q_length=q1 - q0, k_length=k1 - k0))
    return runs
