"""CUDA C++ kernels compile for GPUs that are not here: tensor cores used, nothing spilled."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from polyzoo.attention.kernels import nvrtc
from polyzoo.attention.kernels.cuda_program import Variant, compile_variant, target_for

pytestmark = [
    pytest.mark.skipif(
        not nvrtc.is_installed(), reason="needs NVRTC, which torch's CUDA builds bring"
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None,
        reason="needs cuobjdump, which triton's wheel brings",
    ),
]
TURING = [
    Variant("forward", 72, volta=False),
    Variant("forward", 128, volta=False, has_right=True),
    Variant("backward", 72, volta=False, has_right=True, packed=True),
]
SHARED_LIMIT = {70: 96 * 1024, 75: 64 * 1024}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYZOO_HOME", str(tmp_path))


@pytest.mark.parametrize("variant", TURING, ids=lambda v: f"{v.direction}-{v.d}")
def test_turing(variant: Variant, tmp_path: Path):
    from support.triton_compile import read_functions

    image = compile_variant(variant, target="sm_75")
    for name, found in read_functions(image).items():
        if name == "delta_kernel":
            continue
        assert found.instructions["HMMA"] >= 2 * (variant.d // 8) * 4, name
        assert found.spilled == 0, name
        assert variant.shared_bytes(name) <= SHARED_LIMIT[75]
    kept = list((tmp_path / "attention-cuda").iterdir())
    assert len(kept) == 1
    assert kept[0].read_bytes() == image
    assert compile_variant(variant, target="sm_75") == image


def test_volta_products_compile_for_newer_gpus_too():
    """sm_70 itself needs NVRTC 12.x, as torch's cu126 builds have it; PTX of sm_75 has m8n8k4."""
    variant = Variant("forward", 64, volta=True)
    text = compile_variant(variant, target="compute_75").decode(errors="replace")
    assert "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32" in text
    assert "mma.sync.aligned.m8n8k4.row.row.f32.f16.f16.f32" in text


def test_shared_memory_fits_every_head_size():
    for d in range(8, 129, 8):
        for volta, limit in ((True, SHARED_LIMIT[70]), (False, SHARED_LIMIT[75])):
            assert Variant("forward", d, volta).shared_bytes("forward_kernel") <= limit
            for kernel in ("keys_kernel", "queries_kernel"):
                assert Variant("backward", d, volta).shared_bytes(kernel) <= limit, (d, volta)


def test_targets():
    assert target_for((7, 5), volta=False) == "sm_75"
    assert target_for((7, 0), volta=True) == "sm_70"
    assert target_for((9, 0), volta=False) == "compute_75"


def test_compile_errors_show_the_log():
    with pytest.raises(nvrtc.CompileError, match="no_such_type"):
        nvrtc.compile_source("no_such_type x;", ["--gpu-architecture=sm_75"], cubin=True)
    with pytest.raises(nvrtc.CompileError, match="D"):
        compile_variant(replace(TURING[0], d=-8), target="sm_75")
