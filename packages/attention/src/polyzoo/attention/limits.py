"""The largest score-shaped matrix a call may allocate."""

from __future__ import annotations

MATRIX_LIMIT = 2 << 30
"""Bytes. Above it a call is refused, never silently slow or out of memory."""
_LARGEST_SCORE = 8


def matrix_scores(b: int, h: int, n: int, m: int) -> int:
    """Count the scores of a call; 0 where they fit in any dtype, so that most calls look alike."""
    scores = b * h * n * m
    return scores if scores * _LARGEST_SCORE > MATRIX_LIMIT else 0


def matrix_error(forced_by: str, size: int, instead: str) -> ValueError:
    """Say which argument forces an n x m matrix, how large it is, and what to do instead."""
    return ValueError(
        f"{forced_by} would allocate an n x m matrix of {size:,} bytes "
        f"(limit {MATRIX_LIMIT:,}); {instead}"
    )
