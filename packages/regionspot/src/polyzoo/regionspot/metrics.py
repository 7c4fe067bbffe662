"""How often names are right, and average precision by the libraries of COCO and LVIS."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from polyzoo.core.errors import DataError
from polyzoo.core.lazy import import_extra


@dataclass(frozen=True)
class TopK:
    """Share of boxes whose name comes first, and among the first five."""

    boxes: int
    top1: float
    top5: float


def top_k(scores: Tensor, labels: Tensor) -> TopK:
    """Rank each box's own name among all; a tie counts against it.

    Args:
        scores: `(n, c)`.
        labels: int64 `(n,)`.
    """
    if not len(labels):
        raise DataError("no boxes to measure")
    own = scores.gather(1, labels[:, None])
    better = (scores >= own).sum(1) - 1
    return TopK(
        boxes=len(labels),
        top1=float((better < 1).float().mean()),
        top5=float((better < 5).float().mean()),
    )


def average_precision(
    annotations: Path,
    results: Sequence[dict[str, Any]],
    *,
    protocol: Literal["coco", "lvis"],
    kind: Literal["bbox", "segm"],
    image_ids: Sequence[int],
) -> dict[str, float]:
    """Compute AP.

    Args:
        annotations: The file with the truth.
        results: COCO result rows.
        protocol: Whose rules.
        kind: Boxes or masks.
        image_ids: Images that were evaluated.

    Raises:
        MissingExtraError: pycocotools or lvis is not installed.
    """
    if not results:
        raise DataError("no detections to measure")
    # Both libraries report on stdout, which belongs to the command's result.
    with contextlib.redirect_stdout(io.StringIO()):
        if protocol == "coco":
            return _coco(annotations, results, kind, image_ids)
        return _lvis(annotations, results, kind, image_ids)


def _coco(
    annotations: Path, results: Sequence[dict[str, Any]], kind: str, image_ids: Sequence[int]
) -> dict[str, float]:
    import_extra("pycocotools", install="polyzoo-regionspot[eval]")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth: Any = COCO(str(annotations))
    truth.dataset.setdefault("info", {})
    run: Any = COCOeval(truth, truth.loadRes(list(results)), kind)  # pyright: ignore[reportArgumentType]
    run.params.imgIds = list(image_ids)
    run.evaluate()
    run.accumulate()
    run.summarize()
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    return {name: float(value) for name, value in zip(names, run.stats[:6], strict=True)}


@contextlib.contextmanager
def _old_numpy_names() -> Iterator[None]:
    """Lend NumPy the name `float`, which lvis 0.5.3 still uses and NumPy has not had since 1.24."""
    missing = "float" not in vars(np)
    if missing:
        setattr(np, "float", float)  # noqa: B010 - the type checker knows there is no such name
    try:
        yield
    finally:
        if missing:
            delattr(np, "float")


def _lvis(
    annotations: Path, results: Sequence[dict[str, Any]], kind: str, image_ids: Sequence[int]
) -> dict[str, float]:
    lvis = import_extra("lvis", install="polyzoo-regionspot[eval]")
    with tempfile.TemporaryDirectory() as folder, _old_numpy_names():
        path = Path(folder) / "results.json"
        path.write_text(json.dumps(list(results)))
        run = lvis.LVISEval(str(annotations), str(path), kind)
        run.params.img_ids = list(image_ids)
        run.run()
    return {name: float(value) for name, value in run.get_results().items()}
