"""Run the Triton kernels in Triton's interpreter and print what they computed as JSON.

A process of its own: TRITON_INTERPRET must be set before the kernels are imported, and other tests
compile them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from torch import Tensor

from polyzoo.attention import int8, triton
from polyzoo.attention.kernels import launch_decode, launch_int8, launch_short
from polyzoo.attention.kernels.launch import forward
from polyzoo.attention.kernels.launch_backward import backward
from polyzoo.attention.kernels.mask_tiles import classify_mask, mask_tiles
from polyzoo.attention.kernels.problem import Problem, heads_last
from polyzoo.attention.kernels.schedules import packed_schedule
from polyzoo.attention.types import Call
from support.attention_oracle import (
    exact,
    keep_mask,
    parity_case,
    parity_names,
    torch_math,
    visible,
)

IN_HALF = (
    "bias_t5_d64", "cross_kvlens_dead_d72", "dropout_d64", "huge_logits_d64", "relpos_sam_d80",
    "varlen_causal_gqa_d64", "window_causal_d80",
)  # fmt: skip
"""Cases that run in fp16 too: every kind of term of the scores, once."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}  # bf16 is wrong in the interpreter


def largest(found: Tensor, wanted: Tensor) -> float:
    """Largest difference; NaN anywhere is NaN."""
    if found.numel() == 0:
        return 0.0
    return (found.double() - wanted.double()).abs().max().item()


def run(problem: Problem, dout: Tensor, parts: int | None = None) -> dict[str, Tensor]:
    """Forward and every gradient."""
    low = None
    if problem.q.dtype != torch.float32:
        low = heads_last(problem.q, problem.v.shape[-1])
    out, lse = forward(problem, low=low)
    grads = backward(problem, out, lse, dout, low=low, parts=parts)
    found = {"o": out, "lse": lse}
    for name in ("q", "k", "v", "bias", "rel_h", "rel_w"):
        gradient = getattr(grads, name)
        if gradient is not None:
            found[f"d{name}"] = gradient
    return found


def stored() -> dict[str, object]:
    """Errors on the stored cases beside those of torch's math attention."""
    report: dict[str, object] = {}
    for kind, dtype in DTYPES.items():
        for name in parity_names() if kind == "fp32" else IN_HALF:
            problem, wanted = parity_case(name, dtype, "cpu")
            dout = wanted["do"].to(dtype)
            found = run(problem, dout, parts=1 if kind == "fp32" else 2)
            lse = found.pop("lse")
            seen = torch.isfinite(wanted["lse"])
            row: dict[str, object] = {
                "errors": {key: largest(value, wanted[key]) for key, value in found.items()},
                "lse": largest(lse[seen], wanted["lse"][seen]),
                "dead_rows_agree": torch.equal(torch.isneginf(lse), ~seen),
            }
            if not problem.dropout:
                peer = torch_math(problem, dout)
                row["math"] = {key: largest(peer[key], wanted[key]) for key in found}
            report[f"{name}-{kind}"] = row
    return report


def decoding() -> dict[str, object]:
    """Splitting the keys gives the stored results, whatever the number of slices."""
    report: dict[str, object] = {}
    names = ("decode_gqa_kvlens_d128", "mask_dead_rows_d64", "bias_t5_d64", "window_sym_d64")
    for name in names:
        problem, wanted = parity_case(name, torch.float32, "cpu")
        for splits in (1, 3):
            out, lse = launch_decode.decode(problem, splits=splits)
            seen = torch.isfinite(wanted["lse"])
            report[f"{name}-{splits}"] = {
                "o": largest(out, wanted["o"]),
                "lse": largest(lse[seen], wanted["lse"][seen]),
                "dead_rows_agree": torch.equal(torch.isneginf(lse), ~seen),
            }
    return report


