"""Every rule on the arguments of `attention`, with what to do when one is broken.

The rules on values (lengths in range) are checked where that is free: on CPU tensors. On a GPU they
would wait for the device; POLYZOO_CHECK=1 asks for them there too.
"""

from __future__ import annotations

import os
from itertools import pairwise

import torch
from torch import Tensor

from polyzoo.attention.types import CuSeqlens, DecomposedBias

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_COPY_LIMIT = 1 << 20
_LENGTH_DTYPES = (torch.int32, torch.int64)


def bad_shapes(q: Tensor, k: Tensor, v: Tensor) -> Exception:
    """Say which axis of q, k and v disagrees."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            return TypeError(f"{name} is a {type(tensor).__name__}; give a torch tensor")
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            return ValueError(
                f"{name} has {tensor.dim()} axes, not 4 (batch, heads, length, channels): {shapes}"
            )
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        rule = "the batch (axis 0) disagrees"
    elif k.shape[2] != v.shape[2]:
        rule = "keys and values differ in length (axis 2)"
    elif q.shape[3] != k.shape[3]:
        rule = "queries and keys differ in channels (axis 3)"
    elif q.shape[3] == 0:
        rule = "there are no channels (axis 3)"
    elif k.shape[1] != v.shape[1]:
        rule = "keys and values differ in heads (axis 1)"
    else:
        rule = (
            f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads (axis 1): "
            "every key head serves the same number of query heads"
        )
    return ValueError(f"{rule}: {shapes}")


def bad_dtypes(q: Tensor, k: Tensor, v: Tensor) -> Exception:
    """Say how the dtypes of q, k and v break the rule."""
    dtypes = f"q {q.dtype}, k {k.dtype}, v {v.dtype}"
    autocast = "on" if torch.is_autocast_enabled(q.device.type) else "off"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype not in FLOATS:
            return TypeError(
                f"{name} is {tensor.dtype}; attention takes float16, bfloat16, float32 or float64: "
                f"cast it with .to(...) ({dtypes}; autocast is {autocast})"
            )
    return TypeError(
        f"q, k and v differ in dtype: {dtypes} (autocast is {autocast}); "
        "cast them to one dtype, or run under torch.autocast"
    )


def bad_devices(q: Tensor, other: Tensor, name: str) -> ValueError:
    """Say that an argument lives elsewhere."""
    return ValueError(
        f"{name} is on {other.device} and q on {q.device}; move it with .to({str(q.device)!r})"
    )


def dense_channels(tensor: Tensor, name: str) -> Tensor:
    """Return the tensor with neighbouring channels, copying only what is small."""
    size = tensor.numel() * tensor.element_size()
    if size > _COPY_LIMIT:
        raise ValueError(
            f"{name} has stride {tensor.stride(-1)} along its channels (shape "
            f"{tuple(tensor.shape)}, strides {tensor.stride()}); channels must be neighbours. "
            f"Call {name}.contiguous() first: {size:,} bytes are not copied silently"
        )
    return tensor.contiguous()


def band(causal: bool, window: tuple[int, int] | None) -> tuple[int, int]:
    """Turn causal and window into the reach before and after a query; -1 is unbounded."""
    if window is None:
        return -1, 0 if causal else -1
    if len(window) != 2 or any(side < -1 for side in window):
        raise ValueError(
            f"window is {window!r}; give (left, right), keys before and after the query: "
            "0 or more, or -1 for all"
        )
    left, right = window
    if causal and right > 0:
        raise ValueError(
            f"causal=True with window={window!r} sees {right} keys ahead; "
            f"use window=({left}, 0) or causal=False"
        )
    return left, 0 if causal else right


def broadcastable(tensor: Tensor, name: str, q: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Return the mask or bias with four axes, each 1 or full."""
    if tensor.device != q.device:
        raise bad_devices(q, tensor, name)
    given = tuple(tensor.shape)
    if len(given) < 4:
        tensor = tensor[(None,) * (4 - len(given))]
    if tensor.dim() != 4 or any(
        have not in (1, full) for have, full in zip(tensor.shape, shape, strict=True)
    ):
        raise ValueError(f"{name} of shape {given} does not broadcast to (b, h, n, m) = {shape}")
    return tensor


