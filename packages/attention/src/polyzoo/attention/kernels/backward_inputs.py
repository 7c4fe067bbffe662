"""What the backward kernels have in common: how they are prepared, and their first arguments."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from polyzoo.attention.kernels.launch import as_bytes
from polyzoo.attention.kernels.problem import Problem, alignment, strides
from polyzoo.attention.kernels.starts import Start


@dataclass(frozen=True, eq=False)
class Plan:
    """A prepared kernel and its tile sizes."""

    start: Start
    block_m: int
    block_n: int
    parts: int = 1


def row_strides(problem: Problem, dout: Tensor) -> tuple[list[int], int]:
    """Strides of q, k, v and dout in units of the alignment, and the alignment."""
    main = [strides(t, 3) for t in (problem.q, problem.k, problem.v, dout)]
    align = alignment(main)
    return [stride // align for group in main for stride in group], align


def tensors(
    problem: Problem, statistics: tuple[Tensor, ...], made: tuple[object, ...]
) -> list[object]:
    """Inputs, statistics of the rows, results, and terms of the scores, in the kernels' order."""
    return [
        problem.q,
        problem.k,
        problem.v,
        *statistics,
        *made,
        problem.bias,
        as_bytes(problem.mask),
        problem.rel_h,
        problem.rel_w,
    ]
