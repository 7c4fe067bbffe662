"""The NPU's operator: what we pass to it, read by an independent reading of its documentation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from polyzoo.attention import CuSeqlens, DecomposedBias, attention, explain
from polyzoo.attention.npu import finished, mapped, serves_head, unavailable
from polyzoo.attention.types import Call

N, M = 11, 17


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call(n: int = N, m: int = M, d: int = 24, dv: int = 24, **options: Any) -> Call:
    made = Call(
        random(2, 4, n, d),
        random(2, 2, m, d, seed=1),
        random(2, 2, m, dv, seed=2),
        -1,
        -1,
        None,
        None,
        None,
        None,
        0.3,
        0.0,
        None,
        True,
        True,
    )
    return made._replace(**options)


def as_documented(arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """What the documentation says the operator computes, one sequence and head at a time.

    softmax(scale * (q k^T + pse) with the masked scores dropped) v. Sparse mode 1: the mask as it
    is, True drops. 3: causal from the lower right corner. 4: a band from the lower right corner,
    pre_tockens to the left and next_tockens to the right; both with a fixed triangle of 2048.
    """
    packed = arguments["input_layout"] == "TND"
    q, k, v = arguments["query"], arguments["key"], arguments["value"]
    heads, mode = arguments["head_num"], arguments["sparse_mode"]
    mask = arguments.get("atten_mask")
    if mode in (3, 4):
        assert torch.equal(mask, torch.ones(2048, 2048, dtype=torch.bool).triu(1))
    ends_q, ends_k = arguments.get("actual_seq_qlen"), arguments.get("actual_seq_kvlen")
    if packed:
        spans = [
            (q[a:b], k[c:e], v[c:e])
            for a, b, c, e in zip([0, *ends_q], ends_q, [0, *ends_k], ends_k, strict=False)
        ]
    else:
        assert arguments["input_layout"] == "BSND"
        spans = list(zip(q, k, v, strict=True))
    assert q.is_contiguous()
    assert q.shape[-1] % 16 == 0
    outs, tops, totals = [], [], []
    for item, (queries, keys, values) in enumerate(spans):
        n, m = queries.shape[0], keys.shape[0]
        group = heads // keys.shape[1]
        result = torch.empty(n, heads, values.shape[-1])
        top, total = torch.empty(heads, n), torch.empty(heads, n)
        for head in range(heads):
            scores = queries[:, head] @ keys[:, head // group].T
            if "pse" in arguments:
                pse = arguments["pse"]
                scores = scores + pse[min(item, pse.shape[0] - 1), head]
            scores = arguments["scale"] * scores
            dropped = torch.zeros(n, m, dtype=torch.bool)
            if mode == 1:
                assert mask.shape[2:] == (n, m)
                dropped = mask[min(item, mask.shape[0] - 1), min(head, mask.shape[1] - 1)]
            for i in range(n):
                for j in range(m):
                    at = j - (i + m - n)
                    if mode == 3:
                        dropped[i, j] = at > 0
                    if mode == 4:
                        before, after = arguments["pre_tockens"], arguments["next_tockens"]
                        dropped[i, j] = at > after or -at > before
            scores = scores.masked_fill(dropped, -1e30)  # it promises nothing for rows of these
            if m == 0:
                result[:, head], top[head], total[head] = 7.0, 7.0, 7.0
                continue
            top[head] = scores.amax(-1)
            weights = (scores - top[head][:, None]).exp()
            total[head] = weights.sum(-1)
            result[:, head] = weights @ values[:, head // group] / total[head][:, None]
        outs.append(result)
        tops.append(top)
        totals.append(total)
    if packed:
        out, tops, totals = torch.cat(outs), [t.T for t in tops], [t.T for t in totals]
        pair = torch.cat(tops), torch.cat(totals)
    else:
        out = torch.stack(outs)
        pair = torch.stack(tops), torch.stack(totals)
    return out, *(part.unsqueeze(-1).expand(*part.shape, 8) for part in pair)


MASK = random(2, 1, N, M, seed=5) < 0.2
MASK[0, 0, 3] = False
CASES: dict[str, Call] = {
    "plain": call(),
    "head size of 16": call(d=32, dv=32),
    "72 is padded to 80": call(d=72, dv=72),
    "values narrower": call(d=40, dv=16),
    "values wider": call(d=16, dv=40),
    "causal": call(right=0),
    "causal, fewer keys": call(n=M, m=N, right=0),
    "window": call(left=3, right=2),
    "window, fewer keys": call(n=M, m=N, left=2, right=1),
    "open to the left": call(right=4),
    "open to the right": call(left=1),
    "a window that holds everything": call(left=40, right=40),
    "lengths": call(kv_lens=torch.tensor([5, 0])),
    "causal lengths": call(kv_lens=torch.tensor([17, 6]), right=0),
    "mask": call(mask=MASK),
    "mask per head": call(mask=random(1, 4, N, M, seed=6) < 0.5),
    "mask of keys": call(mask=random(1, 1, 1, M, seed=7) < 0.5, left=6, right=0),
    "bias": call(bias=random(1, 4, N, M, seed=8)),
    "bias of keys with lengths": call(
        bias=random(2, 1, 1, M, seed=9), kv_lens=torch.tensor([17, 3])
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_documented_operator_then_computes_ours(name: str):
    problem = CASES[name]
    out, lse = finished(mapped(problem), *as_documented(mapped(problem).arguments), packed=False)
    window = (problem.left, problem.right)
    expected = attention(
        problem.q,
        problem.k,
        problem.v,
        window=None if window == (-1, -1) else window,
        kv_lens=problem.kv_lens,
        mask=problem.mask,
        bias=problem.bias,
        scale=problem.scale,
        return_lse=True,
        backend="reference",
    )
    torch.testing.assert_close(out, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"right": 0}, {"left": 2, "right": 1}])
def test_packed_batches(options: dict[str, int]):
    lengths = CuSeqlens.from_lengths([3, 0, 5, 2], [4, 2, 3, 0])
    q = random(1, 4, 10, 24)
    k, v = random(1, 2, 9, 24, seed=1), random(1, 2, 9, 24, seed=2)
    problem = call()._replace(q=q, k=k, v=v, cu_seqlens=lengths, **options)
    arguments = mapped(problem).arguments
    assert arguments["actual_seq_qlen"] == [3, 3, 8, 10], "ends, without the leading 0"
    assert arguments["actual_seq_kvlen"] == [4, 6, 9, 9]
    out, lse = finished(mapped(problem), *as_documented(arguments), packed=True)
    window = (options.get("left", -1), options.get("right", -1))
    expected = attention(
        q,
        k,
        v,
        cu_seqlens=lengths,
        window=None if window == (-1, -1) else window,
        scale=0.3,
        return_lse=True,
        backend="reference",
    )
    torch.testing.assert_close(out, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, expected[1], rtol=1e-4, atol=1e-5)


def test_bands_are_described_and_not_written_out():
    long = call(n=5000, m=5000, right=0)
    arguments = mapped(long).arguments
    assert arguments["atten_mask"].shape == (2048, 2048)
    assert arguments["sparse_mode"] == 3
    band = mapped(call(n=50, m=50, left=4, right=1)).arguments
    assert (band["sparse_mode"], band["pre_tockens"], band["next_tockens"]) == (4, 4, 1)


def test_padding_may_hold_anything():
    problem = call(kv_lens=torch.tensor([5, 17]))
    problem.v[0, :, 5:] = math.nan
    problem.k[0, :, 5:] = math.inf
    out, _ = finished(mapped(problem), *as_documented(mapped(problem).arguments), packed=False)
    assert torch.isfinite(out).all()


def test_gradients_reach_the_inputs_through_the_mapping():
    problem = call(d=72, dv=72)
    leaf = problem.q.requires_grad_()
    mapped(problem).arguments["query"].square().sum().backward()
    torch.testing.assert_close(leaf.grad, 2 * leaf.detach())


def test_what_it_has_no_form_for():
    parts = random(2, 4, N, 1), random(2, 4, N, M)
    with pytest.raises(ValueError, match="no decomposed bias"):
        mapped(call(bias=DecomposedBias(*parts)))
    assert serves_head(512)
    assert not serves_head(520)


def test_without_the_library_it_says_so():
    try:
        import torch_npu  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        pass
    else:
        pytest.skip("torch_npu is installed here")
    reason = unavailable()
    assert reason is not None
    assert reason.startswith("torch_npu is not installed; on an Ascend machine install it")
    with pytest.raises(
        ValueError, match=r'backend="npu" cannot serve this call: npu: torch_npu is'
    ):
        attention(random(1, 2, 3, 16), random(1, 2, 3, 16), random(1, 2, 3, 16), backend="npu")
    choice = explain((1, 2, 3, 16), (1, 2, 3, 16), (1, 2, 3, 16))
    assert any(line.startswith("npu: ") for line in choice.reasons) is False, "not asked on a CPU"
