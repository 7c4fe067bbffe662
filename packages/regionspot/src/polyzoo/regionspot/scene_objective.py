"""One training step of SceneSpot, and its evaluation: scenes are made where the model is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from polyzoo.core.log import progress
from polyzoo.regionspot.compose import compose
from polyzoo.regionspot.lite0 import Pyramid
from polyzoo.regionspot.presets import SceneRecipe
from polyzoo.regionspot.scene_losses import (
    borrowed_loss,
    mask_loss,
    name_loss,
    place_loss,
    places_of,
)
from polyzoo.regionspot.scene_material import RESERVED, TRAIN, SceneMaterial
from polyzoo.regionspot.scene_model import SceneSpot

_CROP = 224
_PART = 8


@dataclass(frozen=True)
class SceneObjective:
    """The loss of a step, and what it is made of."""

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class SceneBatch:
    """Scenes as the frozen tower sees them, and what is true of them."""

    pyramid: Pyramid
    boxes: Tensor
    masks: Tensor
    targets: Tensor
    """int64 `(b, k)`: rows of the taught vocabulary."""
    present: Tensor
    salient: Tensor
    """`(b, h, w)` at the fine map's size: share of each cell that belongs to a thing."""
    behind: Tensor
    """`(b, h, w)`: of it, what is the background's own."""


@dataclass(frozen=True)
class PhotoBatch:
    """Photographs without labels: random boxes, and what a classifier says about their crops."""

    pyramid: Pyramid
    boxes: Tensor
    teacher: Tensor
    """Unit `(b, k, t)`."""
    salient: Tensor
    """`(b, h, w)`."""


class SceneStep:
    """Makes scenes and photographs' crops, and compares what the model says with what is known."""

    def __init__(self, material: SceneMaterial, recipe: SceneRecipe, *, side: int) -> None:
        self.material, self.recipe, self.side = material, recipe, side
        self.chances = material.chances * (material.split == TRAIN)
        taught = material.labels[material.split == TRAIN].unique()
        self.vocabulary = material.vocabulary[taught]
        self.rows = torch.full((len(material.vocabulary),), -1, device=taught.device)
        self.rows[taught] = torch.arange(len(taught), device=taught.device)
        size = (material.backgrounds.shape[-2], material.backgrounds.shape[-1])
        salient = F.interpolate(material.saliency[:, None].float(), size, mode="bilinear")
        self.grounds = torch.cat([material.backgrounds, salient.round().to(torch.uint8)], 1)
        """Backgrounds with their saliency as a fourth channel."""

    def __call__(self, model: SceneSpot, scenes: int, generator: torch.Generator) -> SceneObjective:
        """Compute the loss of one step on new scenes.

        Args:
            model: In training mode.
            scenes: How many scenes to compose.
            generator: On the model's device.
        """
        return self.compare(
            model,
            self.scenes(model, scenes, generator),
            self.photographs(model, self.recipe.photos_per_step, generator),
            generator,
        )

    @torch.no_grad()
    def scenes(self, model: SceneSpot, count: int, generator: torch.Generator) -> SceneBatch:
        """Compose scenes and let the frozen tower look at them."""
        material = self.material
        made = compose(
            material.cutouts,
            self.grounds,
            scenes=count,
            side=self.side,
            generator=generator,
            chances=self.chances,
        )
        pyramid = model.look(made.images[:, :3])
        size = (pyramid.fine.shape[-2], pyramid.fine.shape[-1])
        pasted = (made.masks & made.present[..., None, None]).any(1)[:, None].float()
        pasted = F.adaptive_max_pool2d(pasted, size)[:, 0]
        behind = F.adaptive_avg_pool2d(made.images[:, 3:], size)[:, 0] * (1 - pasted)
        return SceneBatch(
            pyramid=pyramid,
            boxes=made.boxes,
            masks=made.masks,
            targets=self.rows[material.labels[made.cutouts]],
            present=made.present,
            salient=torch.maximum(pasted, behind),
            behind=behind,
        )

    @torch.no_grad()
    def photographs(self, model: SceneSpot, count: int, generator: torch.Generator) -> PhotoBatch:
        """Draw photographs and boxes, and ask the classifier about each box alone."""
        device = self.grounds.device
        chosen = torch.randint(len(self.grounds), (count,), device=device, generator=generator)
        images = self.grounds[chosen].float() / 255
        if images.shape[-1] != self.side:
            images = F.interpolate(images, (self.side, self.side), mode="bilinear")
        flip = torch.rand(count, device=device, generator=generator) < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        boxes = _random_boxes(count, self.recipe.boxes_per_photo, device, generator)
        pyramid = model.look(images[:, :3])
        size = (pyramid.fine.shape[-2], pyramid.fine.shape[-1])
        return PhotoBatch(
            pyramid=pyramid,
            boxes=boxes,
            teacher=_cropped_names(model, images[:, :3], boxes),
            salient=F.adaptive_avg_pool2d(images[:, 3:], size)[:, 0],
        )

    def compare(
        self,
        model: SceneSpot,
        scenes: SceneBatch,
        photos: PhotoBatch,
        generator: torch.Generator,
    ) -> SceneObjective:
        """Compute the loss of scenes and photographs."""
        recipe = self.recipe
        maps = model.read(scenes.pyramid)
        boxes = _shaken(scenes.boxes, generator)
        out = model.regions(maps, boxes, scenes.present, mask_size=28)
        named, right = name_loss(
            out.embeddings[scenes.present],
            scenes.targets[scenes.present],
            self.vocabulary,
            scale=recipe.scale,
        )
        assert out.masks is not None  # noqa: S101 - asked for above
        outlined = mask_loss(out.masks, scenes.masks, boxes, scenes.present)
        size = (maps.center.shape[-2], maps.center.shape[-1])
        placed = place_loss(
            maps.center,
            maps.sides,
            places_of(scenes.boxes, scenes.present, *size),
            scenes.behind > 0.3,
        )
        salient = F.binary_cross_entropy_with_logits(maps.saliency.float(), scenes.salient)
        seen = model.read(photos.pyramid)
        borrowed = borrowed_loss(model.regions(seen, photos.boxes).embeddings, photos.teacher)
        found = F.binary_cross_entropy_with_logits(seen.saliency.float(), photos.salient)
        loss = (
            recipe.names * named
            + recipe.masks * outlined
            + recipe.places * placed
            + recipe.saliency * (salient + found)
            + recipe.borrowed * borrowed
        )
        return SceneObjective(
            loss,
            {
                "names": named.detach(),
                "top1": right,
                "masks": outlined.detach(),
                "places": placed.detach(),
                "saliency": found.detach(),
                "borrowed": borrowed.detach(),
            },
        )


