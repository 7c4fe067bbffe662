"""One training step of SceneSpot, and its evaluation: scenes are made where the model is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from polyzoo.regionspot.compose import Scenes, compose
from polyzoo.regionspot.presets import SceneRecipe
from polyzoo.regionspot.scene_losses import (
    borrowed_loss,
    mask_loss,
    name_loss,
    place_loss,
    places_of,
)
from polyzoo.regionspot.scene_material import RESERVED, TRAIN, SceneMaterial
from polyzoo.regionspot.scene_model import SceneMaps, SceneSpot

_CROP = 224


@dataclass(frozen=True)
class SceneObjective:
    """The loss of a step, and what it is made of."""

    loss: Tensor
    metrics: dict[str, Tensor]


class SceneStep:
    """Makes scenes and photographs' crops, and compares what the model says with what is known."""

    def __init__(self, material: SceneMaterial, recipe: SceneRecipe, *, side: int) -> None:
        self.material, self.recipe, self.side = material, recipe, side
        self.chances = material.chances * (material.split == TRAIN)
        taught = material.labels[material.split == TRAIN].unique()
        self.vocabulary = material.vocabulary[taught]
        self.rows = torch.full((len(material.vocabulary),), -1, device=taught.device)
        self.rows[taught] = torch.arange(len(taught), device=taught.device)

    def __call__(
        self, model: SceneSpot, scenes: int, generator: torch.Generator
    ) -> SceneObjective:
        """Compute the loss of one step.

        Args:
            model: In training mode.
            scenes: How many scenes to compose.
            generator: On the model's device.
        """
        recipe, material = self.recipe, self.material
        with torch.no_grad():
            made = compose(
                material.cutouts, self._grounds(), scenes=scenes, side=self.side,
                generator=generator, chances=self.chances,
            )  # fmt: skip
        maps = model.maps(made.images[:, :3])
        boxes = _shaken(made.boxes, generator)
        out = model.regions(maps, boxes, made.present, mask_size=28)
        targets = self.rows[material.labels[made.cutouts]][made.present]
        named, right = name_loss(
            out.embeddings[made.present], targets, self.vocabulary, scale=recipe.scale
        )
        assert out.masks is not None  # noqa: S101 - asked for above
        outlined = mask_loss(out.masks, made.masks, boxes, made.present)
        placed, salient = self._where(maps, made)
        borrowed, salient_photos = self._photographs(model, generator)
        loss = (
            recipe.names * named
            + recipe.masks * outlined
            + recipe.places * placed
            + recipe.saliency * (salient + salient_photos)
            + recipe.borrowed * borrowed
        )
        return SceneObjective(
            loss,
            {
                "names": named.detach(),
                "top1": right,
                "masks": outlined.detach(),
                "places": placed.detach(),
                "saliency": salient_photos.detach(),
                "borrowed": borrowed.detach(),
            },
        )

    def _grounds(self) -> Tensor:
        """Backgrounds with their saliency as a fourth channel."""
        if not hasattr(self, "_joined"):
            material = self.material
            size = material.backgrounds.shape[-2:]
            salient = F.interpolate(
                material.saliency[:, None].float(), size, mode="bilinear"
            ).round().to(torch.uint8)
            self._joined = torch.cat([material.backgrounds, salient], 1)
        return self._joined

    def _where(self, maps: SceneMaps, made: Scenes) -> tuple[Tensor, Tensor]:
        """Losses of proposals and of saliency on scenes."""
        size = maps.center.shape[-2:]
        pasted = F.adaptive_max_pool2d((made.masks & made.present[..., None, None]).any(1)[:, None].float(), size)[:, 0]
        behind = F.adaptive_avg_pool2d(made.images[:, 3:], size)[:, 0] * (1 - pasted)
        wanted = torch.maximum(pasted, behind)
        salient = F.binary_cross_entropy_with_logits(maps.saliency.float(), wanted)
        places = places_of(made.boxes, made.present, *size)
        placed = place_loss(maps.center, maps.sides, places, behind > 0.3)
        return placed, salient

    def _photographs(
        self, model: SceneSpot, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Losses on photographs without labels: a classifier's view of crops, and saliency."""
        recipe, material = self.recipe, self.material
        count, each = recipe.photos_per_step, recipe.boxes_per_photo
        device = material.backgrounds.device
        with torch.no_grad():
            chosen = torch.randint(
                len(material.backgrounds), (count,), device=device, generator=generator
            )
            images = self._grounds()[chosen].float() / 255
            if images.shape[-1] != self.side:
                images = F.interpolate(images, (self.side, self.side), mode="bilinear")
            flip = torch.rand(count, device=device, generator=generator) < 0.5
            images = torch.where(flip[:, None, None, None], images.flip(-1), images)
            boxes = _random_boxes(count, each, device, generator)
            teacher = _cropped_names(model, images[:, :3], boxes)
        maps = model.maps(images[:, :3])
        out = model.regions(maps, boxes)
        wanted = F.adaptive_avg_pool2d(images[:, 3:], maps.saliency.shape[-2:])[:, 0]
        salient = F.binary_cross_entropy_with_logits(maps.saliency.float(), wanted)
        return borrowed_loss(out.embeddings, teacher), salient


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
        rows = [(photo, *_named(model, photo.image, photo.boxes, device)) for photo in photos]
        truth = torch.cat([photo.labels for photo, *_ in rows]).to(device)
        for kind, place in (("", 1), ("_mixture", 2)):
            vectors = torch.cat([row[place] for row in rows])
            for size in (material.few, len(material.photo_names)):
                scores[f"{name}{size}{kind}"] = hits(vectors, material.photo_names[:size], truth)
    return {
        f"{name}_top{k}": value for name, both in scores.items() for k, value in both.items()
    }


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
