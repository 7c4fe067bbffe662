"""Stored and random attention cases, and an oracle that shares no code with the package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polyzoo.attention import CuSeqlens, DecomposedBias

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
INPUTS = ("q", "k", "v", "bias", "rel_h", "rel_w")


@dataclass(frozen=True)
class Case:
    """One stored case: what the manifest says, and its arrays."""

    name: str
    options: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def packed(self) -> bool:
        return "cu_seqlens_q" in self.arrays

    @property
    def huge(self) -> bool:
        """Scores so large that fp16 products overflow."""
        return self.name.startswith("huge_logits")

    def tensors(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """The differentiable inputs, as leaves."""
        return {
            name: torch.from_numpy(self.arrays[name]).to(device, dtype).requires_grad_()
            for name in INPUTS
            if name in self.arrays
        }

    def arguments(self, inputs: dict[str, Tensor], device: str) -> dict[str, Any]:
        """The keyword arguments of `attention`."""
        options = self.options
        window = options["window"]
        arguments: dict[str, Any] = {
            "scale": options["scale"],
            "causal": options["causal"],
            "window": None if window is None else tuple(window),
            "dropout": options["dropout_p"],
        }
        if options["dropout_p"]:
            arguments["generator"] = torch.tensor([options["dropout_seed"], 0], device=device)
        if "bias" in inputs:
            arguments["bias"] = inputs["bias"]
        if "rel_h" in inputs:
            arguments["bias"] = DecomposedBias(inputs["rel_h"], inputs["rel_w"])
        for name in ("mask", "kv_lens"):
            if name in self.arrays:
                arguments[name] = torch.from_numpy(self.arrays[name]).to(device)
        if self.packed:
            starts = [
                torch.from_numpy(self.arrays[f"cu_seqlens_{side}"]).to(device) for side in "qk"
            ]
            longest = [int(table.diff().max()) for table in starts]
            arguments["cu_seqlens"] = CuSeqlens(*starts, *longest)
        return arguments

    def visible(self) -> np.ndarray:
        """Which key each query sees, spelled out from the written rules: bool (b, h, n, m)."""
        b, h, n, _ = self.arrays["q"].shape
        m = self.arrays["k"].shape[2]
        seen = np.zeros((b, h, n, m), dtype=bool)
        for item, q0, q1, k0, k1 in self._sequences(b, n, m):
            for i in range(q1 - q0):
                for j in range(k1 - k0):
                    at = i + (k1 - k0) - (q1 - q0)
                    good = not self.options["causal"] or j <= at
                    if self.options["window"] is not None:
                        left, right = self.options["window"]
                        good &= left < 0 or j >= at - left
                        good &= right < 0 or j <= at + right
                    seen[item, :, q0 + i, k0 + j] = good
        if "mask" in self.arrays:
            seen &= self.arrays["mask"]
        return seen

    def _sequences(self, b: int, n: int, m: int) -> list[tuple[int, int, int, int, int]]:
        if self.packed:
            q, k = self.arrays["cu_seqlens_q"], self.arrays["cu_seqlens_k"]
            return [(0, q[i], q[i + 1], k[i], k[i + 1]) for i in range(len(q) - 1)]
        lengths = self.arrays.get("kv_lens", np.full(b, m))
        return [(item, 0, n, 0, int(lengths[item])) for item in range(b)]


def load_cases(folder: Path) -> list[Case]:
    """Read every case of a folder's manifest."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    cases = []
    for name, options in manifest.items():
        with np.load(folder / options["file"]) as stored:
            cases.append(Case(name, options, {key: stored[key] for key in stored.files}))
    return cases


def philox_words(
    seed: int, batch_heads: np.ndarray, n: int, m: int, positions: tuple[np.ndarray, ...]
) -> np.ndarray:
    """First words of philox4x32-10 in numpy, by the published algorithm; positions are (i, j)."""
    word = np.uint64(0xFFFFFFFF)
    c0, c1, c2 = (
        np.broadcast_to(part, (len(batch_heads), n, m)).astype(np.uint64)
        for part in (
            positions[1][None, None, :],
            positions[0][None, :, None],
            batch_heads[:, None, None],
        )
    )
    c3 = np.zeros_like(c0)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & word,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & word,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0


def math_errors(case: Case, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Largest errors of torch's own math attention in `dtype`, against the stored arrays."""
    inputs = case.tensors(dtype, device)
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    group = q.shape[1] // k.shape[1]
    seen = torch.from_numpy(case.visible()).to(device)
    additive = torch.zeros(seen.shape, dtype=dtype, device=device)
    if "bias" in inputs:
        additive = additive + inputs["bias"]
    if "rel_h" in inputs:
        additive = additive + (inputs["rel_h"][..., None] + inputs["rel_w"][..., None, :]).flatten(
            -2
        )
    additive = additive.masked_fill(~seen, -torch.inf)
    keep = None
    if case.options["dropout_p"]:
        keep = torch.from_numpy(_kept(case)).to(device)
    out = torch.ops.aten._scaled_dot_product_attention_math(
        q,
        k.repeat_interleave(group, 1),
        v.repeat_interleave(group, 1),
        attn_mask=additive,
        dropout_p=case.options["dropout_p"],
        dropout_mask=keep,
        scale=case.options["scale"],
    )[0]
    return errors(case, out, inputs)


def errors(case: Case, out: Tensor, inputs: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute error of the output and of every gradient; inf where one is not finite."""
    wanted = torch.from_numpy(case.arrays["do"]).to(out.device, out.dtype)
    out.backward(wanted)
    found = {"o": out.detach(), **{f"d{name}": leaf.grad for name, leaf in inputs.items()}}
    return {name: _error(found[name], case.arrays[name]) for name in found}


def _error(found: Tensor | None, stored: np.ndarray) -> float:
    assert found is not None
    if not torch.isfinite(found).all():
        return float("inf")
    return float(np.abs(found.double().cpu().numpy() - stored).max(initial=0.0))


def _kept(case: Case) -> np.ndarray:
    b, h, n, _ = case.arrays["q"].shape
    m = case.arrays["k"].shape[2]
    kept = np.zeros((b, h, n, m), dtype=bool)
    p = case.options["dropout_p"]
    for index, (item, q0, q1, k0, k1) in enumerate(
        case._sequences(b, n, case.arrays["k"].shape[2])
    ):
        number = index if case.packed else item
        rows, columns = q1 - q0, (k1 - k0) if case.packed else m
        words = philox_words(
            case.options["dropout_seed"],
            number * h + np.arange(h),
            rows,
            columns,
            (np.arange(rows), np.arange(columns)),
        )
        kept[item, :, q0:q1, k0 : k0 + columns] = words.astype(np.float64) * 2.0**-32 >= p
    return kept
