"""Filters and inner products over the rows of a matrix."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from polyzoo.sea.search.stores.base import Filter, Vectors

_CHUNK_ROWS = 16_384


def allowed_rows(entries: npt.NDArray[np.void], where: Filter) -> npt.NDArray[np.bool_]:
    """Tell which log entries a filter lets through."""
    allowed = np.ones(len(entries), bool)
    if where.languages:
        allowed &= np.isin(entries["language"], np.array([x.encode() for x in where.languages]))
    if where.kinds:
        allowed &= np.isin(entries["kind"], np.array([x.encode() for x in where.kinds]))
    if where.files is not None:
        allowed &= np.isin(entries["file"], np.array(where.files, np.int64))
    return allowed


def inner_products(
    matrix: npt.NDArray[np.floating], rows: npt.NDArray[np.int64], query: Vectors
) -> Vectors:
    """Inner products of some rows, a bounded number of them in memory at a time."""
    scores = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), _CHUNK_ROWS):
        chosen = rows[start : start + _CHUNK_ROWS]
        first, stop = int(chosen[0]), int(chosen[-1]) + 1
        if stop - first <= 2 * len(chosen):  # reading over a few gaps beats gathering rows
            products = np.asarray(matrix[first:stop], np.float32) @ query
            scores[start : start + len(chosen)] = products[chosen - first]
        else:
            scores[start : start + len(chosen)] = np.asarray(matrix[chosen], np.float32) @ query
    return scores
