"""CUDA C++ kernels without a GPU: the same sources compiled for the CPU, a fiber per thread."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from polyzoo.attention.kernels import launch_cuda
from polyzoo.attention.kernels.cuda_program import Variant
from polyzoo.attention.kernels.problem import Problem, heads_last
from support.attention_oracle import exact, torch_math
from support.warp_emulator import emulated

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="needs g++ to compile the kernels for the CPU"
)
CPU = torch.device("cpu")


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape).half()


def ends(*lengths: int) -> torch.Tensor:
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32)


def calls() -> dict[str, Problem]:
    """Together they reach every branch: lengths, both edges of a window, groups, packing."""
    torch.manual_seed(0)
    strided = half(2, 70, 4, 24).transpose(1, 2)
    return {
        "lengths, window, groups": Problem(
            q=strided,
            k=half(2, 2, 150, 24),
            v=half(2, 2, 150, 24),
            scale=0.2,
            kv_lens=torch.tensor([150, 77]),
            left=60,
            right=10,
        ),
        "no keys, more queries than keys": Problem(
            q=half(2, 1, 40, 24),
            k=half(2, 1, 20, 24),
            v=half(2, 1, 20, 24),
            scale=-0.3,
            kv_lens=torch.tensor([20, 0]),
            left=5,
            right=0,
        ),
        "packed, causal": Problem(
            q=half(1, 2, 110, 72),
            k=half(1, 2, 110, 72),
            v=half(1, 2, 110, 72),
            scale=72**-0.5,
            right=0,
            cu_q=ends(60, 0, 50),
            cu_k=ends(70, 10, 30),
            max_q=60,
            max_k=70,
        ),
    }


@pytest.mark.parametrize("volta", [False, True], ids=["turing", "volta"])
@pytest.mark.parametrize("name", calls())
def test_forward_and_gradients(name: str, volta: bool):
    problem = calls()[name]
    low = heads_last(problem.q, problem.q.shape[3])
    options: dict[str, Any] = {"volta": volta, "programs": emulated}
    out, lse = launch_cuda.forward(problem, low=low, **options)
    dout = torch.randn_like(out)
    grads = launch_cuda.backward(problem, out, lse, dout, low=low, **options)
    wanted, peer = exact(problem, dout), torch_math(problem, dout)
    for key, found in zip(("o", "dq", "dk", "dv"), (out, *grads), strict=True):
        assert found is not None
        ours = (found.double() - wanted[key].double()).abs().max().item()
        theirs = (peer[key].double() - wanted[key].double()).abs().max().item()
        assert ours <= 2 * theirs + 1e-5, (key, ours, theirs)
    seen = torch.isfinite(wanted["lse"])
    assert torch.equal(torch.isneginf(lse), ~seen)
    assert (lse.double() - wanted["lse"])[seen].abs().max() <= 2e-6


@pytest.mark.parametrize("volta", [False, True], ids=["turing", "volta"])
def test_reads_of_shared_memory_have_no_bank_conflicts(volta: bool):
    """An even number of 16-byte chunks in a row is padded to an odd one; 72 channels have nine."""
    torch.manual_seed(1)
    q = half(1, 1, 64, 16)
    launch_cuda.forward(Problem(q=q, k=q, v=q, scale=0.1), volta=volta, programs=emulated)
    assert emulated(Variant("forward", 16, volta), CPU).bank_ways == 1
    launch_cuda.forward(calls()["packed, causal"], volta=volta, programs=emulated)
    packed = Variant("forward", 72, volta, has_right=True, packed=True)
    assert emulated(packed, CPU).bank_ways == 1


def test_only_what_is_wanted():
    torch.manual_seed(2)
    q = half(1, 1, 20, 16)
    problem = Problem(q=q, k=q, v=q, scale=0.2)
    out, lse = launch_cuda.forward(problem, volta=False, programs=emulated)
    options: dict[str, Any] = {"volta": False, "programs": emulated}
    dq, dk, dv = launch_cuda.backward(problem, out, lse, out, need_kv=False, **options)
    assert dq is not None
    assert dk is None
    assert dv is None


def test_empty_calls():
    q, none = half(1, 2, 5, 16), half(1, 2, 0, 16)
    options: dict[str, Any] = {"volta": False, "programs": emulated}
    out, lse = launch_cuda.forward(Problem(q=q, k=none, v=none, scale=1.0), **options)
    assert not out.any()
    assert torch.isneginf(lse).all()
    out, lse = launch_cuda.forward(Problem(q=none, k=q, v=q, scale=1.0), **options)
    assert out.shape == (1, 2, 0, 16)
    assert lse.shape == (1, 2, 0)
