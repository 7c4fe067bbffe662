"""`polyzoo attention bench` on tiny calls."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from polyzoo.attention.bench import (
    CASES,
    Case,
    _inputs,
    _smaller,
    bench_calls,
    render_report,
)
from polyzoo.attention.cli import BenchConfig
from polyzoo.core.errors import UsageError
from support.cli import run_cli

FAST: dict[str, Any] = {"device": "cpu", "seconds": 1e-4}


def test_every_backend_that_serves_the_call_is_timed():
    report = bench_calls(BenchConfig(q="2,4,9,16", k="2,2,20,16", causal=True, **FAST))
    assert [row.backend for row in report.rows] == ["sdpa", "reference"]
    assert [row.chosen for row in report.rows] == [True, False]
    for row in report.rows:
        assert row.forward_ms is not None
        assert row.forward_ms > 0
        assert row.difference is not None
        assert row.difference < 1e-5
        assert row.backward_ms is None
    assert "* is what auto takes" in render_report(report)


def test_gradients_and_half_precision():
    report = bench_calls(BenchConfig(q="1,2,8,16", dtype="bf16", backward=True, **FAST))
    assert report.dtype == "bfloat16"
    assert all(row.backward_ms and row.backward_ms > 0 for row in report.rows)
    assert max(row.difference or 0.0 for row in report.rows) > 1e-6, "rounded, so not equal"


@pytest.mark.parametrize(
    "case",
    [
        Case(name="a", batch=3, heads=1, key_heads=1, queries=5, keys=9, channels=8),
        Case(name="b", batch=2, heads=1, key_heads=1, queries=9, keys=5, channels=8, causal=True),
        Case(name="c", batch=2, heads=1, key_heads=1, queries=4, keys=9, channels=8, causal=True),
        Case(
            name="d", batch=4, heads=1, key_heads=1, queries=6, keys=8, channels=8, causal=True,
            filled=0.5,
        ),
    ],
)  # fmt: skip
def test_pairs_are_counted_as_the_rules_say(case: Case):
    _, options, pairs = _inputs(case, torch.device("cpu"), torch.float32)
    lengths = options.get("kv_lens", torch.tensor([case.keys] * case.batch)).tolist()
    counted = sum(
        j <= i + length - case.queries or not case.causal
        for length in lengths
        for i in range(case.queries)
        for j in range(length)
    )
    assert pairs == counted


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_cpu_gets_small_ones(case: Case):
    small = _smaller(case)
    flops = 4 * small.batch * small.heads * small.queries * small.keys * small.channels
    assert flops < 2e10
    assert (small.heads, small.key_heads, small.channels) == (
        case.heads,
        case.key_heads,
        case.channels,
    )
    assert small.grid * small.grid in (0, small.keys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"cases": "nope"}, "--cases nope: there are image-self, "),
        ({"q": "1,2,3"}, "--q 1,2,3: give 4 sizes of 1 or more"),
        ({"q": "1,3,2,8", "k": "1,2,2,8"}, "heads must divide those of --q"),
        ({"device": "toaster"}, "--device toaster"),
        ({"seconds": 0.0}, "--seconds 0.0: give more than 0"),
    ],
)
def test_wrong_usage(flags: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        bench_calls(BenchConfig(**{**FAST, **flags}))


def test_command():
    done = run_cli(
        "attention", "bench", "--q", "1,2,8,16", "--device", "cpu", "--seconds", "1e-4", "--json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [row["backend"] for row in report["rows"]] == ["sdpa", "reference"]
    with pytest.raises(ValueError, match=r"filled=0.0 must be above 0 and at most 1"):
        BenchConfig(filled=0.0)