def few_keys() -> dict[str, object]:
    """The kernel for few keys gives the stored results."""
    report: dict[str, object] = {}
    for name in ("cross_kvlens_dead_d72", "gqa_full_d80", "dv_ne_d"):
        problem, wanted = parity_case(name, torch.float16, "cpu")
        low = heads_last(problem.q, problem.v.shape[-1])
        out, _ = launch_short.forward(problem, low=low, waves=2)
        report[name] = {
            "o": largest(out, wanted["o"]),
            "with_low": largest(out.double() + low.double(), wanted["o"]),
        }
    return report


def small_grids() -> dict[str, object]:
    """Relative position as a matrix product, with rows and entries of -inf and padded keys."""
    report: dict[str, object] = {}
    torch.manual_seed(4)
    for kh, kw in ((14, 14), (3, 7)):
        m = kh * kw
        q, k, v = (torch.randn(1, 2, m, 24, dtype=torch.float16) for _ in range(3))
        rel_h, rel_w = (torch.randn(1, 2, m, side, dtype=torch.float16) for side in (kh, kw))
        rel_h[0, 0, 3] = -torch.inf  # a row that sees nothing
        rel_w[0, 1, 5, 2:] = -torch.inf
        lens = torch.tensor([m - 5])
        problem = Problem(q=q, k=k, v=v, scale=0.2, rel_h=rel_h, rel_w=rel_w, kv_lens=lens)
        low = heads_last(q, 24)
        out, lse = forward(problem, low=low)
        wanted = exact(problem, torch.zeros_like(out))
        seen = torch.isfinite(wanted["lse"])
        report[f"grid-{kh}-{kw}"] = {
            "o": largest(out, wanted["o"]),
            "with_low": largest(out.double() + low.double(), wanted["o"]),
            "lse": largest(lse[seen], wanted["lse"][seen]),
            "dead_rows_agree": torch.equal(torch.isneginf(lse), ~seen),
        }
    return report


def in_int8() -> dict[str, object]:
    """int8 products beside exact ones: direction, largest error, log-sum-exp, dead rows."""
    torch.manual_seed(6)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float16)

    q, k, v = drawn(1, 2, 40, 72), drawn(1, 2, 150, 72) + 3, drawn(1, 2, 150, 72)
    grouped = [drawn(2, heads, 40, 64) for heads in (4, 2, 2)]
    cases = {
        "shifted keys": Problem(q=q, k=k, v=v, scale=72**-0.5),
        "causal, lengths, groups": Problem(
            **dict(zip(("q", "k", "v"), grouped, strict=True)),
            scale=0.125,
            right=0,
            kv_lens=torch.tensor([40, 0]),
        ),
    }
    report: dict[str, object] = {}
    for name, problem in cases.items():
        out, lse = launch_int8.forward(problem)
        wanted = exact(problem, torch.zeros_like(out))
        seen = torch.isfinite(wanted["lse"])
        a, b = out.double().flatten(), wanted["o"].flatten()
        report[name] = {
            "cosine": (torch.dot(a, b) / (a.norm() * b.norm())).item(),
            "o": largest(out, wanted["o"]),
            "lse": largest(lse[seen], wanted["lse"][seen]),
            "dead_rows_agree": torch.equal(torch.isneginf(lse), ~seen),
        }
    checks = torch.library.opcheck(
        int8.attention_int8, (q, k, v, None, 0.1, -1), test_utils="test_faketensor"
    )
    report["operator"] = sorted(set(checks.values()))
    return report


