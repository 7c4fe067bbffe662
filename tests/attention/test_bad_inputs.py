"""Every broken rule raises an error that names the argument, the value, the rule and the fix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polyzoo.attention import CuSeqlens, DecomposedBias, attention, merge_states, use_backend

F32 = torch.float32


def t(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def starts(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


Q, K, V = t(2, 4, 6, 8), t(2, 2, 5, 8), t(2, 2, 5, 8)
PACKED = t(1, 2, 6, 8)


SHAPES = [
    ((t(4, 6, 8), K, V), r"q has 3 axes, not 4 .*q \(4, 6, 8\), k \(2, 2, 5, 8\)"),
    ((Q, t(2, 2, 5), V), "k has 3 axes"),
    ((Q, t(3, 2, 5, 8), V), r"batch \(axis 0\) disagrees.*k \(3, 2, 5, 8\)"),
    ((Q, K, t(2, 2, 4, 8)), r"keys and values differ in length \(axis 2\)"),
    ((Q, t(2, 2, 5, 9), V), r"queries and keys differ in channels \(axis 3\)"),
    ((Q, K, t(2, 1, 5, 8)), r"keys and values differ in heads \(axis 1\)"),
    ((Q, t(2, 3, 5, 8), t(2, 3, 5, 8)), "4 query heads are no multiple of 3 key heads"),
    ((t(2, 4, 6, 0), t(2, 4, 6, 0), V), "no channels|differ"),
]


@pytest.mark.parametrize(("tensors", "message"), SHAPES)
def test_shapes(tensors: tuple[torch.Tensor, ...], message: str):
    with pytest.raises(ValueError, match=message):
        attention(*tensors)


LENGTHS = CuSeqlens.from_lengths([2, 4])
OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"causal": True, "window": (3, 1)},
        ValueError,
        r"window=\(3, 1\) sees 1 keys ahead.*\(3, 0\)",
    ),
    ({"window": (-2, 0)}, ValueError, r"window is \(-2, 0\).*0 or more, or -1"),
    ({"window": (1, 2, 3)}, ValueError, r"give \(left, right\)"),
    ({"kv_lens": starts(5)}, ValueError, r"kv_lens is torch.int32 of shape \(1,\).*\(2,\)"),
    ({"kv_lens": t(2)}, ValueError, "kv_lens is torch.float32.*int32 or int64"),
    ({"kv_lens": starts(5, 6)}, ValueError, r"kv_lens\[1\] is 6; it must be in 0\.\.5"),
    ({"kv_lens": starts(-1, 5)}, ValueError, r"kv_lens\[0\] is -1"),
    ({"kv_lens": starts(1, 2).to("meta")}, ValueError, "kv_lens is on meta and q on cpu"),
    ({"cu_seqlens": LENGTHS}, ValueError, r"batch of 1.*q has shape \(2, 4, 6, 8\)"),
    ({"mask": t(6, 5)}, TypeError, "mask is torch.float32.*Use bias="),
    ({"bias": t(6, 5, dtype=torch.bool)}, TypeError, "bias is torch.bool.*Use mask="),
    (
        {"mask": t(6, 4, dtype=torch.bool)},
        ValueError,
        r"mask of shape \(6, 4\) does not broadcast to \(b, h, n, m\) = \(2, 4, 6, 5\)",
    ),
    ({"bias": t(3, 1, 6, 5)}, ValueError, r"bias of shape \(3, 1, 6, 5\) does not broadcast"),
    ({"bias": t(1, 1, 1, 6, 5)}, ValueError, "does not broadcast"),
    ({"mask": t(6, 5, dtype=torch.bool).to("meta")}, ValueError, "mask is on meta and q on cpu"),
    (
        {"bias": DecomposedBias(t(2, 4, 6, 2), t(2, 4, 6, 3))},
        ValueError,
        r"rel_h \(2, 4, 6, 2\) and rel_w \(2, 4, 6, 3\).*kh \* kw = m.*\(2, 4, 6, 5\)",
    ),
    (
        {"bias": DecomposedBias(t(2, 4, 6, 1, dtype=torch.int64), t(2, 4, 6, 5))},
        TypeError,
        "bias.rel_h is torch.int64",
    ),
    (
        {"bias": DecomposedBias(t(2, 4, 6, 1), t(2, 4, 6, 5).to("meta"))},
        ValueError,
        "bias.rel_w is on meta",
    ),
    ({"dropout": 1.0}, ValueError, r"dropout is 1.0; it is a probability in \[0, 1\)"),
    ({"dropout": -0.1}, ValueError, "dropout is -0.1"),
    (
        {"dropout": 0.1, "generator": t(2)},
        ValueError,
        r"generator is a torch.float32 tensor.*int64 \(seed, offset\)",
    ),
    ({"precision": "int4"}, ValueError, '"exact", "int8" or "fp8"'),
    ({"precision": "int8"}, ValueError, 'sdpa: has no int8 .use precision="exact".*reference'),
    ({"precision": "fp8", "backend": "sdpa"}, ValueError, 'backend="sdpa" cannot .* no fp8'),
    (
        {"backend": "flash"},
        ValueError,
        "backend is 'flash'; backends are auto, cuda, npu, reference",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), OPTIONS)
def test_options(options: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        attention(Q, K, V, **options)


DTYPES = [
    ((Q, K.half(), V), "q torch.float32, k torch.float16.*autocast is off.*cast"),
    ((Q.long(), K.long(), V.long()), "q is torch.int64; attention takes float16"),
    ((Q.to(torch.complex64), K, V), "q is torch.complex64"),
    ((Q, K.to(torch.float8_e4m3fn), V), "k is torch.float8_e4m3fn"),
]


@pytest.mark.parametrize(("tensors", "message"), DTYPES)
def test_dtypes(tensors: tuple[torch.Tensor, ...], message: str):
    with pytest.raises(TypeError, match=message):
        attention(*tensors)


def test_what_is_no_tensor():
    with pytest.raises((TypeError, AttributeError), match="list"):
        attention([1], K, V)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="k is a list; give a torch tensor"):
        attention(Q, [1], V)  # pyright: ignore[reportArgumentType]


def test_devices():
    with pytest.raises(ValueError, match=r"k is on meta and q on cpu; move it with .to\('cpu'\)"):
        attention(Q, K.to("meta"), V)
    with pytest.raises(ValueError, match="v is on meta"):
        attention(Q, K, V.to("meta"))


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("expanded", [False, True])
def test_large_tensors_with_strided_channels(name: str, expanded: bool):
    tensors: dict[str, Any] = {part: t(1, 8, 600, 64) for part in "qkv"}
    turned = t(1, 8, 64, 600).transpose(2, 3)
    tensors[name] = t(1, 8, 600, 1).expand(1, 8, 600, 64) if expanded else turned
    with pytest.raises(ValueError, match=rf"{name} has stride .*Call {name}\.contiguous\(\) first"):
        attention(**tensors)


CU = [
    ((starts(1, 6), starts(0, 6), 6, 6), r"cu_seqlens.q\[0\] is 1; it must be 0"),
    ((starts(0, 4, 3, 6), starts(0, 2, 4, 6), 6, 6), r"cu_seqlens.q\[2\] is 3, below the 4"),
    ((starts(0, 4), starts(0, 6), 6, 6), r"cu_seqlens.q\[1\] is 4; the last entry must be 6"),
    ((starts(0, 6), starts(0, 7), 6, 7), r"cu_seqlens.k\[1\] is 7; the last entry must be 6"),
    ((starts(0, 1, 6), starts(0, 1, 6), 4, 5), "max_q is 4, but sequence 1 .* has 5"),
    ((starts(0, 1, 6), starts(0, 1, 6), 5, 4), "max_k is 4, but sequence 1 .* has 5"),
    ((starts(0, 6), starts(0, 3, 6), 6, 6), "1 sequences and cu_seqlens.k has 2"),
    ((starts(0, 6), t(2), 6, 6), r"cu_seqlens.k is torch.float32 of shape \(2,\)"),
    ((starts(), starts(), 6, 6), r"cu_seqlens.q is .* of shape \(0,\)"),
    ((starts(0, 6), starts(0, 6).to("meta"), 6, 6), "cu_seqlens.k is on meta"),
]


@pytest.mark.parametrize(("fields", "message"), CU)
def test_cu_seqlens(fields: tuple[Any, ...], message: str):
    with pytest.raises(ValueError, match=message):
        attention(PACKED, PACKED, PACKED, cu_seqlens=CuSeqlens(*fields))


@pytest.mark.parametrize(
    ("name", "value"),
    [("kv_lens", starts(6)), ("mask", t(6, 6, dtype=torch.bool)), ("bias", t(6, 6))],
)
def test_cu_seqlens_stand_alone(name: str, value: Any):
    with pytest.raises(ValueError, match=f"cu_seqlens cannot be combined with {name}"):
        attention(PACKED, PACKED, PACKED, cu_seqlens=LENGTHS, **{name: value})


def test_cu_seqlens_are_checked_against_every_batch():
    attention(PACKED, PACKED, PACKED, cu_seqlens=LENGTHS)
    longer = t(1, 2, 7, 8)
    with pytest.raises(ValueError, match="the last entry must be 7"):
        attention(longer, longer, longer, cu_seqlens=LENGTHS)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (([1, -2],), r"lengths_q\[1\] is -2"),
        (([1, 2], [1]), "2 sequences and lengths_k has 1"),
        ((t(3),), "torch.float32 tensor"),
        ((starts(1, 2)[None],), r"shape \(1, 2\)"),
    ],
)
def test_lengths(lengths: tuple[Any, ...], message: str):
    with pytest.raises(ValueError, match=message):
        CuSeqlens.from_lengths(*lengths)


def huge(n: int, m: int, *, heads: int = 1, d: int = 8) -> list[torch.Tensor]:
    """Shapes of any size that take no memory: one channel row, seen many times."""
    return [torch.zeros(1, heads, 1, d).expand(1, heads, length, d) for length in (n, m, m)]


def test_matrices_that_would_not_fit():
    q, k, v = huge(1 << 16, 1 << 14)
    with pytest.raises(ValueError, match=r"score matrix would take 4,294,967,296 bytes.*2,147"):
        attention(q, k, v, backend="reference")
    parts = [torch.zeros(1).expand(1, 1, 1 << 16, 1 << 7) for _ in range(2)]
    with pytest.raises(ValueError, match=r"DecomposedBias.* n x m bias would take 4,294,967,296"):
        attention(q, k, v, bias=DecomposedBias(*parts))
    mask = torch.ones(1, dtype=torch.bool).expand(1, 1, 1, 1 << 14)
    bias = torch.zeros(1).expand(1, 1, 1 << 16, 1)
    with pytest.raises(ValueError, match=r"mask together with bias would allocate .*-inf into"):
        attention(q, k, v, mask=mask, bias=bias)
    with pytest.raises(ValueError, match=r"causal with fewer queries .*4,294,967,296 bytes"):
        attention(*(x.requires_grad_() for x in huge(1 << 14, 1 << 16)), causal=True)


def test_packed_batches_that_would_not_fit_when_padded():
    """Under torch.compile on a CPU a packed batch is padded."""
    from polyzoo.attention.ragged import pad_packed
    from polyzoo.attention.types import Call

    tables = torch.zeros(9, dtype=torch.int32)
    lengths = CuSeqlens(tables, tables, 1 << 14, 1 << 15)
    call = Call(
        PACKED, PACKED, PACKED, -1, 0, None, lengths, None, None, 1.0, 0.0, None, False, True
    )
    with pytest.raises(ValueError, match=r"cu_seqlens with causal .* 4,294,967,296 bytes"):
        pad_packed(call)


def test_parts_that_do_not_fit():
    out, lse = t(1, 2, 3, 4), t(1, 2, 3)
    with pytest.raises(ValueError, match="0 results and 0 log-sum-exps"):
        merge_states([], [])
    with pytest.raises(ValueError, match=r"part 1 has a result of shape \(1, 2, 3, 5\)"):
        merge_states([out, t(1, 2, 3, 5)], [lse, lse])


def test_backend_names_in_context_and_environment(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"use_backend.name. is 'nope'"), use_backend("nope"):
        pass
    monkeypatch.setenv("POLYZOO_ATTENTION", "nope")
    with pytest.raises(ValueError, match="environment variable POLYZOO_ATTENTION is 'nope'"):
        attention(Q, K, V)
