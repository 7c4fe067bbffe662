"""Matrices stored as int8 with one float16 scale per row: a quarter of float32, read anywhere."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from polyzoo.core.errors import WeightsError

METADATA_KEY = "polyzoo.int8_rows"
SCALE_SUFFIX = ".int8_scale"
STEPS = 127


def header_entry(names: Collection[str]) -> dict[str, str]:
    """Return what the file's header must say for `restore` to find the rows again."""
    return {METADATA_KEY: json.dumps(sorted(names))} if names else {}


def quantise(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return the int8 steps and the scales; an entry is off by at most half its row's scale."""
    if tensor.ndim < 2 or not tensor.is_floating_point():
        raise WeightsError(f"int8_rows: {name!r} must be floating point with two or more axes")
    rows = tensor.detach().float().cpu().flatten(1)
    if not rows.isfinite().all():
        raise WeightsError(f"int8_rows: {name!r} holds values that are not finite")
    # Enlarged a little, so that rounding to float16 cannot push a row's peak beyond the last step.
    peaks = rows.abs().amax(1) if rows.numel() else rows.new_zeros(len(rows))
    scales = (peaks / STEPS * (1 + 2**-10)).half()
    if not scales.isfinite().all():
        raise WeightsError(f"int8_rows: {name!r} has a row too large for a float16 scale")
    divisors = scales.float().where(scales > 0, 1.0)[:, None]
    steps = (rows / divisors).round().clamp(-STEPS, STEPS).to(torch.int8)
    return {name: steps.view(tensor.shape), name + SCALE_SUFFIX: scales}


def restore(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the tensors of a file with its int8 rows as float32 again, scales taken out.

    Raises:
        ValueError: Steps and scales do not belong together.
    """
    out = dict(tensors)
    names = json.loads(metadata.get(METADATA_KEY, "[]"))
    if not isinstance(names, list):
        raise ValueError(f"{METADATA_KEY} is not a list of names")
    for name in names:
        if not isinstance(name, str) or not {name, name + SCALE_SUFFIX} <= out.keys():
            raise ValueError(f"{METADATA_KEY} names {name!r}, which is not there with its scales")
        steps, scales = out[name], out.pop(name + SCALE_SUFFIX)
        if steps.dtype != torch.int8 or scales.shape != steps.shape[:1] or steps.ndim < 2:
            raise ValueError(f"{name!r}: {tuple(scales.shape)} scales for {tuple(steps.shape)}")
        out[name] = steps.float() * scales.float().view(-1, *[1] * (steps.ndim - 1))
    return out