def compiled() -> dict[str, object]:
    """torch.compile beside eager code."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 18, 16, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 1, 18, 18, requires_grad=True)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        out, _ = triton.forward(
            Call(q, k, v, -1, 0, None, None, None, bias, 0.25, 0.0, None, True, True)
        )
        return out

    leaves = (q, k, v, bias)
    eager = torch.autograd.grad(attend(*leaves).sum(), leaves)
    made = torch.compile(attend, fullgraph=True, backend="aot_eager")
    again = torch.autograd.grad(made(*leaves).sum(), leaves)
    return {"equals_eager": all(map(torch.equal, eager, again))}


def only_what_is_wanted() -> dict[str, object]:
    """Frozen keys and values get no gradient; a second derivative raises; lse has none."""
    q = torch.randn(1, 1, 17, 16, requires_grad=True)
    k = torch.randn(1, 1, 17, 16)
    call = Call(q, k, k, -1, -1, None, None, None, None, 0.25, 0.0, None, True, True)
    out, lse = triton.forward(call)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    try:
        first.sum().backward()
        second = "no error"
    except RuntimeError as error:
        second = str(error)
    return {"second": second, "lse_requires_grad": lse.requires_grad, "k_grad": k.grad is None}


def mask_summaries() -> dict[str, object]:
    """Tile states and lists against a count of the mask, and a list that follows a change."""
    torch.manual_seed(1)
    mask = torch.rand(2, 1, 40, 70) < 0.5
    mask[:, :, :16, :32], mask[:, :, 16:32, 16:48] = True, False
    state = classify_mask(mask, n=40, m=70, block_m=16, block_n=16)
    padded = torch.nn.functional.pad(mask.to(torch.int32), (0, 10, 0, 8))
    counts = padded.unfold(2, 16, 16).unfold(3, 16, 16).sum((-1, -2))
    wanted = torch.where(counts == 0, 0, torch.where(counts == 256, 1, 2))
    lists = mask_tiles(mask, n=40, m=70, block_m=16, block_n=16)
    again = mask_tiles(mask, n=40, m=70, block_m=16, block_n=16)
    mask[:] = True
    changed = mask_tiles(mask, n=40, m=70, block_m=16, block_n=16)
    transposed = mask_tiles(mask, n=40, m=70, block_m=16, block_n=16, by_key=True)
    return {
        "states": torch.equal(state.to(torch.int64), wanted),
        "full_counts": torch.equal(lists.counts[..., 0].long(), (wanted == 1).sum(-1)),
        "kept": again is lists,
        "dropped_on_change": changed is not lists and int(changed.counts[0, 0, 0, 0]) == 4,
        "by_key": list(transposed.counts.shape),
    }


def schedules() -> dict[str, object]:
    """Every tile of every packed sequence is visited once."""
    lengths = [0, 5, 16, 33, 0, 1]
    cu = torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32)
    rows = packed_schedule(cu, total=sum(lengths), block=16).tolist()
    wanted = [[s, t] for s, length in enumerate(lengths) for t in range(-(-length // 16))]
    return {"found": [row for row in rows if row[0] >= 0], "wanted": wanted}


def leaks() -> dict[str, object]:
    """inf and NaN behind masks stay there, forward and backward."""
    torch.manual_seed(2)
    q, k, v = (torch.randn(1, 1, 40, 16) for _ in range(3))
    k[:, :, 20:], v[:, :, 20:] = torch.nan, torch.inf
    short = Problem(q=q, k=k[:, :, :20], v=v[:, :, :20], scale=0.25)
    dout = torch.randn(1, 1, 40, 16)
    wanted = run(short, dout)
    report: dict[str, object] = {}
    for name, rule in {
        "kv_lens": {"kv_lens": torch.tensor([20])},
        "mask": {"mask": (torch.arange(40) < 20)[None, None, None]},
    }.items():
        found = run(Problem(q=q, k=k, v=v, scale=0.25, **rule), dout)
        report[name] = {
            "o": largest(found["o"], wanted["o"]),
            "dq": largest(found["dq"], wanted["dq"]),
            "dk": largest(found["dk"][:, :, :20], wanted["dk"]),
            "dead": float(found["dk"][:, :, 20:].abs().max() + found["dv"][:, :, 20:].abs().max()),
        }
    return report


def properties() -> dict[str, object]:
    """Identities that hold bit for bit, and random rules against float64."""
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, 2, 33, 24) for _ in range(3))
    whole = run(Problem(q=q, k=k, v=v, scale=0.2, right=0), q)
    again = run(Problem(q=q, k=k, v=v, scale=0.2, right=0), q)
    alone = run(Problem(q=q[1:], k=k[1:], v=v[1:], scale=0.2, right=0), q[1:])
    later = k.clone()
    later[:, :, 20:] += 1
    prefix, _ = forward(Problem(q=q, k=later, v=v, scale=0.2, right=0))
    report: dict[str, object] = {
        "repeats": all(torch.equal(whole[key], again[key]) for key in whole),
        "batch_items_apart": all(torch.equal(whole[key][1:], alone[key]) for key in whole),
        "causal_prefix": torch.equal(prefix[:, :, :20], whole["o"][:, :, :20]),
    }
    odd = torch.nn.functional.pad(torch.randn(1, 3, 21, 40), (0, 1))[..., :40]
    for name, problem in {
        "odd_strides": Problem(q=odd, k=odd, v=odd, scale=-0.3, left=5, right=2),
        "mask_and_lengths": Problem(
            q=q,
            k=k,
            v=v,
            scale=0.2,
            kv_lens=torch.tensor([33, 0]),
            mask=torch.rand(1, 2, 33, 33) < 0.3,
            left=9,
        ),
        "bias_per_key": Problem(q=q, k=k, v=v, scale=0.2, bias=torch.randn(1, 2, 1, 33)),
        "bias_per_query": Problem(q=q, k=k, v=v, scale=0.2, bias=torch.randn(2, 1, 33, 1)),
        "huge_negative_bias": Problem(
            q=q, k=k, v=v, scale=0.2, bias=torch.full((1, 1, 1, 33), torch.finfo(q.dtype).min)
        ),
        "grid": Problem(
            q=q,
            k=k,
            v=v,
            scale=0.2,
            right=4,
            rel_h=torch.randn(2, 2, 33, 3),
            rel_w=torch.randn(2, 2, 33, 11),
        ),
    }.items():
        dout = torch.randn(*problem.q.shape[:3], problem.v.shape[3])
        wanted, found = exact(problem, dout), run(problem, dout)
        skipped = {"lse"} | ({"dq", "dk"} if name.startswith("huge") else set())
        errors = [largest(found[key], wanted[key]) for key in found if key not in skipped]
        report[name] = errors[:1] if name.startswith("huge") else errors
    return report


def dropout_words() -> dict[str, object]:
    """The known answer of philox, and the same mask as an independent version."""
    problem = Problem(
        q=torch.zeros(2, 3, 17, 16),
        k=torch.zeros(2, 3, 19, 16),
        v=torch.eye(19)[None, None].expand(2, 3, 19, 19)[..., :16].contiguous(),
        scale=1.0,
        dropout=0.4,
        rng=torch.tensor([-(2**40) + 12345, 7]),
    )
    out, _ = forward(problem)
    kept = keep_mask(problem)[..., :16]
    first = keep_mask(
        Problem(
            q=torch.zeros(1, 1, 1, 8),
            k=torch.zeros(1, 1, 1, 8),
            v=torch.zeros(1, 1, 1, 8),
            scale=1.0,
            dropout=0x6627E8D5 / 2**32,
            rng=torch.tensor([0, 0]),
        )
    )
    return {
        "same": torch.equal(out > 0, kept & visible(problem)[..., :16]),
        "scaled": largest(out[kept], torch.full_like(out[kept], 1 / 19 / 0.6)),
        "known_answer_is_the_threshold": bool(first.item()),
    }


PARTS: tuple[Callable[[], dict[str, object]], ...] = (
    stored,
    decoding,
    few_keys,
    small_grids,
    in_int8,
    compiled,
    only_what_is_wanted,
    mask_summaries,
    schedules,
    leaks,
    properties,
    dropout_words,
)

if __name__ == "__main__":
    np.seterr(all="ignore")  # exponentials of rows that are thrown away overflow
    sys.stdout.write(json.dumps({part.__name__: part() for part in PARTS}))
