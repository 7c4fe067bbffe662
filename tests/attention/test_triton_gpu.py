"""Triton kernels on a GPU: every stored case and random calls, forward and every gradient."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch

from polyzoo.attention import Choice, CuSeqlens, DecomposedBias, attention, explain, use_backend
from polyzoo.attention.kernels import launch_short
from polyzoo.attention.kernels.launch import forward
from polyzoo.attention.kernels.launch_backward import backward
from polyzoo.attention.kernels.launch_decode import decode, suits
from polyzoo.attention.kernels.problem import Problem, heads_last
from support.attention_oracle import exact, parity_case, parity_names, torch_math

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
        reason="needs a CUDA device of sm_80 or newer",
    ),
    # torch says so, once, where the first product of a backward pass runs in a thread of autograd
    # that has not touched the GPU yet; it then sets the context itself, and results are right.
    pytest.mark.filterwarnings(
        "ignore:Attempting to run cuBLAS, but there was no current CUDA context:UserWarning"
    ),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PARTS = (slice(0, 60), slice(60, 100))
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def run_all(problem: Problem, dout):
    low = heads_last(problem.q, problem.v.shape[-1]) if problem.q.dtype != torch.float32 else None
    out, lse = forward(problem, low=low)
    grads = backward(problem, out, lse, dout, low=low)
    found = {"o": out, "lse": lse}
    for name in ("q", "k", "v", "bias", "rel_h", "rel_w"):
        if getattr(problem, name) is not None:
            found[f"d{name}"] = getattr(grads, name)
    return found


def errors(found, wanted):
    return {
        name: (value.double() - wanted[name].double()).abs().max().item() if value.numel() else 0.0
        for name, value in found.items()
        if name != "lse"
    }


def check(found, wanted, peer, spare):
    """Errors at most twice those of torch's math attention in the same dtype, plus a little."""
    ours, theirs = errors(found, wanted), errors({k: peer[k] for k in found if k in peer}, wanted)
    late = {
        name: (value, theirs[name])
        for name, value in ours.items()
        if not value <= 2 * theirs[name] + spare
    }
    assert not late, late
    seen = torch.isfinite(wanted["lse"])
    assert torch.equal(torch.isneginf(found["lse"]), torch.isneginf(wanted["lse"]))
    gap = (found["lse"].double() - wanted["lse"])[seen]
    assert gap.numel() == 0 or gap.abs().max() < 2e-3
    for name, value in found.items():
        if name == "lse" or value.numel() == 0 or wanted[name].abs().max() < 1e-9:
            continue  # nothing, or zero up to rounding: it has no direction
        a, b = value.double().flatten(), wanted[name].double().flatten()
        assert torch.dot(a, b) / (a.norm() * b.norm()) >= 0.9999, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", parity_names())
def test_stored_cases(name, dtype):
    problem, stored = parity_case(name, DTYPES[dtype], DEVICE)
    dout = stored["do"].to(DTYPES[dtype])
    found = run_all(problem, dout)
    if name.startswith("huge_logits"):
        limits = {"o": 1e-2, "dv": 5e-2, "dq": 1e-3, "dk": 1e-3}
        for key, limit in limits.items():
            assert (found[key].double() - stored[key]).abs().max() <= limit, key
        return
    if problem.dropout:
        # torch's math attention cannot drop the same ones: its largest errors over other cases.
        o, grad = {"fp32": (5.4e-7, 1.6e-6), "fp16": (7.8e-4, 2.5e-3), "bf16": (7.4e-3, 2e-2)}[
            dtype
        ]
        for key, value in errors(found, stored).items():
            assert value <= 2 * (o if key == "o" else grad) + 1e-6, (key, value)
        return
    check(found, stored, torch_math(problem, dout), 1e-6 if dtype == "fp32" else 1e-5)
    if suits(problem) or name.startswith("decode"):
        out, lse = decode(problem, splits=3)
        assert (out.double() - stored["o"]).abs().max() <= 2 * 7.4e-3
        assert (lse.double() - stored["lse"]).abs().max() <= 1e-4


