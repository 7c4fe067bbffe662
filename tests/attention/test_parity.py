"""Stored reference cases, forward and every gradient; --parity-dir DIR runs further ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polyzoo.attention import attention
from support.attention import DEVICES, Case, errors, load_cases, math_errors
from support.parity import case_folders

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
HUGE_LIMITS = {"o": 1e-2, "dq": 1e-3, "dk": 1e-3, "dv": 5e-2}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = [
            case
            for folder in case_folders(metafunc.config, "attention")
            for case in load_cases(folder)
        ]
        metafunc.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stored_case(case: Case, dtype: torch.dtype, backend: str, device: str):
    inputs = case.tensors(dtype, device)
    out, lse = attention(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        **case.arguments(inputs, device),
        backend=backend,
        return_lse=True,
    )
    found = errors(case, out, inputs)
    assert out.dtype == dtype
    assert out.transpose(1, 2).is_contiguous(), "heads merge without a copy"

    if dtype == torch.float64:
        limits = dict.fromkeys(found, 1e-10)
    elif case.huge:
        limits = HUGE_LIMITS
    else:
        floor = 1e-6 if dtype == torch.float32 else 1e-5
        limits = {n: 2 * e + floor for n, e in math_errors(case, dtype, device).items()}
    over = {n: (e, limits[n]) for n, e in found.items() if not e <= limits[n]}
    assert not over, "largest error above (found, limit)"

    stored = case.arrays["lse"]
    dead = np.isneginf(stored)
    mine = lse.double().cpu().numpy()
    assert np.array_equal(np.isneginf(mine), dead)
    # The scores themselves carry the rounding: relative to their size, of fp32 at best.
    exact = 1e-10 if dtype == torch.float64 else 2e-6
    size = 1.0 + np.abs(stored[~dead])
    assert (np.abs(mine[~dead] - stored[~dead]) <= exact * size).all()


def test_cases_are_found(request: pytest.FixtureRequest):
    assert case_folders(request, "attention"), "no stored cases: is tests/parity/attention there?"
