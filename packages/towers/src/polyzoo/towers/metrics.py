"""How far two sets of pictures are apart, as features tell it."""

from __future__ import annotations

import torch
from torch import Tensor


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """Estimate the squared maximum mean discrepancy of two sets of features, without bias.

    Binkowski et al., "Demystifying MMD GANs", 2018, with the polynomial kernel
    `(x.y / d + 1)^3`. It is 0 in expectation for two samples of one distribution, and may then be
    slightly negative; state the sizes of the sets beside it.

    Args:
        first: `(n, d)`, at least two rows; for DINOv2 class tokens of 98 x 98 pixels.
        second: `(m, d)`, at least two rows.

    Raises:
        ValueError: The sets do not fit together or are too small.
    """
    if first.dim() != 2 or second.dim() != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(
            f"features are {tuple(first.shape)} and {tuple(second.shape)}; they must be (n, d) and "
            "(m, d)"
        )
    n, m = len(first), len(second)
    if min(n, m) < 2:
        raise ValueError(f"{n} and {m} rows of features: two of each are the least")
    first, second = first.double(), second.double()
    within = sum(_off_diagonal_mean(_kernel(rows, rows)) for rows in (first, second))
    return float(within - 2 * _kernel(first, second).mean())


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _off_diagonal_mean(kernel: Tensor) -> Tensor:
    n = len(kernel)
    return (kernel.sum() - torch.diagonal(kernel).sum()) / (n * (n - 1))
