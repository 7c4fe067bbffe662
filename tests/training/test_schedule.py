from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyzoo.training.config import Schedule, ScheduleConfig
from polyzoo.training.schedule import lr_factor

KINDS: tuple[Schedule, ...] = ("constant", "linear", "cosine", "inverse_sqrt", "wsd")


def test_values_worked_out_by_hand() -> None:
    linear = ScheduleConfig(kind="linear", warmup_steps=4, final_fraction=0.2)
    assert [lr_factor(step, 12, linear) for step in (0, 1, 3)] == [0.25, 0.5, 1.0]
    assert lr_factor(4, 12, linear) == 1.0
    assert lr_factor(8, 12, linear) == pytest.approx(0.6)
    assert lr_factor(12, 12, linear) == pytest.approx(0.2)
    cosine = ScheduleConfig(kind="cosine")
    assert lr_factor(25, 100, cosine) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    root = ScheduleConfig(kind="inverse_sqrt", warmup_steps=4)
    assert [lr_factor(step, 99, root) for step in (3, 15, 63)] == [1.0, 0.5, 0.25]
    wsd = ScheduleConfig(kind="wsd", warmup_fraction=0.1, decay_fraction=0.2)
    assert [lr_factor(step, 100, wsd) for step in (0, 9, 10, 80, 90)] == [0.1, 1.0, 1.0, 1.0, 0.5]
    assert lr_factor(7, 10, ScheduleConfig(kind="constant")) == 1.0


@given(
    kind=st.sampled_from(KINDS),
    total=st.integers(1, 500),
    warmup=st.floats(0, 1),
    final=st.floats(0, 1),
    decay=st.floats(0, 1),
)
def test_up_then_never_up_again_and_within_bounds(kind, total, warmup, final, decay) -> None:
    config = ScheduleConfig(
        kind=kind, warmup_fraction=warmup, final_fraction=final, decay_fraction=decay
    )
    factors = [lr_factor(step, total, config) for step in range(total)]
    assert all(0 < factor <= 1 or (factor >= 0 and final == 0) for factor in factors)
    peak = round(warmup * total)
    rising, falling = factors[:peak], factors[peak:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    if kind in ("linear", "cosine", "wsd") and falling:
        assert min(falling) >= final


def test_warmup_fraction_is_warmup_steps() -> None:
    by_steps = ScheduleConfig(warmup_steps=30)
    by_share = ScheduleConfig(warmup_fraction=0.3)
    assert [lr_factor(i, 100, by_steps) for i in range(100)] == [
        lr_factor(i, 100, by_share) for i in range(100)
    ]
