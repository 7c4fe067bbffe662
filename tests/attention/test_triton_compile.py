"""Shipped tile sizes compile for GPUs that are not here: tensor cores used, registers suffice."""

from __future__ import annotations

import importlib.util
import os

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs triton, and kernels that are compiled instead of interpreted",
)

# One per kernel and GPU generation, the widest head dimensions of the zoo among them.
SHIPPED = (
    "forward|72||4096|4096",
    "forward|64|lens|512|512",
    "forward|80|grid16|256|256",
    "forward|128|causal|4096|4096",
    "backward_kv|88||512|512",
    "backward_kv|64|lens|512|512",
    "backward_q|72||4096|4096",
    "backward_q|80|grid16|256|256",
)


def test_every_measured_size_keeps_the_rule_of_eight_warps():
    """With fewer than 128 rows of the products, eight warps read outside shared memory."""
    from polyzoo.attention.kernels.tuned_h100 import BY_HEAD, H100

    sizes = list(H100.items())
    sizes += [(kind, size) for kind, rows in BY_HEAD.items() for _, size in rows]
    for key, (block_m, block_n, warps, stages, tma) in sizes:
        rows = block_n if key.startswith("backward_kv") else block_m
        assert warps == 4 or (warps == 8 and rows == 128), key
        assert 2 <= stages <= 4, key
        assert not tma or key.startswith("forward"), key


@pytest.mark.parametrize("key", SHIPPED)
def test_sm_90(key: str):
    from polyzoo.attention.kernels.tuned_h100 import H100
    from support.triton_compile import compile_case

    found = compile_case(key, H100[key], capability=90)
    assert found.instructions["HGMMA"] > 0 or found.instructions["HMMA"] > 0
    assert found.spilled == 0
    assert found.shared <= 227 * 1024


@pytest.mark.parametrize("key", ["forward|72||1024|1024", "backward_q|72||1024|1024"])
def test_sm_80(key: str):
    from support.triton_compile import compile_case

    sizes = (64, 64, 4, 2, False) if key.startswith("forward") else (64, 32, 4, 2, False)
    found = compile_case(key, sizes, capability=80)
    assert found.instructions["HMMA"] > 0
    assert found.spilled == 0
    assert found.shared <= 100 * 1024
