"""The backends there are, and the order in which `auto` tries them: literal tables."""

from __future__ import annotations

import torch

from polyzoo.attention import cuda, int8, npu, reference, sdpa, triton
from polyzoo.attention.backend import Backend

BACKENDS = (
    Backend(
        name="triton",
        summary="our Triton kernels: split head sizes, described masks, deterministic gradients",
        forward=triton.forward,
        devices=frozenset({"cuda"}),
        min_cc=(8, 0),
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
        head_dims=triton.serves_head,
        head_dims_text=f"multiples of 8 up to {triton.HEAD_DIM_LIMIT}",
        kept_back=triton.kept_back,
        available=triton.unavailable,
    ),
    Backend(
        name="triton-int8",
        summary="int8 products of queries and keys, for inference that can bear their error",
        forward=int8.forward,
        devices=frozenset({"cuda"}),
        min_cc=(8, 0),
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        head_dims=int8.serves_head,
        head_dims_text=f"multiples of 8 up to {int8.HEAD_DIM_LIMIT}",
        features=int8.FEATURES,
        only_for=frozenset({"int8"}),
        available=triton.unavailable,
    ),
    Backend(
        name="cuda",
        summary="our CUDA C++ kernels: tensor cores of Volta and Turing, deterministic gradients",
        forward=cuda.forward,
        devices=frozenset({"cuda"}),
        min_cc=(7, 0),
        auto_max_cc=(7, 5),
        dtypes=frozenset({torch.float16}),
        head_dims=cuda.serves_head,
        head_dims_text=f"multiples of 8 up to {cuda.HEAD_DIM_LIMIT}",
        features=cuda.FEATURES,
        available=cuda.unavailable,
    ),
    Backend(
        name="sdpa",
        summary="torch's scaled_dot_product_attention and its packed kernels",
        forward=sdpa.forward,
        matrix_for=frozenset({"relpos"}),
    ),
    Backend(
        name="npu",
        summary="torch_npu's fused operator on Ascend NPUs",
        forward=npu.forward,
        devices=frozenset({"npu"}),
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
        head_dims=npu.serves_head,
        head_dims_text=f"up to {npu.HEAD_DIM_LIMIT}",
        features=npu.FEATURES,
        matrix_for=frozenset({"kv_lens", "mask", "bias"}),
        available=npu.unavailable,
    ),
    Backend(
        name="reference",
        summary="fp32/fp64 matrix of scores: slow, obviously right",
        forward=reference.forward,
        matrix_for=frozenset({"always"}),
    ),
)

AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cuda": ("triton", "triton-int8", "cuda", "sdpa", "reference"),
    "cpu": ("sdpa", "reference"),
    "npu": ("npu", "sdpa", "reference"),
}
"""What `backend="auto"` tries, by device type."""
