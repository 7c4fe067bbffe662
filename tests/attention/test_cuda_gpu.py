"""CUDA C++ kernels on a GPU newer than they are made for, through the driver's compiler.

Turing's products run natively on newer GPUs. Volta's are emulated there, correct and very slow, so
its cases are few and small.
"""

from __future__ import annotations

import pytest
import torch

from polyzoo.attention import CuSeqlens, attention, explain
from polyzoo.attention.kernels import launch_cuda
from polyzoo.attention.kernels.problem import Problem, heads_last
from support.attention_oracle import exact, parity_case, parity_names, torch_math
from support.attention_oracle import visible as visible_keys

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (7, 0),
        reason="needs a CUDA device of sm_70 or newer",
    ),
    pytest.mark.filterwarnings(
        "ignore:Attempting to run cuBLAS, but there was no current CUDA context:UserWarning"
    ),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HUGE = {"o": 1e-2, "dv": 5e-2, "dq": 1e-3, "dk": 1e-3}


def serves(problem: Problem) -> bool:
    return (
        problem.q.shape[3] == problem.v.shape[3]
        and problem.q.shape[3] <= 128
        and problem.mask is None
        and problem.bias is None
        and not problem.width
        and problem.dropout == 0
    )


def run(problem: Problem, dout, volta: bool):
    low = heads_last(problem.q, problem.q.shape[3])
    out, lse = launch_cuda.forward(problem, low=low, volta=volta)
    grads = launch_cuda.backward(problem, out, lse, dout, low=low, volta=volta)
    return dict(zip(("o", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))


def check(found, wanted, peer):
    for name in ("o", "dq", "dk", "dv"):
        if found[name].numel() == 0:
            continue
        ours = (found[name].double() - wanted[name].double()).abs().max().item()
        theirs = (peer[name].double() - wanted[name].double()).abs().max().item()
        assert ours <= 2 * theirs + 1e-5, (name, ours, theirs)
    seen = torch.isfinite(wanted["lse"])
    assert torch.equal(torch.isneginf(found["lse"]), ~seen)
    assert not seen.any() or (found["lse"].double() - wanted["lse"])[seen].abs().max() < 1e-4


@pytest.mark.parametrize("volta", [False, True], ids=["turing", "volta"])
@pytest.mark.parametrize("name", parity_names())
def test_stored_cases(name: str, volta: bool):
    problem, stored = parity_case(name, torch.float16, DEVICE)
    if not serves(problem):
        pytest.skip("the backend says no to this case's options")
    dout = stored["do"].to(torch.float16)
    found = run(problem, dout, volta)
    if name.startswith("huge_logits"):
        for key, limit in HUGE.items():
            assert (found[key].double() - stored[key]).abs().max() <= limit, key
        return
    check(found, stored, torch_math(problem, dout))
    again = run(problem, dout, volta)
    assert all(torch.equal(value, again[key]) for key, value in found.items()), "not repeatable"


@pytest.mark.parametrize(
    ("d", "volta"),
    [(d, False) for d in (8, 40, 64, 72, 80, 88, 96, 104, 128)] + [(d, True) for d in (8, 64, 128)],
)
def test_head_sizes(d: int, volta: bool):
    torch.manual_seed(d)
    n, m = (50, 140) if volta else (190, 300)
    q = torch.randn(2, n, 4, d, device=DEVICE, dtype=torch.float16).transpose(1, 2)
    k, v = (torch.randn(2, 2, m, d, device=DEVICE, dtype=torch.float16) for _ in range(2))
    lens = torch.tensor([m, 77], device=DEVICE)
    problem = Problem(q=q, k=k, v=v, scale=d**-0.5, kv_lens=lens, right=0, left=100)
    assert visible_keys(problem).any()
    dout = torch.randn_like(q)
    check(run(problem, dout, volta), exact(problem, dout), torch_math(problem, dout))


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.float16, requires_grad=True)


def test_front_door():
    q, k, v = half(1, 4, 90, 72), half(1, 2, 90, 72), half(1, 2, 90, 72)
    lengths = CuSeqlens.from_lengths([50, 0, 40], device=DEVICE)
    choice = explain(q, k, v, causal=True, cu_seqlens=lengths, backend="cuda")
    assert choice.backend is not None
    out, lse = attention(q, k, v, causal=True, cu_seqlens=lengths, backend="cuda", return_lse=True)
    wanted, wanted_lse = attention(
        q.double(),
        k.double(),
        v.double(),
        causal=True,
        cu_seqlens=lengths,
        backend="reference",
        return_lse=True,
    )
    assert (out.double() - wanted).abs().max() < 2e-3
    assert (lse.double() - wanted_lse).abs().max() < 1e-4
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    exact_grads = torch.autograd.grad(wanted.square().sum(), (q, k, v))
    for mine, reference in zip(grads, exact_grads, strict=True):
        assert (mine - reference).abs().max() < 2e-2 * reference.abs().max()


def test_compiled_and_replayed():
    q, k, v = (half(2, 3, 70, 64).detach() for _ in range(3))
    lens = torch.tensor([70, 20], device=DEVICE, dtype=torch.int32)

    def attend(q, k, v):
        return attention(q, k, v, kv_lens=lens, backend="cuda")

    eager = attend(q, k, v)
    assert torch.equal(torch.compile(attend, fullgraph=True)(q, k, v), eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, k, v)
    lens.copy_(torch.tensor([5, 0]))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, attend(q, k, v))
    assert not out[1].any()


def test_bad_calls_say_what_to_do():
    q = torch.randn(1, 1, 8, 64, device=DEVICE)
    with pytest.raises(ValueError, match="computes float16, not float32"):
        attention(q, q, q, backend="cuda")
    q = half(1, 1, 8, 136)
    with pytest.raises(ValueError, match="multiples of 8 up to 128"):
        attention(q, q, q, backend="cuda")