def check_mask(mask: Tensor, q: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Check a boolean mask."""
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask is {mask.dtype}; it must be bool, True where a query attends. "
            "Use bias= for numbers added to the scores"
        )
    return broadcastable(mask, "mask", q, shape)


def check_bias(
    bias: Tensor | DecomposedBias, q: Tensor, shape: tuple[int, int, int, int]
) -> Tensor | DecomposedBias:
    """Check a dense or decomposed bias."""
    if not isinstance(bias, DecomposedBias):
        if not bias.dtype.is_floating_point:
            raise TypeError(
                f"bias is {bias.dtype}; it must be floating. "
                "Use mask= for a boolean mask (True attends)"
            )
        return broadcastable(bias, "bias", q, shape)
    rows, columns = bias.rel_h, bias.rel_w
    for part, name in ((rows, "bias.rel_h"), (columns, "bias.rel_w")):
        if part.device != q.device:
            raise bad_devices(q, part, name)
        if not part.dtype.is_floating_point:
            raise TypeError(f"{name} is {part.dtype}; it must be floating")
    b, h, n, m = shape
    if (
        rows.shape[:-1] != (b, h, n)
        or columns.shape[:-1] != (b, h, n)
        or rows.shape[-1] * columns.shape[-1] != m
    ):
        raise ValueError(
            f"DecomposedBias has rel_h {tuple(rows.shape)} and rel_w {tuple(columns.shape)}; "
            f"they must be (b, h, n, kh) and (b, h, n, kw) with kh * kw = m, "
            f"for (b, h, n, m) = {shape}"
        )
    return bias


def check_kv_lens(kv_lens: Tensor, q: Tensor, m: int) -> None:
    """Check the number of valid keys per batch item."""
    b = q.shape[0]
    if kv_lens.shape != (b,) or kv_lens.dtype not in _LENGTH_DTYPES:
        raise ValueError(
            f"kv_lens is {kv_lens.dtype} of shape {tuple(kv_lens.shape)}; "
            f"it must be int32 or int64 of shape ({b},), one length per batch item"
        )
    if kv_lens.device != q.device:
        raise bad_devices(q, kv_lens, "kv_lens")
    if not _values_are_free(kv_lens):
        return
    for index, length in enumerate(kv_lens.tolist()):
        if not 0 <= length <= m:
            raise ValueError(f"kv_lens[{index}] is {length}; it must be in 0..{m}, the keys given")


def check_cu_seqlens(
    lengths: CuSeqlens, q: Tensor, k: Tensor, others: dict[str, object | None]
) -> None:
    """Check the description of a packed batch; its values once per object."""
    if q.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens needs a batch of 1, the sequences one after another along the length; "
            f"q has shape {tuple(q.shape)}"
        )
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise ValueError(
            f"cu_seqlens cannot be combined with {' and '.join(given)}: sequences are already "
            "separated; use causal or window, or a padded batch"
        )
    for name, table in (("q", lengths.q), ("k", lengths.k)):
        if table.dim() != 1 or table.shape[0] < 1 or table.dtype not in _LENGTH_DTYPES:
            raise ValueError(
                f"cu_seqlens.{name} is {table.dtype} of shape {tuple(table.shape)}; it must be "
                "int32 or int64 of shape (sequences + 1,)"
            )
        if table.device != q.device:
            raise bad_devices(q, table, f"cu_seqlens.{name}")
    if lengths.q.shape != lengths.k.shape:
        raise ValueError(
            f"cu_seqlens.q has {lengths.q.shape[0] - 1} sequences and cu_seqlens.k has "
            f"{lengths.k.shape[0] - 1}; they must be as many"
        )
    if not _values_are_free(lengths.q):
        return
    for name, starts, longest, total in zip(
        ("q", "k"),
        lengths.starts(),
        (lengths.max_q, lengths.max_k),
        (q.shape[2], k.shape[2]),
        strict=True,
    ):
        if starts[-1] != total:
            raise ValueError(
                f"cu_seqlens.{name}[{len(starts) - 1}] is {starts[-1]}; the last entry must be "
                f"{total}, the length of {name}"
            )
        if not lengths.is_checked():
            _check_starts(name, starts, longest)
    lengths.mark_checked()


def _check_starts(name: str, starts: list[int], longest: int) -> None:
    if starts[0] != 0:
        raise ValueError(f"cu_seqlens.{name}[0] is {starts[0]}; it must be 0")
    for index, (start, end) in enumerate(pairwise(starts)):
        if end < start:
            raise ValueError(
                f"cu_seqlens.{name}[{index + 1}] is {end}, below the {start} before it; "
                "the entries must not decrease"
            )
        if end - start > longest:
            raise ValueError(
                f"cu_seqlens.max_{name} is {longest}, but sequence {index} "
                f"(cu_seqlens.{name}[{index}:{index + 2}]) has {end - start}; "
                "give the longest, or use CuSeqlens.from_lengths"
            )


def _values_are_free(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("POLYZOO_CHECK") == "1"
