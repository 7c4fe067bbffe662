"""Attention written out in float64 over the whole score matrix: the oracle of the kernel tests."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from polyzoo.attention.kernels.problem import Problem

PARITY = Path(__file__).parents[1] / "parity" / "attention"
GRADIENTS = ("q", "k", "v", "bias", "rel_h", "rel_w")


def parity_names() -> list[str]:
    """Names of the stored cases."""
    return list(json.loads((PARITY / "manifest.json").read_text()))


def parity_case(name: str, dtype: torch.dtype, device: str) -> tuple[Problem, dict[str, Tensor]]:
    """One stored case: the call in `dtype`, and every stored tensor as stored."""
    facts = json.loads((PARITY / "manifest.json").read_text())[name]
    with np.load(PARITY / f"{name}.npz") as stored:
        tensors = {key: torch.from_numpy(stored[key]).to(device) for key in stored.files}
    left, right = facts["window"] or (-1, -1)
    floats = {key: tensors[key].to(dtype) for key in ("q", "k", "v", *GRADIENTS) if key in tensors}
    cu_q, cu_k = tensors.get("cu_seqlens_q"), tensors.get("cu_seqlens_k")
    problem = Problem(
        **floats,
        scale=facts["scale"],
        left=left,
        right=0 if facts["causal"] else right,
        kv_lens=tensors.get("kv_lens"),
        mask=tensors.get("mask"),
        cu_q=cu_q,
        cu_k=cu_k,
        max_q=0 if cu_q is None else int((cu_q[1:] - cu_q[:-1]).max()),
        max_k=0 if cu_k is None else int((cu_k[1:] - cu_k[:-1]).max()),
        dropout=facts["dropout_p"] or 0.0,
        rng=torch.tensor([facts["dropout_seed"], 0], device=device) if facts["dropout_p"] else None,
    )
    return problem, tensors


def visible(problem: Problem) -> Tensor:
    """Which key each query sees, bool `(b, 1 or h, n, m)`."""
    n, m = problem.queries, problem.keys
    device = problem.q.device
    lengths = torch.full((problem.batch,), m, device=device)
    if problem.kv_lens is not None:
        lengths = problem.kv_lens.to(torch.int64).clamp(0, m)
    i = torch.arange(n, device=device)[None, None, :, None]
    j = torch.arange(m, device=device)[None, None, None, :]
    length = lengths[:, None, None, None]
    position = i + length - n
    seen = (j < length) & (position > -1 << 40)
    if problem.right >= 0:
        seen = seen & (j <= position + problem.right)
    if problem.left >= 0:
        seen = seen & (j >= position - problem.left)
    return seen if problem.mask is None else seen & problem.mask


def keep_mask(problem: Problem, sequence: int | None = None) -> Tensor:
    """What dropout keeps, from philox4x32-10 written out in numpy."""
    assert problem.rng is not None
    seed, offset = (int(value) for value in problem.rng.tolist())
    b, h, n, m = problem.batch, problem.heads, problem.queries, problem.keys
    outer = np.arange(b * h) if sequence is None else sequence * h + np.arange(h)
    word = [
        np.broadcast_to(part, (len(outer), n, m)).astype(np.uint64)
        for part in (
            np.arange(m)[None, None, :],
            np.arange(n)[None, :, None],
            outer[:, None, None],
            np.full((1, 1, 1), offset & 0xFFFFFFFF),
        )
    ]
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        first = word[0] * np.uint64(0xD2511F53)
        second = word[2] * np.uint64(0xCD9E8D57)
        word = [
            (second >> shift) ^ word[1] ^ np.uint64(low),
            second & mask,
            (first >> shift) ^ word[3] ^ np.uint64(high),
            first & mask,
        ]
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    kept = word[0].astype(np.float64) * 2.0**-32 >= problem.dropout
    return torch.from_numpy(kept).reshape(b, h, n, m).to(problem.q.device)


def dense(problem: Problem, sequence: int | None = None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in the dtype of the inputs, differentiable by autograd."""
    if problem.cu_q is not None and problem.cu_k is not None:
        return _packed(problem, problem.cu_q.tolist(), problem.cu_k.tolist(), dense)
    group = problem.group
    k, v = (t.repeat_interleave(group, dim=1) for t in (problem.k, problem.v))
    scores = problem.scale * (problem.q @ k.transpose(-1, -2))
    if problem.bias is not None:
        scores = scores + problem.bias
    if problem.rel_h is not None and problem.rel_w is not None:
        scores = scores + (problem.rel_h[..., :, None] + problem.rel_w[..., None, :]).flatten(-2)
    seen = visible(problem).expand(scores.shape)
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = (
        torch.logsumexp(scores, dim=-1)
        if problem.keys
        else scores.new_full(scores.shape[:-1], -torch.inf)
    )
    shift = torch.where(lse == -torch.inf, torch.zeros_like(lse), lse).detach()
    weights = torch.exp(scores - shift[..., None])
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, torch.ones_like(total), total)
    if problem.dropout:
        kept = keep_mask(problem, sequence)
        weights = torch.where(kept, weights / (1 - problem.dropout), torch.zeros_like(weights))
    return weights @ v, lse


def _packed(problem: Problem, cu_q: list[int], cu_k: list[int], attend) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for index in range(len(cu_q) - 1):
        part = replace(
            problem,
            q=problem.q[:, :, cu_q[index] : cu_q[index + 1]],
            k=problem.k[:, :, cu_k[index] : cu_k[index + 1]],
            v=problem.v[:, :, cu_k[index] : cu_k[index + 1]],
            cu_q=None,
            cu_k=None,
        )
        out, lse = attend(part, sequence=index)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def exact(problem: Problem, dout: Tensor) -> dict[str, Tensor]:
    """`o`, `lse` and the gradient of every float input as `d<name>`, in float64."""
    return _differentiate(problem, dout, torch.float64, dense)


def torch_math(problem: Problem, dout: Tensor) -> dict[str, Tensor]:
    """The same by torch's math attention in the dtype of the inputs, without dropout."""

    def run(call: Problem, sequence: int | None = None) -> tuple[Tensor, Tensor]:
        if call.cu_q is not None and call.cu_k is not None:
            return _packed(call, call.cu_q.tolist(), call.cu_k.tolist(), run)
        group = call.group
        k, v = (t.repeat_interleave(group, dim=1) for t in (call.k, call.v))
        seen = visible(call)
        added = torch.zeros_like(seen, dtype=call.q.dtype).masked_fill(~seen, -torch.inf)
        if call.bias is not None:
            added = added + call.bias
        if call.rel_h is not None and call.rel_w is not None:
            added = added + (call.rel_h[..., :, None] + call.rel_w[..., None, :]).flatten(-2)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out = torch.nn.functional.scaled_dot_product_attention(
                call.q, k, v, attn_mask=added, scale=call.scale
            )
        return out, out.new_zeros(out.shape[:-1])

    return _differentiate(problem, dout, problem.q.dtype, run)


def _differentiate(problem, dout, dtype, function) -> dict[str, Tensor]:
    names = [name for name in GRADIENTS if getattr(problem, name) is not None]
    leaves = {name: getattr(problem, name).detach().to(dtype).requires_grad_() for name in names}
    out, lse = function(replace(problem, **leaves))
    out.backward(dout.to(dtype))
    found = {"o": out.detach(), "lse": lse.detach()}
    for name, leaf in leaves.items():
        found[f"d{name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return found
