"""The two operators obey torch's rules for operators: schema, fake tensors, autograd, AOT."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from support.cli import run_python


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which torch for Linux brings"
)
def test_both_operators():
    tests = Path(__file__).parents[1]
    done = run_python(
        f"import sys, runpy; sys.path.insert(0, {str(tests)!r}); "
        "runpy.run_module('support.opcheck_child', run_name='__main__')",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert len(report) == 3
    for name, outcomes in report.items():
        assert set(outcomes.values()) == {"SUCCESS"}, (name, outcomes)
        assert len(outcomes) == (3 if name == "backward" else 4)
