"""RegionSpotPipeline: an image, boxes and names in; labelled regions out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from polyzoo.core.device import resolve_device, resolve_dtype
from polyzoo.core.errors import DataError
from polyzoo.core.log import get_logger
from polyzoo.regionspot.boxes import check_boxes
from polyzoo.regionspot.config import BoxFormat, OnInvalid
from polyzoo.regionspot.engine import Engine, View
from polyzoo.regionspot.inputs import MAX_PIXELS, read_image
from polyzoo.regionspot.names import check_names
from polyzoo.regionspot.results import RegionResult
from polyzoo.regionspot.rle import Rle
from polyzoo.regionspot.text import TextClassifier

_log = get_logger(__name__)
Labels = str | Sequence[str] | TextClassifier


class Session:
    """One image that was looked at once: ask about other boxes and names at little cost.

    Example:
        >>> session = pipeline.open("street.jpg")
        >>> session.predict(names=["car", "tree"], boxes=[[10, 20, 300, 200]]).labels
        ['car']
    """

    def __init__(self, pipeline: RegionSpotPipeline, view: View, mirrored: View | None) -> None:
        self.pipeline, self.view, self.mirrored = pipeline, view, mirrored

    @property
    def image(self) -> Image.Image:
        """The upright image that boxes refer to."""
        return self.view.image

    def predict(
        self,
        *,
        names: Labels,
        boxes: Any = None,
        points: Any = None,
        point_labels: Any = None,
        auto: bool = False,
        box_format: BoxFormat = "xyxy",
        on_invalid: OnInvalid = "error",
        masks: bool = True,
        limit: int = 50,
        negative_names: Sequence[str] = (),
        min_similarity: float | None = None,
        independent: bool = False,
    ) -> RegionResult:
        """Name regions; see `RegionSpotPipeline.__call__`."""
        prompt = self._prompt(
            boxes, points, point_labels, auto, box_format=box_format, on_invalid=on_invalid,
            limit=limit,
        )  # fmt: skip
        classifier, shown = self.pipeline._vocabulary(names, negative_names)
        embeddings = self.pipeline.engine.embed(
            [self.view], [prompt.boxes], independent=independent
        )
        return self._finish(
            prompt, embeddings[0], classifier, shown, masks=masks, min_similarity=min_similarity,
            independent=independent,
        )  # fmt: skip

    def embed(self, boxes: Any, *, box_format: BoxFormat = "xyxy") -> Tensor:
        """Return unit `(k, t)` embeddings of boxes, for search and clustering."""
        checked = check_boxes(
            boxes, width=self.image.width, height=self.image.height, box_format=box_format
        )
        return self.pipeline.engine.embed([self.view], [checked.boxes])[0]

    def _prompt(
        self,
        boxes: Any,
        points: Any,
        point_labels: Any,
        auto: bool,
        *,
        box_format: BoxFormat,
        on_invalid: OnInvalid,
        limit: int,
    ) -> _Prompt:
        given = [name for name, x in (("boxes", boxes), ("points", points)) if x is not None]
        given += ["auto"] if auto else []
        if len(given) != 1:
            what = "none was given" if not given else f"{' and '.join(given)} were given"
            raise DataError(f"say where to look by one of boxes, points or auto=True; {what}")
        if auto:
            found = self.view.propose(limit=limit)
            rows = torch.arange(len(found.boxes))
            return _Prompt(found.boxes.float().cpu(), rows, found.scores.cpu())
        if points is not None:
            return _Prompt(self._boxes_at(points, point_labels), None, None)
        checked = check_boxes(
            boxes, width=self.image.width, height=self.image.height, box_format=box_format,
            on_invalid=on_invalid,
        )  # fmt: skip
        return _Prompt(checked.boxes, checked.rows, None)

    def _boxes_at(self, points: Any, labels: Any) -> Tensor:
        values = torch.as_tensor(points, dtype=torch.float32)
        if values.ndim == 2:
            values = values[:, None]
        if values.ndim != 3 or values.shape[-1] != 2:
            raise DataError(
                f"points have shape {tuple(values.shape)}; give (k, 2), or (k, p, 2) for p points "
                "on each region"
            )
        kinds = torch.ones(values.shape[:2], dtype=torch.long)
        if labels is not None:
            kinds = torch.as_tensor(labels, dtype=torch.long).reshape(values.shape[:2])
        size = values.new_tensor(self.image.size)
        outside = ((values < 0) | (values >= size)).any(-1).any(-1)
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            raise DataError(
                f"points[{row}] is {values[row].tolist()}, outside the {self.image.width} x "
                f"{self.image.height} image"
            )
        return self.view.boxes_at(values, kinds).float().cpu()

    def _finish(
        self,
        prompt: _Prompt,
        embeddings: Tensor,
        classifier: TextClassifier,
        shown: int,
        *,
        masks: bool,
        min_similarity: float | None,
        independent: bool,
    ) -> RegionResult:
        engine = self.pipeline.engine
        similarity = embeddings @ classifier.vectors.T
        if self.mirrored is not None and len(prompt.boxes):
            flipped = engine.embed(
                [self.mirrored], [_mirror(prompt.boxes, self.image.width)], independent=independent
            )[0]
            similarity = (similarity + flipped @ classifier.vectors.T) / 2
        logits = classifier.logits(similarity)
        rejected = torch.zeros(len(logits), dtype=torch.bool)
        if len(logits):
            if shown < logits.shape[1]:
                rejected |= logits.argmax(1) >= shown
            if min_similarity is not None:
                rejected |= similarity[:, :shown].amax(1) < min_similarity
        outlines: tuple[Rle, ...] | None = self.view.masks(prompt.boxes) if masks else None
        rows = torch.arange(len(prompt.boxes)) if prompt.rows is None else prompt.rows
        return RegionResult(
            width=self.image.width,
            height=self.image.height,
            names=classifier.names[:shown],
            boxes=prompt.boxes,
            rows=rows,
            logits=logits[:, :shown],
            scores=_scores(logits, shown),
            similarity=similarity[:, :shown],
            embeddings=embeddings,
            masks=outlines,
            proposal_scores=prompt.scores,
            rejected=rejected,
            made_by=engine.describe(),
        )


class _Prompt:
    """Where to look, once it is known."""

    def __init__(self, boxes: Tensor, rows: Tensor | None, scores: Tensor | None) -> None:
        self.boxes, self.rows, self.scores = boxes, rows, scores


class RegionSpotPipeline:
    """Names regions of images.

    Example:
        >>> pipeline = RegionSpotPipeline.from_pretrained()
        >>> result = pipeline("street.jpg", names=["car", "tree", "dog"], auto=True)
        >>> result.labels
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = "embedded",
        *,
        device: str = "auto",
        dtype: str | torch.dtype | None = None,
        sam_weights: str | Path | None = None,
        clip_weights: str | Path | None = None,
        local_files_only: bool = False,
    ) -> RegionSpotPipeline:
        """Load a model.

        Args:
            name_or_path: "embedded" (in this package), "minilm" (the same with the sentence encoder
                itself as its text side, an asset: any word, and better names), a folder written by
                training or by `polyzoo regionspot convert`, or a hub id.
            device: auto, cpu, cuda, ...
            dtype: Of SAM, CLIP and the module; bfloat16 on a GPU where not given. The embedded
                model always computes in float32.
            sam_weights: SAM's safetensors, for a model on SAM and CLIP.
            clip_weights: CLIP's safetensors, likewise.
            local_files_only: Never use the network.

        Raises:
            WeightsError: A file is missing, or belongs to other towers.
        """
        from polyzoo.regionspot.folders import load_engine

        target = resolve_device(device)
        return cls(
            load_engine(
                name_or_path,
                device=target,
                dtype=resolve_dtype(dtype, target),
                sam_weights=sam_weights,
                clip_weights=clip_weights,
                local_files_only=local_files_only,
            )
        )

    def classifier(self, names: Labels) -> TextClassifier:
        """Turn names into class vectors, to be used for many images.

        Raises:
            DataError: No names, an empty one, or one the text side cannot read.
        """
        return self._vocabulary(names, ())[0]

    def _vocabulary(
        self, names: Labels, negative_names: Sequence[str]
    ) -> tuple[TextClassifier, int]:
        """Class vectors of names and then of negative names, and how many are names."""
        if isinstance(names, TextClassifier):
            if negative_names:
                raise DataError("negative_names need names as text, not a TextClassifier")
            return names, len(names.names)
        checked = check_names(names)
        extra = [name for name in negative_names if name not in checked]
        if len(checked) == 1 and not extra:
            _log.warning(
                "one name: a softmax over it is always 1, so the score is a sigmoid; add names "
                "that it could be confused with for a better one"
            )
        return self.engine.classifier([*checked, *extra]), len(checked)

    def open(self, image: Any, *, max_pixels: int = MAX_PIXELS, flip: bool = False) -> Session:
        """Look at an image once and return a session for it.

        Args:
            image: See `read_image`.
            max_pixels: Width times height allowed.
            flip: Also look at the mirrored image, and average.
        """
        picture = read_image(image, max_pixels=max_pixels)
        view = self.engine.open([picture])[0]
        mirrored = self.engine.open([_flip(picture)])[0] if flip else None
        return Session(self, view, mirrored)

    def __call__(
        self,
        images: Any,
        *,
        names: Labels,
        boxes: Any = None,
        points: Any = None,
        point_labels: Any = None,
        auto: bool = False,
        box_format: BoxFormat = "xyxy",
        on_invalid: OnInvalid = "error",
        masks: bool = True,
        limit: int = 50,
        negative_names: Sequence[str] = (),
        min_similarity: float | None = None,
        independent: bool = False,
        flip: bool = False,
        batch_size: int = 4,
        max_pixels: int = MAX_PIXELS,
    ) -> Any:
        """Name the regions of one image, or of several in their order.

        Args:
            images: One image (see `read_image`), or a list of them.
            names: Texts, one text with commas, or a ready TextClassifier.
            boxes: `(k, 4)` for one image; a list of such for several.
            points: `(k, 2)` or `(k, p, 2)` pixels, likewise.
            point_labels: 1 inside, 0 outside, for each point.
            auto: Find regions automatically.
            box_format: xyxy, xywh or xyxyn.
            on_invalid: "error", or "drop" boxes that are empty or outside; `rows` of the result
                tells which stayed.
            masks: Whether each region is outlined.
            limit: Most regions found automatically.
            negative_names: Further names; a region that is rather one of them is `rejected`.
            min_similarity: A region whose best cosine is lower is `rejected`.
            independent: Embed each box as if it were alone.
            flip: Average with the mirrored image.
            batch_size: Images in the towers at a time.
            max_pixels: Width times height allowed.

        Returns:
            A `RegionResult`, or a list of them where a list was given.

        Raises:
            DataError: Says which input is wrong, and what to pass instead.
        """
        several = isinstance(images, list | tuple)
        given = list(images) if several else [images]
        prompts = {"boxes": boxes, "points": points, "point_labels": point_labels}
        each = {
            name: _per_image(value, len(given), name) if several else [value]
            for name, value in prompts.items()
        }
        classifier, shown = self._vocabulary(names, negative_names)
        results: list[RegionResult] = []
        for start in range(0, len(given), max(1, batch_size)):
            part = range(start, min(len(given), start + max(1, batch_size)))
            pictures = [read_image(given[i], max_pixels=max_pixels) for i in part]
            views = self.engine.open(pictures)
            mirrored = (
                self.engine.open([_flip(p) for p in pictures]) if flip else [None] * len(part)
            )
            sessions = [Session(self, v, m) for v, m in zip(views, mirrored, strict=True)]
            asked = [
                session._prompt(
                    each["boxes"][i], each["points"][i], each["point_labels"][i], auto,
                    box_format=box_format, on_invalid=on_invalid, limit=limit,
                )
                for session, i in zip(sessions, part, strict=True)
            ]  # fmt: skip
            embeddings = self.engine.embed(
                views, [prompt.boxes for prompt in asked], independent=independent
            )
            for session, prompt, found in zip(sessions, asked, embeddings, strict=True):
                results.append(
                    session._finish(
                        prompt,
                        found,
                        classifier,
                        shown,
                        masks=masks,
                        min_similarity=min_similarity,
                        independent=independent,
                    )
                )
        return results if several else results[0]


def _per_image(value: Any, count: int, name: str) -> list[Any]:
    if value is None:
        return [None] * count
    if len(value) != count:
        raise DataError(f"{name} has {len(value)} entries for {count} images; give one per image")
    return list(value)


def _scores(logits: Tensor, shown: int) -> Tensor:
    if logits.shape[1] == 1:
        return logits.sigmoid()
    return logits.softmax(-1)[:, :shown]


def _flip(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _mirror(boxes: Tensor, width: int) -> Tensor:
    return torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