def draw(seed: int, dtype: torch.dtype) -> tuple[Problem, torch.Tensor]:
    """A random legal call of up to 400 queries and keys."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    d = pick.choice([8, 16, 24, 32, 40, 56, 64, 72, 72, 80, 80, 88, 96, 104, 112, 128, 160, 256])
    dv = d if pick.random() < 0.7 else pick.choice([8, 32, 64, 72, 80, 128])
    hk = pick.choice([1, 2, 3])
    h = hk * pick.choice([1, 1, 2, 4])
    b = pick.choice([1, 2, 3])
    kind = pick.choice(["plain", "kv_lens", "packed", "mask", "bias", "relpos", "mix"])
    n, m = pick.randint(1, 400), pick.randint(1, 400)
    extra: dict = {}
    if kind == "packed":
        b = 1
        lengths_q = [pick.choice([0, 1, 17, 64, 130, 200]) for _ in range(pick.randint(1, 5))]
        lengths_k = [pick.choice([0, 1, 31, 64, 150, 210]) for _ in lengths_q]
        n, m = sum(lengths_q), sum(lengths_k)
        extra = {
            "cu_q": cumulative(lengths_q),
            "cu_k": cumulative(lengths_k),
            "max_q": max(lengths_q),
            "max_k": max(lengths_k),
        }
    if kind == "relpos":
        kh, kw = pick.choice([(5, 6), (14, 14), (3, 64), (7, 33), (2, 128), (9, 1)])
        m = kh * kw
        extra = {"rel_h": normal(dtype, b, h, n, kh), "rel_w": normal(dtype, b, h, n, kw)}
    if kind in ("mask", "mix"):
        shape = [pick.choice([1, size]) for size in (b, h, n, m)]
        extra["mask"] = torch.rand(shape, device=DEVICE) < pick.choice([0.02, 0.5, 0.97])
        if pick.random() < 0.5:
            extra["mask"][..., : shape[3] // 2] = pick.random() < 0.5
    if kind in ("bias", "mix"):
        extra["bias"] = normal(dtype, *(pick.choice([1, size]) for size in (b, h, n, m)))
    if kind == "kv_lens" or (kind in ("mix", "relpos") and pick.random() < 0.5):
        extra["kv_lens"] = torch.tensor([pick.randint(0, m) for _ in range(b)], device=DEVICE)
    if pick.random() < 0.4:
        extra["right"] = pick.choice([0, 0, 5, 70])
    if pick.random() < 0.25:
        extra["left"] = pick.choice([0, 8, 100])
    if kind != "packed" and pick.random() < 0.15:
        extra |= {"dropout": 0.3, "rng": torch.tensor([seed * 7**20, 5], device=DEVICE)}
    q, k, v = normal(dtype, b, h, n, d), normal(dtype, b, hk, m, d), normal(dtype, b, hk, m, dv)
    if pick.random() < 0.4:  # heads last, as models have it
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    if pick.random() < 0.2:  # odd row strides: no 16-byte reads
        q, k = (torch.nn.functional.pad(t, (0, 3))[..., :d] for t in (q, k))
    scale = pick.choice([d**-0.5, d**-0.5, 0.3, -0.2])
    problem = Problem(q=q, k=k, v=v, scale=scale, **extra)
    return problem, normal(dtype, b, h, n, dv)


def cumulative(lengths):
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return torch.tensor(ends, dtype=torch.int32, device=DEVICE)


def normal(dtype, *shape):
    return torch.randn(shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("seed", range(int(os.environ.get("POLYZOO_TEST_CALLS", "120"))))
def test_random_calls(seed):
    dtype = list(DTYPES.values())[seed % 3]
    problem, dout = draw(seed, dtype)
    wanted = exact(problem, dout)
    found = run_all(problem, dout)
    again = run_all(problem, dout)
    for name, value in found.items():
        assert torch.equal(value, again[name]), f"{name} differs from run to run"
    if problem.dropout:
        rough = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
        for key, value in errors(found, wanted).items():
            size = wanted[key].abs().max().item() if wanted[key].numel() else 0.0
            assert value <= rough * max(1.0, size), (key, value, size)
        return
    check(found, wanted, torch_math(problem, dout), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [None, 1, 7])
@pytest.mark.parametrize("kind", ["plain", "kv_lens", "mask", "bias", "window"])
def test_decode(kind, splits, dtype):
    torch.manual_seed(1)
    dtype = DTYPES[dtype]
    b, h, hk, n, m, d = 3, 8, 2, 4, 1000, 80
    extra: dict = {}
    if kind == "kv_lens":
        extra = {"kv_lens": torch.tensor([0, 1000, 333], device=DEVICE), "right": 0}
    if kind == "mask":
        extra = {"mask": torch.rand(b, 1, 1, m, device=DEVICE) < 0.5}
    if kind == "bias":
        extra = {"bias": normal(dtype, 1, h, n, m)}
    if kind == "window":
        extra = {"left": 100, "right": 0}
    problem = Problem(
        q=normal(dtype, b, h, n, d),
        k=normal(dtype, b, hk, m, d),
        v=normal(dtype, b, hk, m, d),
        scale=d**-0.5,
        **extra,
    )
    out, lse = decode(problem, splits=splits)
    wanted = exact(problem, torch.zeros_like(out))
    peer = torch_math(problem, torch.zeros_like(out))
    check({"o": out, "lse": lse}, wanted, peer, 1e-5)


def make(b, h, n, d, dtype=torch.bfloat16, **options):
    return [normal(dtype, b, h, n, d).requires_grad_(**options) for _ in range(3)]


def name_of(choice: Choice) -> str:
    return "nobody" if choice.backend is None else choice.backend.name


def test_front_door_takes_it():
    q, k, v = make(1, 2, 100, 72)
    assert name_of(explain(q, k, v)) == "triton"
    out = attention(q, k, v, causal=True)
    out.sum().backward()
    wanted = attention(q.double(), k.double(), v.double(), causal=True, backend="reference")
    assert (out.double() - wanted).abs().max() < 2e-2
    assert q.grad is not None
    assert k.grad is not None


def test_packed_calls():
    q, k, v = (t.detach() for t in make(1, 2, 100, 72))
    lengths = CuSeqlens.from_lengths([60, 0, 40], device=DEVICE)
    assert name_of(explain(q, k, v, cu_seqlens=lengths)) == "triton"
    with use_backend("sdpa"):
        assert name_of(explain(q, k, v, cu_seqlens=lengths)) == "sdpa"
    out = attention(q, k, v, cu_seqlens=lengths, backend="triton")
    alone = [attention(*(t[:, :, s] for t in (q, k, v)), backend="triton") for s in PARTS]
    assert (out - torch.cat(alone, dim=2)).abs().max() < 1e-2


def test_compiled_equals_eager():
    q, k, v = make(2, 4, 128, 72)
    lens = torch.tensor([128, 50], device=DEVICE)

    def run(q, k, v):
        return attention(q, k, v, kv_lens=lens, backend="triton")

    eager = run(q, k, v)
    grads = torch.autograd.grad(eager.float().square().sum(), (q, k, v))
    made = torch.compile(run, fullgraph=True)(q, k, v)
    again = torch.autograd.grad(made.float().square().sum(), (q, k, v))
    assert torch.equal(eager, made)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


def test_graph_replay_sees_new_lengths():
    q, k, v = (t.detach() for t in make(2, 4, 200, 64))
    lens = torch.tensor([200, 200], device=DEVICE)
    mask = torch.ones(2, 1, 200, 200, dtype=torch.bool, device=DEVICE)

    def run():
        return attention(q, k, v, kv_lens=lens, mask=mask, backend="triton")

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    lens.copy_(torch.tensor([7, 0]))
    mask[0, :, :, :3] = False
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, run())
    assert not out[1].any()


def test_changed_mask_is_seen():
    q, k, v = (t.detach() for t in make(1, 1, 200, 64))
    mask = torch.ones(200, 200, dtype=torch.bool, device=DEVICE)
    before = attention(q, k, v, mask=mask, backend="triton")
    mask[:, 64:] = False
    after = attention(q, k, v, mask=mask, backend="triton")
    alone = attention(q, k[:, :, :64], v[:, :, :64], backend="triton")
    assert not torch.equal(before, after)
    assert (after - alone).abs().max() < 1e-2


def test_values_of_masked_keys_do_not_leak():
    q, k, v = (t.detach() for t in make(1, 2, 150, 72))
    v[:, :, 100:], k[:, :, 120:] = torch.inf, torch.nan
    lens = torch.tensor([100], device=DEVICE)
    mask = (torch.arange(150, device=DEVICE) < 100).expand(150, 150)
    wanted = attention(q, k[:, :, :100], v[:, :, :100], backend="triton")
    rules: list[dict[str, Any]] = [{"kv_lens": lens}, {"mask": mask}]
    for rule in rules:
        out = attention(q, k, v, **rule, backend="triton")
        assert (out - wanted).abs().max() < 2e-2, rule


@pytest.mark.parametrize("kind", ["plain", "causal", "window", "kv_lens", "relpos"])
def test_memory_does_not_grow_with_the_score_matrix(kind):
    n = 32768
    q, k, v = make(1, 1, n, 64)
    rules: dict = {}
    if kind == "causal":
        rules = {"causal": True}
    if kind == "window":
        rules = {"window": (256, 0)}
    if kind == "kv_lens":
        rules = {"kv_lens": torch.tensor([20000], device=DEVICE)}
    if kind == "relpos":
        rules = {
            "bias": DecomposedBias(normal(q.dtype, 1, 1, n, 256), normal(q.dtype, 1, 1, n, 128))
        }
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attention(q, k, v, **rules, backend="triton")
    out.backward(torch.ones_like(out))
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 16 * q.numel() * q.element_size(), extra  # the scores would take 2 GiB


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_few_keys(dtype):
    torch.manual_seed(2)
    q = normal(DTYPES[dtype], 3, 4, 1100, 72)
    k, v = (normal(DTYPES[dtype], 3, 2, 120, 72) for _ in range(2))
    lens = torch.tensor([60, 0, 120], device=DEVICE)
    problem = Problem(q=q, k=k, v=v, scale=72**-0.5, kv_lens=lens)
    assert launch_short.suits(problem)
    low = heads_last(q, 72)
    out, lse = launch_short.forward(problem, low=low)
    wanted = exact(problem, torch.zeros_like(out))
    check({"o": out, "lse": lse}, wanted, torch_math(problem, torch.zeros_like(out)), 1e-5)
    assert (out.double() + low.double() - wanted["o"]).abs().max() < 4e-3


@pytest.mark.parametrize("d", [64, 72, 128])
def test_int8(d):
    torch.manual_seed(3)
    q, k, v = (t.detach() for t in make(2, 4, 1024, d))
    k = k + 2 * normal(k.dtype, 1, 4, 1, d)  # an offset of every channel, which smoothing removes
    out, lse = attention(q, k, v, causal=True, precision="int8", return_lse=True)
    wanted, wanted_lse = attention(
        *(t.double() for t in (q, k, v)), causal=True, backend="reference", return_lse=True
    )
    a, b = out.double().flatten(), wanted.flatten()
    assert torch.dot(a, b) / (a.norm() * b.norm()) > 0.999
    assert (out.double() - wanted).abs().max() < 0.1
    assert (lse.double() - wanted_lse).abs().max() < 0.1
    with pytest.raises(ValueError, match="has no int8"):
        attention(q, k, v, precision="int8", backend="triton")
