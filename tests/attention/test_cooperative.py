"""Keys split between device and host: the same result as with all of them together."""

from __future__ import annotations

import gc
import itertools
import platform
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyzoo.attention import CooperativeCache, attention
from polyzoo.attention.host_decode import HostDecoder, KeyBlock, _compiler

NATIVE = [
    pytest.param(
        True,
        marks=pytest.mark.skipif(_compiler() is None, reason="needs a C++ compiler, as c++ or CXX"),
    ),
    False,
]
ON = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
H, HK, D = 6, 2, 32
PER_KEY = 2 * HK * D * 4
"""Bytes of keys and values of one fp32 item."""


def random(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


class Whole:
    """What the cache must equal: every key kept together."""

    def __init__(self) -> None:
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []

    def append(self, k: Tensor, v: Tensor) -> None:
        self.k.append(k)
        self.v.append(v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.append(k, v)
        whole = (torch.cat(parts, dim=2).double() for parts in (self.k, self.v))
        return attention(q.double(), *whole, causal=True, **options, backend="reference")


def step(b: int, n: int, seed: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    return (
        random(b, H, n, D, seed=seed, device=device),
        random(b, HK, n, D, seed=seed + 1, device=device),
        random(b, HK, n, D, seed=seed + 2, device=device),
    )


def compare(
    steps: list[int],
    *,
    capacity: int,
    layers: int = 2,
    b: int = 1,
    device: str = "cpu",
    **more: Any,
) -> CooperativeCache:
    """Run steps of so many positions through every layer, and compare each."""
    options = {"block_keys": 8, "staging_blocks": 2, **more}
    staging = options["block_keys"] * options["staging_blocks"]
    cache = CooperativeCache(
        layers, gpu_bytes=b * PER_KEY * (staging + layers * capacity), device=device, **options
    )
    wholes = [Whole() for _ in range(layers)]
    seed = itertools.count(0, 10)
    for n in steps:
        for layer, whole in enumerate(wholes):
            q, k, v = step(b, n, next(seed), device)
            found = cache.attend(layer, q, k, v)
            expected = whole.attend(q, k, v)
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-6)
    return cache


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("stream", [0.0, 0.5, 1.0, "auto"])
@pytest.mark.parametrize(
    "steps",
    [
        [1] * 40,
        [40, 1, 1, 1, 3, 1],
        [100, 1, 1],
        [16, 16, 16, 16, 1, 16],
        [50, 50, 50, 2, 2],
        [17, 1, 30, 1, 1, 70, 1],
    ],
    ids=lambda steps: "-".join(map(str, steps[:9])),
)
def test_equals_all_keys_together(steps: list[int], stream: Any, device: str):
    cache = compare(steps, capacity=20, stream=stream, device=device)
    on_device, on_host = cache.keys(1)
    assert on_device <= 20
    assert on_device + on_host == sum(steps)
    assert on_host > 0
    assert cache.shares is not None


@given(
    steps=st.lists(st.one_of(st.integers(1, 3), st.integers(1, 60)), min_size=1, max_size=7),
    capacity=st.integers(16, 50),
    block_keys=st.sampled_from([1, 5, 16]),
    staging_blocks=st.integers(1, 3),
    b=st.integers(1, 3),
    layers=st.integers(1, 3),
    stream=st.sampled_from([0.0, 0.3, 1.0, "auto"]),
)
@settings(max_examples=25, derandomize=True, deadline=None)
def test_any_sizes(steps: list[int], capacity: int, b: int, layers: int, **options: Any):
    compare(steps, capacity=capacity, b=b, layers=layers, threads=2, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", ON)
def test_half_precision(dtype: torch.dtype, device: str):
    cache = CooperativeCache(1, gpu_bytes=40 * PER_KEY, device=device, block_keys=8, stream=0.5)
    whole = Whole()
    for number, n in enumerate([50, 30, 1, 1]):
        q, k, v = (t.to(dtype) for t in step(1, n, 10 * number, device))
        found = cache.attend(0, q, k, v)
        assert found.dtype == dtype
        limit = 2e-3 if dtype == torch.float16 else 1.6e-2
        assert (found.double() - whole.attend(q, k, v)).abs().max() < limit


def test_keys_loaded_before_and_other_value_sizes():
    cache = CooperativeCache(1, gpu_bytes=80 * PER_KEY, device="cpu", block_keys=8)
    whole = Whole()
    k, v = random(1, HK, 200, D, seed=1), random(1, HK, 200, 24, seed=2)
    cache.append(0, k, v)
    whole.append(k, v)
    q = random(1, H, 2, D, seed=3)
    k, v = random(1, HK, 2, D, seed=4), random(1, HK, 2, 24, seed=5)
    found = cache.attend(0, q, k, v, scale=0.2)
    torch.testing.assert_close(found.double(), whole.attend(q, k, v, scale=0.2))
    assert cache.keys(0)[1] > 100


def test_the_first_layers_can_be_kept_whole():
    cache = compare(
        [90, 1], capacity=60, layers=3, placement="first", expected_keys=100, stream=0.0
    )
    assert cache.keys(0) == (91, 0)
    assert cache.keys(2)[1] > 60


def test_memory_is_free_as_soon_as_the_cache_is_gone():
    gc.collect()
    gc.disable()
    try:
        cache = compare([50, 30, 1], capacity=20, stream=0.5)
        buffers = [weakref.ref(state.k) for state in cache._layers if state is not None]
        assert len(buffers) == 2
        del cache
        assert all(buffer() is None for buffer in buffers), "held by a cycle of references"
    finally:
        gc.enable()


class TestHost:
    """Attention of a few queries on the CPU, compiled and in torch."""

    @pytest.mark.parametrize("native", NATIVE)
    @pytest.mark.parametrize(
        ("h", "n", "d", "dtype"),
        [
            (8, 1, 64, torch.float32),
            (2, 3, 80, torch.bfloat16),
            (14, 1, 128, torch.bfloat16),
            (6, 2, 16, torch.float16),
        ],
    )
    def test_equals_reference(self, h: int, n: int, d: int, dtype: torch.dtype, native: bool):
        q = random(2, h, n, d, seed=1).to(dtype)
        k, v = (random(2, 2, 700, d, seed=seed).to(dtype) for seed in (2, 3))
        k[:, :, 500] *= 40  # one key far above the others, so that the maximum moves
        cuts = [0, 1, 17, 300, 700]
        blocks = [
            KeyBlock(k[:, :, a:b].clone(), v[:, :, a:b].clone())
            for a, b in itertools.pairwise(cuts)
        ]
        decoder = HostDecoder(2, native=native)
        out, lse = decoder.start(q, blocks).result()
        expected = attention(
            q.double(), k.double(), v.double(), return_lse=True, backend="reference"
        )
        torch.testing.assert_close(out.double(), expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse.double(), expected[1], rtol=1e-6, atol=1e-6)
        decoder.close()

    @pytest.mark.skipif(_compiler() is None, reason="needs a C++ compiler, as c++ or CXX")
    @pytest.mark.parametrize("march", ["x86-64", "x86-64-v3"])
    def test_lesser_cpus(self, march: str):
        """The same on 16 and 32 byte vectors, where this CPU is an x86-64 that has them."""
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
        if platform.machine() != "x86_64" or (march != "x86-64" and " avx2 " not in flags):
            pytest.skip(f"needs a CPU that runs {march}")
        q = random(1, 6, 1, 32).bfloat16()
        k, v = (random(1, 1, 900, 32, seed=seed).bfloat16() for seed in (1, 2))
        out, _ = HostDecoder(1, native=True, march=march).start(q, [KeyBlock(k, v)]).result()
        expected = attention(q.double(), k.double(), v.double(), backend="reference")
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("native", NATIVE)
    def test_long_blocks_are_several_tasks(self, native: bool):
        q, k = random(1, 2, 1, 16), random(1, 1, 9001, 16, seed=1)
        v = random(1, 1, 9001, 16, seed=2)
        out, lse = HostDecoder(3, native=native).start(q, [KeyBlock(k, v)]).result()
        expected = attention(
            q.double(), k.double(), v.double(), return_lse=True, backend="reference"
        )
        torch.testing.assert_close(out.double(), expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse.double(), expected[1], rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("native", NATIVE)
    def test_very_unequal_scores(self, native: bool):
        q, k = random(1, 1, 1, 32) * 100, random(1, 1, 600, 32, seed=1)
        blocks = [KeyBlock(k[:, :, :300].contiguous(), k[:, :, :300].contiguous())]
        blocks.append(KeyBlock(k[:, :, 300:].contiguous(), k[:, :, 300:].contiguous()))
        out, _ = HostDecoder(1, native=native).start(q, blocks).result()
        expected = attention(q.double(), k.double(), k.double(), backend="reference")
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"gpu_bytes": 0}, "gpu_bytes is 0; it must be 1 or more"),
            ({"block_keys": -1}, "block_keys is -1"),
            ({"stream": 1.5}, r"stream is 1.5; give a share in \[0, 1\]"),
            ({"placement": "last"}, "placement is 'last'"),
            ({"placement": "first"}, "needs expected_keys"),
        ],
    )
    def test_making_one(self, options: dict[str, Any], message: str):
        arguments: dict[str, Any] = {"gpu_bytes": 1 << 20, "device": "cpu", **options}
        with pytest.raises(ValueError, match=message):
            CooperativeCache(2, **arguments)

    def test_memory_that_is_too_small_says_how_much_is_needed(self):
        cache = CooperativeCache(2, gpu_bytes=1000, device="cpu", block_keys=8, staging_blocks=2)
        q, k, v = step(1, 1, 0, "cpu")
        needed = (2 * 8 + 2 * 16) * PER_KEY
        with pytest.raises(ValueError, match=f"gpu_bytes is 1,000; .* take {needed:,}: raise it"):
            cache.attend(0, q, k, v)

    def test_calls(self):
        cache = CooperativeCache(2, gpu_bytes=1 << 20, device="cpu", block_keys=8)
        q, k, v = step(1, 3, 0, "cpu")
        cache.attend(0, q, k, v)
        with pytest.raises(ValueError, match=r"layer is 2; the cache has layers 0\.\.1"):
            cache.attend(2, q, k, v)
        with pytest.raises(ValueError, match="q has 3 positions and k has 2; every new query"):
            cache.attend(0, q, k[:, :, :2], v[:, :, :2])
        with pytest.raises(ValueError, match=r"layer 0 holds .*\(1, 2, 32, 32, torch.float32\)"):
            cache.append(0, k.half(), v.half())
        with pytest.raises(ValueError, match="3 axes"):
            cache.append(0, k[0], v[0])
        with pytest.raises(ValueError, match="k is on meta and the cache on cpu; move it"):
            cache.append(0, k.to("meta"), v.to("meta"))
