"""Tile classes and head splits against brute force."""

from __future__ import annotations

import random

import numpy as np
import pytest

from polyzoo.attention.kernels.tiles import head_blocks, key_range, query_range


def seen_matrix(n: int, length: int, left: int, right: int) -> np.ndarray:
    i = np.arange(n)[:, None] + length - n
    j = np.arange(length)[None, :]
    seen = np.ones((n, length), dtype=bool)
    if right >= 0:
        seen &= j <= i + right
    if left >= 0:
        seen &= j >= i - left
    return seen


def test_classes_against_brute_force():
    pick = random.Random(0)
    tiles = 0
    while tiles < 100_000:
        n, length = pick.randint(1, 150), pick.randint(0, 150)
        left, right = (pick.choice([-1, 0, pick.randint(0, 160)]) for _ in range(2))
        sizes = {"block_m": pick.choice([8, 16, 32]), "block_n": pick.choice([8, 16, 32])}
        rules = {"n": n, "length": length, "left": left, "right": right, **sizes}
        m_size, n_size = sizes["block_m"], sizes["block_n"]
        seen = seen_matrix(n, length, left, right)
        # Whole tiles: rows past the end are free, keys past the end are never seen.
        rows, columns = -(-n // m_size), -(-length // n_size)
        for row in range(rows):
            plan = key_range(row * m_size, **rules)
            for column in range(columns):
                part = seen[row * m_size : (row + 1) * m_size, column * n_size :][:, :n_size]
                found = plan.classify(column)
                if part.any():
                    assert found != "empty", rules
                if found == "full":
                    assert part.all(), rules
                    assert part.shape[1] == n_size, rules
                tiles += 1
            # Partial tiles are few: at most the edges' width.
            full = plan.full_stop - plan.full_first
            assert plan.stop - plan.first - full <= 2 * (m_size // n_size + 2), rules
        for column in range(columns):
            plan = query_range(column * n_size, **rules)
            for row in range(rows):
                part = seen[row * m_size : (row + 1) * m_size, column * n_size :][:, :n_size]
                found = plan.classify(row)
                if part.any():
                    assert found != "empty", rules
                if found == "full":
                    assert part.all(), rules
                    assert part.shape[0] == m_size, rules
                tiles += 1


@pytest.mark.parametrize("d", range(8, 257, 8))
def test_head_blocks_cover_and_waste_little(d: int):
    first, second = head_blocks(d)
    assert first + second >= d
    assert first & (first - 1) == 0
    assert second & (second - 1) == 0
    assert first >= 16
    assert second == 0 or 16 <= second < first
    assert first + second <= max(16, 1 << (d - 1).bit_length())


def test_head_blocks_of_the_models():
    wanted = {64: (64, 0), 72: (64, 16), 80: (64, 16), 88: (64, 32), 96: (64, 32), 128: (128, 0)}
    assert {d: head_blocks(d) for d in wanted} == wanted
