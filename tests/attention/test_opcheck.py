"""The two operators obey torch's rules for operators: schema, fake tensors, autograd, AOT."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from support.cli import run_python

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which torch for Linux brings"
)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    tests = Path(__file__).parents[1]
    done = run_python(
        f"import sys, runpy; sys.path.insert(0, {str(tests)!r}); "
        "runpy.run_module('support.opcheck_child', run_name='__main__')",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_both_operators(report: dict[str, Any]):
    assert list(report["operators"]) == ["forward", "backward"]
    for name, outcomes in report["operators"].items():
        assert set(outcomes.values()) == {"SUCCESS"}, (name, outcomes)
        assert len(outcomes) == (3 if name == "backward" else 4)


def test_a_call_lets_go_of_its_inputs(report: dict[str, Any]):
    """At once, not when Python next collects cycles: on a GPU that is gigabytes later."""
    assert report["kept"] == []
