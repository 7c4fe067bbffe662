"""The backend on torch_npu's fused operator: Ascend NPUs. A thin mapping, nothing of our own.

It has not run on an NPU: the mapping below follows the operator's documentation, and the tests
compare it with an independent reading of that documentation.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyzoo.attention.masks import effective_band, length_mask, visible_keys
from polyzoo.attention.types import Call, DecomposedBias

HEAD_DIM_LIMIT = 512
FEATURES = frozenset(
    {"causal", "window", "kv_lens", "varlen", "mask", "bias", "gqa", "dv_ne_d", "backward", "lse"}
)
"""Dropout is not among them: the operator draws numbers of its own, so backends would disagree."""
_CHANNELS = 16
_TRIANGLE = 2048
_ALL = 2147483647
_GIVEN_MASK, _CAUSAL, _BAND = 1, 3, 4


@cache
def unavailable() -> str | None:
    """Say why there is no NPU to use, or return None."""
    if importlib.util.find_spec("torch_npu") is None:
        return (
            "torch_npu is not installed; on an Ascend machine install it for your torch "
            "(pip install torch_npu) beside CANN"
        )
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError) as error:
        return f"torch_npu cannot be loaded ({error}); source CANN's set_env.sh first"
    if not torch.get_device_module("npu").is_available():
        return "torch_npu finds no NPU; look at npu-smi info"
    return None


def serves_head(d: int) -> bool:
    """Tell whether the operator takes a head size, once padded."""
    return d <= HEAD_DIM_LIMIT


@dataclass(frozen=True)
class Mapped:
    """A call in the operator's terms."""

    arguments: dict[str, Any]
    """Of `torch_npu.npu_fusion_attention`."""
    value_dim: int
    """Channels of the result that are no padding."""
    alive: Tensor | None
    """bool, broadcastable to `(b, h, n)`: queries that see a key; the others' results are made
    zero, since the operator promises nothing for them. None: all do."""


def mapped(call: Call) -> Mapped:
    """Put a call in the operator's terms; pure, and runs anywhere.

    Dense batches go as BSND, packed ones as TND (their lengths are read on the host). Channels are
    padded with zeros to a multiple of 16, the same for keys and values. A band without lengths or
    mask is described (sparse modes 3 and 4 with the fixed triangle of 2048); anything else becomes
    one mask, in which True drops a key.

    Raises:
        ValueError: A combination that the operator has no form for.
    """
    q, k, v = call.q, call.k, call.v
    n, m = q.shape[2], k.shape[2]
    size = -(-max(q.shape[3], v.shape[3]) // _CHANNELS) * _CHANNELS
    arguments: dict[str, Any] = {
        "head_num": q.shape[1],
        "scale": call.scale,
        "keep_prob": 1.0,
        "pre_tockens": _ALL,
        "next_tockens": _ALL,
        "sparse_mode": 0,
    }
    if call.cu_seqlens is not None:
        starts_q, starts_k = call.cu_seqlens.starts()
        arguments |= {
            "input_layout": "TND",
            "actual_seq_qlen": starts_q[1:],
            "actual_seq_kvlen": starts_k[1:],
            **{
                name: _padded(tensor[0].transpose(0, 1), size)
                for name, tensor in (("query", q), ("key", k), ("value", v))
            },
        }
        _describe_band(arguments, call.left, call.right, q.device)
        return Mapped(arguments, v.shape[3], _alive_packed(call))
    if call.kv_lens is not None:  # padding may hold anything, and 0 * inf is NaN
        padding = ~length_mask(call.kv_lens, m).transpose(2, 3)
        k, v = k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)
    arguments |= {
        "input_layout": "BSND",
        **{
            name: _padded(tensor.transpose(1, 2), size)
            for name, tensor in (("query", q), ("key", k), ("value", v))
        },
    }
    left, right = effective_band(n, m, call.left, call.right)
    alive = None
    if call.kv_lens is None and call.mask is None:
        _describe_band(arguments, left, right, q.device)
        if right >= 0 and n > m + right:  # the first queries stand before the first key
            alive = torch.arange(n, device=q.device) + (m - n + right) >= 0
    else:
        visible = visible_keys(
            n,
            m,
            left=call.left,
            right=call.right,
            kv_lens=call.kv_lens,
            mask=call.mask,
            device=q.device,
        )
        assert visible is not None  # noqa: S101 - there is a mask or there are lengths
        visible = visible.broadcast_to(*_mask_shape(visible, q, m))
        seen = visible.any(dim=-1)
        alive = seen
        arguments["atten_mask"] = ~(visible | ~seen.unsqueeze(-1))
        arguments["sparse_mode"] = _GIVEN_MASK
    if call.bias is not None:
        if isinstance(call.bias, DecomposedBias):
            raise ValueError("the NPU's operator has no decomposed bias; use backend='reference'")
        shape = (call.bias.shape[0], q.shape[1], n, m)
        # The operator multiplies the sum of products and bias by the scale.
        arguments["pse"] = (call.bias / call.scale).to(q.dtype).broadcast_to(shape).contiguous()
    return Mapped(arguments, v.shape[3], alive)


