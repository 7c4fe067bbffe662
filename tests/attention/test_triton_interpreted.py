"""Triton kernels without a GPU: run by Triton's interpreter, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest

from support.attention_oracle import parity_names
from support.cli import run_python

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which torch for Linux brings"
)
HUGE_LIMITS = {"o": 1e-2, "dq": 1e-3, "dk": 1e-3, "dv": 5e-2}
# torch's math attention has no such dropout: its largest errors over the other cases.
WITHOUT_PEER = {"fp32": (5.4e-7, 1.6e-6), "fp16": (7.8e-4, 2.5e-3)}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    tests = Path(__file__).parents[1]
    code = (
        f"import sys, runpy; sys.path.insert(0, {str(tests)!r}); "
        "runpy.run_module('support.triton_interpreted', run_name='__main__')"
    )
    done = run_python(code, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def stored_cases() -> list[str]:
    halves = ("bias_t5", "cross_kvlens", "dropout", "huge_logits", "relpos_sam", "varlen_causal")
    names = parity_names()
    found = [f"{name}-fp16" for name in names if name.startswith((*halves, "window_causal"))]
    return [*(f"{name}-fp32" for name in names), *found]


@pytest.mark.parametrize("case", stored_cases())
def test_stored_case(report: dict[str, Any], case: str):
    name, dtype = case.rsplit("-", 1)
    row = report["stored"][case]
    floor = 1e-6 if dtype == "fp32" else 1e-5
    if name.startswith("huge_logits"):
        limits = HUGE_LIMITS
    elif "math" in row:
        limits = {key: 2 * error + floor for key, error in row["math"].items()}
    else:
        o, gradient = WITHOUT_PEER[dtype]
        limits = {key: 2 * (o if key == "o" else gradient) + floor for key in row["errors"]}
    over = {
        key: (error, limits[key])
        for key, error in row["errors"].items()
        if not error <= limits[key]
    }
    assert not over, "largest error above (found, limit)"
    assert row["lse"] <= (1e-3 if name.startswith("huge_logits") else 2e-6)
    assert row["dead_rows_agree"]


def test_split_keys(report: dict[str, Any]):
    for name, row in report["decoding"].items():
        assert row["o"] <= 1e-6, name
        assert row["lse"] <= 2e-6, name
        assert row["dead_rows_agree"], name


def test_few_keys(report: dict[str, Any]):
    for name, row in report["few_keys"].items():
        assert row["o"] <= 8e-4, name
        assert row["with_low"] < row["o"], name


def test_small_grids(report: dict[str, Any]):
    for name, row in report["small_grids"].items():
        assert row["o"] <= 8e-4, name
        assert row["with_low"] < row["o"], name
        assert row["lse"] <= 2e-6, name
        assert row["dead_rows_agree"], name


def test_int8(report: dict[str, Any]):
    found = report["in_int8"]
    assert found.pop("operator") == ["SUCCESS"]
    for name, row in found.items():
        assert row["cosine"] >= 0.9995, name
        assert row["o"] <= 6e-2, name
        assert row["lse"] <= 5e-2, name
        assert row["dead_rows_agree"], name


def test_compiled(report: dict[str, Any]):
    assert report["compiled"]["equals_eager"]


def test_only_what_is_wanted(report: dict[str, Any]):
    found = report["only_what_is_wanted"]
    assert "once_differentiable" in found["second"]
    assert not found["lse_requires_grad"]
    assert found["k_grad"]


def test_mask_tiles(report: dict[str, Any]):
    found = report["mask_summaries"]
    assert found["states"]
    assert found["full_counts"]
    assert found["kept"]
    assert found["dropped_on_change"]
    assert found["by_key"] == [2, 1, 5, 2]


def test_packed_schedule(report: dict[str, Any]):
    found = report["schedules"]
    assert found["found"] == found["wanted"]


def test_masked_infinities_do_not_leak(report: dict[str, Any]):
    for name, row in report["leaks"].items():
        assert row["dead"] == 0, name
        assert all(row[key] <= 2e-6 for key in ("o", "dq", "dk")), (name, row)


def test_properties(report: dict[str, Any]):
    found = report["properties"]
    for name in ("repeats", "batch_items_apart", "causal_prefix"):
        assert found.pop(name), name
    for name, errors in found.items():
        assert all(error <= 1e-5 and not math.isnan(error) for error in errors), (name, errors)


def test_dropout_is_philox(report: dict[str, Any]):
    found = report["dropout_words"]
    assert found["same"]
    assert found["scaled"] <= 1e-6
    assert found["known_answer_is_the_threshold"]