class SceneBank:
    """Scenes and photographs that the frozen tower has seen once, to train on again and again.

    For machines where the tower takes most of a step's time, such as a CPU.
    """

    def __init__(self, step: SceneStep, model: SceneSpot, *, scenes: int, seed: int) -> None:
        """Fill it.

        Args:
            step: Makes them.
            model: Whose tower looks.
            scenes: How many; a quarter as many photographs join them.
            seed: Of what is drawn.
        """
        self.step = step
        device = step.grounds.device
        generator = torch.Generator(device).manual_seed(seed)
        made, taken = [], []
        with progress(total=scenes, description="scenes", unit="scene") as bar:
            for start in range(0, scenes, _PART):
                count = min(_PART, scenes - start)
                made.append(_halved(step.scenes(model, count, generator)))
                taken.append(_halved(step.photographs(model, max(1, count // 4), generator)))
                bar.update(count)
        self.scenes = _joined(made)
        self.photos = _joined(taken)
        self.count = scenes

    def __call__(
        self, model: SceneSpot, rows: Tensor, generator: torch.Generator
    ) -> SceneObjective:
        """Compute the loss of some of the scenes, by their numbers."""
        photos = len(self.photos.boxes)
        drawn = torch.randint(
            photos,
            (min(photos, self.step.recipe.photos_per_step),),
            device=generator.device,
            generator=generator,
        )
        return self.step.compare(
            model, _taken(self.scenes, rows), _taken(self.photos, drawn), generator
        )


Kept = TypeVar("Kept", SceneBatch, PhotoBatch)


def _mapped(batch: Kept, function: Callable[[Tensor], Tensor]) -> Kept:
    values: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        is_map = isinstance(value, Pyramid)
        values[field.name] = Pyramid(*map(function, value)) if is_map else function(value)
    return replace(batch, **values)


def _halved(batch: Kept) -> Kept:
    return _mapped(batch, lambda x: x.half() if x.is_floating_point() else x)


def _taken(batch: Kept, rows: Tensor) -> Kept:
    return _mapped(batch, lambda x: x[rows].float() if x.is_floating_point() else x[rows])


def _joined(batches: Sequence[Kept]) -> Kept:
    values: dict[str, Any] = {}
    for field in fields(batches[0]):
        parts = [getattr(batch, field.name) for batch in batches]
        if isinstance(parts[0], Pyramid):
            values[field.name] = Pyramid(*(torch.cat(level) for level in zip(*parts, strict=True)))
        else:
            values[field.name] = torch.cat(parts)
    return replace(batches[0], **values)


@torch.no_grad()
def evaluate(
    model: SceneSpot, material: SceneMaterial, *, side: int, scenes: int = 256, seed: int = 7
) -> dict[str, Tensor]:
    """Top-1 and top-5 on scenes of reserved concepts, and on labelled photographs.

    Scenes are named among all names of the vocabulary, and among the reserved ones alone.
    """
    device = material.cutouts.device
    generator = torch.Generator(device).manual_seed(seed)
    chances = (material.split == RESERVED).float()
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, scenes, 32):
        made = compose(
            material.cutouts, material.backgrounds, scenes=min(32, scenes - start), side=side,
            generator=generator, chances=chances,
        )  # fmt: skip
        maps = model.maps(made.images)
        out = model.regions(maps, made.boxes, made.present).embeddings[made.present]
        average, _ = model.tokens(maps, made.boxes)
        plain = model.mixture(average)[made.present]
        found.append((out, plain, material.labels[made.cutouts][made.present]))
    learned, plain, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    reserved = labels.unique()
    row_of = torch.full((len(material.vocabulary),), -1, device=device)
    row_of[reserved] = torch.arange(len(reserved), device=device)
    few = material.vocabulary[reserved]
    scores = {
        "reserved": hits(learned, few, row_of[labels]),
        "reserved_mixture": hits(plain, few, row_of[labels]),
        "reserved_all": hits(learned, material.vocabulary, labels),
    }
    for name, photos in material.photos.items():
        rows = [_named(model, photo.image, photo.boxes, device) for photo in photos]
        truth = torch.cat([photo.labels for photo in photos]).to(device)
        for kind, place in (("", 0), ("_mixture", 1)):
            vectors = torch.cat([row[place] for row in rows])
            for size in (material.few, len(material.photo_names)):
                scores[f"{name}{size}{kind}"] = hits(vectors, material.photo_names[:size], truth)
    return {f"{name}_top{k}": value for name, both in scores.items() for k, value in both.items()}


def hits(vectors: Tensor, names: Tensor, labels: Tensor) -> dict[int, Tensor]:
    """Share of regions whose name is the first, and among the first five."""
    scores = vectors.float() @ names.T
    own = scores.gather(1, labels[:, None])
    rank = (scores > own).sum(1)
    return {1: (rank < 1).float().mean(), 5: (rank < 5).float().mean()}


def _named(
    model: SceneSpot, image: Tensor, boxes: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    maps = model.maps(image[None].to(device))
    given = boxes[None].to(device)
    average, _ = model.tokens(maps, given)
    return model.regions(maps, given).embeddings[0], model.mixture(average)[0]


def _cropped_names(model: SceneSpot, images: Tensor, boxes: Tensor) -> Tensor:
    """What the tower's classifier says about the box alone, at its own resolution."""
    b, k = boxes.shape[:2]
    side = images.shape[-1]
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2
    half = (boxes[..., 2:] - boxes[..., :2]).amax(-1, keepdim=True) * 0.55
    square = torch.cat([middle - half, middle + half], -1) * side
    crops = roi_align(images, list(square), output_size=_CROP, sampling_ratio=2, aligned=True)
    average = model.tower(crops).top.mean((-2, -1))
    return model.mixture(average).view(b, k, -1)


def _shaken(boxes: Tensor, generator: torch.Generator) -> Tensor:
    """Move each side by up to 8 % of the box: people and detectors are not exact either."""
    sides = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
    moved = torch.rand(boxes.shape, device=boxes.device, generator=generator) * 2 - 1
    shaken = (boxes + 0.08 * moved * sides).clamp(0, 1)
    return torch.where((shaken[..., 2:] > shaken[..., :2]).all(-1, keepdim=True), shaken, boxes)


def _random_boxes(
    count: int, each: int, device: torch.device, generator: torch.Generator
) -> Tensor:
    draws = torch.rand(count, each, 4, device=device, generator=generator)
    size = 0.12 + 0.78 * draws[..., 0:1] ** 1.5
    aspect = torch.exp((draws[..., 1:2] - 0.5) * 1.2)
    sides = torch.cat([size * aspect, size / aspect], -1).clamp(max=0.98)
    corner = draws[..., 2:] * (1 - sides)
    return torch.cat([corner, corner + sides], -1)
