"""Exact joining of attention over parts of the keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Join attention results over disjoint sets of keys as if the keys had been together.

    Args:
        outs: Results, `(b, h, n, dv)` each, for the same queries.
        lses: Their log-sum-exps, `(b, h, n)` each; -inf where a part had nothing to see.

    Returns:
        The joined result in the dtype of the first part, and its log-sum-exp.

    Raises:
        ValueError: No parts, or parts whose shapes do not fit.

    Example:
        >>> first = attention(q, k[:, :, :64], v[:, :, :64], return_lse=True)
        >>> second = attention(q, k[:, :, 64:], v[:, :, 64:], return_lse=True)
        >>> out, lse = merge_states([first[0], second[0]], [first[1], second[1]])
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"got {len(outs)} results and {len(lses)} log-sum-exps; give one of each per part"
        )
    for index, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"part {index} has a result of shape {tuple(out.shape)} and a log-sum-exp of shape "
                f"{tuple(lse.shape)}; every part needs {tuple(outs[0].shape)} and "
                f"{tuple(outs[0].shape[:-1])}"
            )
    stacked = torch.stack(list(lses))
    whole = torch.logsumexp(stacked, dim=0)
    # A row dead in every part has whole = -inf: subtract 0 there, so that exp sees -inf, not NaN.
    shift = torch.where(whole == -torch.inf, torch.zeros_like(whole), whole)
    weights = torch.exp(stacked - shift).unsqueeze(-1)
    merged = weights[0] * outs[0]
    for weight, out in zip(weights[1:], outs[1:], strict=True):
        merged = merged + weight * out
    return merged.to(outs[0].dtype), whole
