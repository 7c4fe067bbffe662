"""The host's optimizer step against torch's, in every combination it is called with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polyzoo.training.errors import TrainingError
from polyzoo.training.strategies.host_adamw import HostAdamW, build
from polyzoo.training.strategies.hostmemory import HostMemory

LENGTH = 10_007  # no multiple of a vector, of a page, or of the threads' shares
GROUP = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def gradients(step: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(LENGTH, generator=generator).to(dtype)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_like_torch_in_double_precision(dtype: torch.dtype, threads: int) -> None:
    start = torch.linspace(-1, 1, LENGTH)
    weights = start.clone()
    optimizer = HostAdamW([weights], threads=threads)
    oracle = start.double().requires_grad_()
    reference = torch.optim.AdamW([oracle], lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(5):
        given = gradients(step, dtype)
        copy = torch.empty(LENGTH, dtype=torch.bfloat16)
        optimizer.update(weights, given, group=GROUP, scale=0.25, copy=copy)
        oracle.grad = given.double() * 0.25
        reference.step()
        torch.testing.assert_close(weights, oracle.detach().float(), rtol=1e-5, atol=1e-6)
        assert torch.equal(copy, weights.to(torch.bfloat16))  # rounded as torch rounds
    state = optimizer.state[weights]
    expected = reference.state[oracle]
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[name], expected[name].float(), rtol=1e-5, atol=1e-8)
    assert state["step"] == 5


def test_threads_change_nothing() -> None:
    results = []
    for threads in (1, 2, 7):
        weights = torch.linspace(-1, 1, LENGTH)
        optimizer = HostAdamW([weights], threads=threads)
        for step in range(3):
            optimizer.update(weights, gradients(step, torch.bfloat16), group=GROUP)
        results.append(weights)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_new_weights_may_go_where_the_gradients_were() -> None:
    weights = torch.linspace(-1, 1, LENGTH)
    apart, here = weights.clone(), gradients(1, torch.bfloat16)
    out = torch.empty_like(here)
    HostAdamW([apart]).update(apart, here.clone(), group=GROUP, copy=out)
    HostAdamW([weights]).update(weights, here, group=GROUP, copy=here)
    assert torch.equal(weights, apart)
    assert torch.equal(here, out)


def test_steps_as_any_optimizer() -> None:
    weights = torch.nn.Parameter(torch.ones(8))
    optimizer = HostAdamW([weights], lr=0.1)
    weights.grad = torch.ones(8)
    optimizer.step()
    torch.testing.assert_close(weights.detach(), torch.full((8,), 0.9), rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    weights = torch.ones(8)
    optimizer = HostAdamW([weights])
    with pytest.raises(ValueError, match="one length"):
        optimizer.update(weights, torch.ones(7), group=GROUP)
    with pytest.raises(ValueError, match="contiguous"):
        optimizer.update(weights, torch.ones(16)[::2], group=GROUP)


def test_without_a_compiler_the_message_helps(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"(?s)E-OP-BUILD.*not on the PATH.*apt-get install"):
        build(tmp_path, compiler="no-such-compiler")


def test_what_the_compiler_says_is_shown(tmp_path: Path) -> None:
    fake = tmp_path / "bad-compiler"
    fake.write_text("#!/bin/sh\necho 'fatal: out of cheese' >&2\nexit 1\n")
    fake.chmod(0o755)
    with pytest.raises(TrainingError, match=r"(?s)E-OP-BUILD.*out of cheese"):
        build(tmp_path, compiler=str(fake))
    assert [file.name for file in tmp_path.iterdir()] == ["bad-compiler"]


def test_compiled_once(tmp_path: Path) -> None:
    first = build(tmp_path)
    stamp = first.stat().st_mtime_ns
    assert build(tmp_path) == first
    assert first.stat().st_mtime_ns == stamp


def test_host_memory_is_exact_and_zero() -> None:
    memory = HostMemory()
    flat = memory.empty(12_345, torch.bfloat16, pinned=True)
    assert (flat.numel(), flat.dtype) == (12_345, torch.bfloat16)
    assert not flat.any()
    assert memory.empty(0, torch.float32, pinned=False).numel() == 0
    memory.close()
    flat.fill_(1)