def forward(call: Call) -> tuple[Tensor, Tensor | None]:
    """Attend through torch_npu; differentiable."""
    b, h, n = call.q.shape[:3]
    if 0 in (b, h, n, call.k.shape[2]):
        zero = torch.stack([tensor[..., :0].sum() for tensor in (call.q, call.k, call.v)]).sum()
        out = zero.expand(b, n, h, call.v.shape[3]).contiguous().transpose(1, 2)
        return out, torch.full((b, h, n), -torch.inf, dtype=torch.float32, device=out.device)
    problem = mapped(call)
    torch_npu: Any = importlib.import_module("torch_npu")
    out, top, total, *_ = torch_npu.npu_fusion_attention(**problem.arguments)
    packed = call.cu_seqlens is not None
    return finished(problem, out, top, total, packed=packed)


def finished(
    problem: Mapped, out: Tensor, top: Tensor, total: Tensor, *, packed: bool
) -> tuple[Tensor, Tensor]:
    """Turn the operator's results into ours.

    Args:
        problem: What it was called with.
        out: BSND or TND.
        top: Largest scores, `(b, h, n, 8)` or `(T, h, 8)`, eight equal copies.
        total: Sums of exponentials, likewise.
        packed: TND.

    Returns:
        `(b, h, n, dv)` and the lse `(b, h, n)`.
    """
    out = out[..., : problem.value_dim]
    lse = (top[..., 0] + total[..., 0].log()).detach()
    if packed:
        out, lse = out.unsqueeze(0), lse.transpose(0, 1).unsqueeze(0)
    out = out.transpose(1, 2)
    if problem.alive is not None:
        out = torch.where(problem.alive.unsqueeze(-1), out, 0.0)
        lse = lse.masked_fill(~problem.alive, -torch.inf)
    return out, lse


def _describe_band(arguments: dict[str, Any], left: int, right: int, device: torch.device) -> None:
    if left < 0 and right < 0:
        return
    ones = torch.ones(_TRIANGLE, _TRIANGLE, dtype=torch.bool, device=device)
    arguments["atten_mask"] = ones.triu(1)
    if left < 0 and right == 0:
        arguments["sparse_mode"] = _CAUSAL
        return
    arguments["sparse_mode"] = _BAND
    arguments["pre_tockens"] = _ALL if left < 0 else left
    arguments["next_tockens"] = _ALL if right < 0 else right


def _mask_shape(visible: Tensor, q: Tensor, m: int) -> tuple[int, int, int, int]:
    """Return a shape that the operator takes: one mask, one per item, or one per head too."""
    shape = (1,) * (4 - visible.dim()) + tuple(visible.shape)
    items = q.shape[0] if shape[0] != 1 or shape[1] != 1 else 1
    return items, q.shape[1] if shape[1] != 1 else 1, q.shape[2], m


def _alive_packed(call: Call) -> Tensor:
    """Tell which packed queries see a key of their sequence, `(1, 1, T)`."""
    assert call.cu_seqlens is not None  # noqa: S101 - our caller's promise
    starts_q, starts_k = call.cu_seqlens.q, call.cu_seqlens.k
    tokens = torch.arange(call.q.shape[2], device=call.q.device, dtype=starts_q.dtype)
    sequence = torch.searchsorted(starts_q[1:].contiguous(), tokens, right=True)
    lengths_q, lengths_k = starts_q.diff()[sequence], starts_k.diff()[sequence]
    at = tokens - starts_q[sequence] + lengths_k - lengths_q
    first = torch.zeros_like(at) if call.left < 0 else (at - call.left).clamp(min=0)
    last = lengths_k - 1 if call.right < 0 else torch.minimum(at + call.right, lengths_k - 1)
    return (first <= last)[None, None]


def _padded(tensor: Tensor, size: int) -> Tensor:
    return F.pad(tensor, (0, size - tensor.shape[-1])).contiguous()
