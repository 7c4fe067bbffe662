"""Boxes from people and files: checked, explained where wrong, clipped to the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyzoo.core.errors import DataError
from polyzoo.core.log import get_logger
from polyzoo.regionspot.config import BoxFormat, OnInvalid

_log = get_logger(__name__)
_SHOWN = 5
MANY = 2000


@dataclass(frozen=True)
class CheckedBoxes:
    """Boxes that lie in the image."""

    boxes: Tensor
    """float32 `(k, 4)` corners in pixels."""
    rows: Tensor
    """int64 `(k,)`: which of the given boxes each one is."""


def check_boxes(
    boxes: Any,
    *,
    width: int,
    height: int,
    box_format: BoxFormat = "xyxy",
    on_invalid: OnInvalid = "error",
) -> CheckedBoxes:
    """Return corners in pixels, inside the image.

    Args:
        boxes: `(k, 4)` tensor, array or lists.
        width: Of the upright image.
        height: Of the upright image.
        box_format: xyxy corners, xywh corner and sides, xyxyn corners as shares of the image.
        on_invalid: What happens to boxes that are empty or entirely outside.

    Raises:
        DataError: Says what is wrong with which rows, and what to pass instead.
    """
    values = _as_tensor(boxes)
    given = values
    if box_format == "xyxyn":
        if bool((values.abs() > 1.5).any()):
            raise DataError(
                f"boxes hold {float(values.abs().max()):g}, but box_format='xyxyn' means shares "
                "from 0 to 1; pass box_format='xyxy' for pixels"
            )
        values = values * values.new_tensor([width, height, width, height])
    elif box_format == "xywh":
        values = torch.cat([values[:, :2], values[:, :2] + values[:, 2:]], 1)
    elif box_format != "xyxy":
        raise DataError(f"box_format={box_format!r}; there are xyxy, xywh and xyxyn")
    elif len(values) and bool(((values >= 0) & (values <= 1)).all()):
        raise DataError(
            "all values of boxes lie between 0 and 1: pixels are expected; if they are shares of "
            "the image, pass box_format='xyxyn'"
        )
    empty = (values[:, 2] <= values[:, 0]) | (values[:, 3] <= values[:, 1])
    if bool(empty.any()) and on_invalid == "error":
        raise _empty_boxes(given, empty, width, height, box_format)
    limit = values.new_tensor([width, height, width, height])
    outside = (
        (values[:, 0] >= width) | (values[:, 1] >= height)
        | (values[:, 2] <= 0) | (values[:, 3] <= 0)
    ) & ~empty  # fmt: skip
    if bool(outside.any()) and on_invalid == "error":
        raise DataError(
            f"boxes lie entirely outside the {width} x {height} image: {_rows(given, outside)}; "
            "are they of another image or size? on_invalid='drop' leaves them out"
        )
    kept = ~(empty | outside)
    inside = torch.minimum(values.clamp(min=0), limit)
    cut = int(((inside != values).any(1) & kept).sum())
    if cut:
        _log.warning("%d boxes reach beyond the image and are clipped", cut)
    if len(values) > MANY:
        _log.warning(
            "%d boxes at once: boxes of an image see each other, so this needs about %d MB for "
            "self-attention alone",
            len(values), len(values) ** 2 * 8 * 4 // 2**20,
        )  # fmt: skip
    return CheckedBoxes(inside[kept], kept.nonzero().flatten())


def _as_tensor(boxes: Any) -> Tensor:
    try:
        values = torch.as_tensor(boxes, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"boxes cannot be read as numbers: {error}") from error
    if values.numel() == 0:
        return values.reshape(0, 4)
    if values.ndim != 2 or values.shape[1] != 4:
        raise DataError(
            f"boxes have shape {tuple(values.shape)}; it must be (boxes, 4), one row per box"
        )
    bad = (~values.isfinite()).any(1).nonzero().flatten().tolist()
    if bad:
        raise DataError(f"boxes[{bad[0]}] is {values[bad[0]].tolist()}: not finite")
    return values


def _empty_boxes(
    given: Tensor, empty: Tensor, width: int, height: int, box_format: str
) -> DataError:
    message = f"boxes without area (x2 <= x1 or y2 <= y1): {_rows(given, empty)}"
    if box_format == "xyxy":
        ends = given[:, :2] + given[:, 2:]
        fits = (given[:, 2:] > 0).all(1) & (ends[:, 0] <= width) & (ends[:, 1] <= height)
        if float(fits.float().mean()) > 0.5:
            return DataError(f"{message}; these look like xywh; pass box_format='xywh'")
    return DataError(f"{message}; on_invalid='drop' leaves them out")


def _rows(given: Tensor, chosen: Tensor) -> str:
    places: Sequence[int] = chosen.nonzero().flatten().tolist()
    shown = ", ".join(f"[{p}] {[round(v, 1) for v in given[p].tolist()]}" for p in places[:_SHOWN])
    more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    return shown + more


def non_maximum(boxes: Tensor, scores: Tensor, *, overlap: float) -> Tensor:
    """Return the rows that stay when lower-scored boxes overlap higher ones by more than that."""
    order = scores.argsort(descending=True, stable=True)
    area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
    kept: list[int] = []
    for row in order.tolist():
        if kept:
            others = boxes[kept]
            low = torch.maximum(boxes[row, :2], others[:, :2])
            high = torch.minimum(boxes[row, 2:], others[:, 2:])
            both = (high - low).clamp(min=0).prod(1)
            if bool((both / (area[row] + area[kept] - both).clamp(min=1e-9) > overlap).any()):
                continue
        kept.append(row)
    return torch.tensor(kept, dtype=torch.long)
