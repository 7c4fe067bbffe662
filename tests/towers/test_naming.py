"""Pictures, the classifier, and names for boxes without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from polyzoo.core.assets import is_present
from polyzoo.core.errors import DataError
from polyzoo.towers import Conse, crop_boxes, image_batch, load_classifier, load_text_tower
from polyzoo.towers.classifier import SIZE, Classifier, class_names
from polyzoo.towers.pictures import HALF, IMAGENET, central_square
from support.tower_samples import randomised, scene


def test_pictures_of_every_kind_give_the_same_batch(tmp_path: Path) -> None:
    image = scene(60)
    image.save(tmp_path / "scene.png")
    same = image_batch([tmp_path / "scene.png", image, np.asarray(image)], size=(28, 42))
    assert same.shape == (3, 3, 28, 42)
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], same[2])


@pytest.mark.parametrize("normalise", [IMAGENET, HALF])
def test_normalisation(normalise: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (14, 14, 3), dtype=np.uint8)
    batch = image_batch([pixels], size=(14, 14), normalise=normalise)[0]
    for colour in range(3):
        expected = (pixels[..., colour] / 255 - normalise[0][colour]) / normalise[1][colour]
        np.testing.assert_allclose(batch[colour].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ([], "no pictures: give at least one"),
        (
            [np.zeros((4, 4), np.uint8)],
            r"uint8 \(4, 4\); as a picture it must be uint8 \(H, W, 3\)",
        ),
        ([np.zeros((4, 4, 3))], r"float64 \(4, 4, 3\)"),
        (["no/such.png"], "no/such.png: no such file"),
    ],
)
def test_bad_pictures_are_named(pictures: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        image_batch(pictures, size=(14, 14))


def test_the_central_square() -> None:
    image = scene(100).resize((200, 100))
    square = central_square(image, size=70)
    assert square.size == (70, 70)
    full = central_square(image, size=100, share=1.0)
    np.testing.assert_array_equal(np.asarray(full), np.asarray(image.crop((50, 0, 150, 100))))
    with pytest.raises(DataError, match=r"share=0 above 0 and at most 1"):
        central_square(image, size=70, share=0)


boxes = st.tuples(st.floats(0, 90), st.floats(0, 50), st.floats(1, 100), st.floats(1, 60)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@given(box=boxes)
@settings(max_examples=60, deadline=None)
def test_crops_are_squares_that_hold_their_box(box: tuple[float, float, float, float]) -> None:
    image = Image.new("RGB", (100, 60))
    crop = crop_boxes(image, [box])[0]
    side = 1.1 * max(box[2] - box[0], box[3] - box[1])
    assert crop.width == crop.height
    assert abs(crop.width - side) <= 0.5


def test_a_crop_shows_its_box() -> None:
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[20:40, 30:60] = 255
    crop = np.asarray(crop_boxes(pixels, [(30, 20, 60, 40)])[0])[..., 0] > 0
    assert crop.shape == (33, 33)  # 30 wide with a tenth more
    assert crop.sum() == 20 * 30
    edge = np.asarray(crop_boxes(pixels, [(0, 0, 100, 60)], margin=1.0)[0])
    assert edge.shape == (100, 100, 3)  # beyond the picture its edge goes on
    np.testing.assert_array_equal(edge[20:80], pixels)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((10, 10, 10, 20), "right must exceed left"),
        ((10, 20, 20, 10), "right must exceed left, and bottom top"),
        ((200, 10, 220, 20), "lies outside the picture of 100 x 60"),
        ((0, 0, float("nan"), 4), "right must exceed left"),
    ],
)
def test_bad_boxes_are_named(box: tuple[float, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        crop_boxes(Image.new("RGB", (100, 60)), [box])


class Letters:
    """A text tower: a text's vector says how often it has each letter."""

    dim = 26

    def encode(self, texts: Sequence[str]) -> Tensor:
        counts = [[text.count(chr(97 + i)) for i in range(26)] for text in texts]
        return F.normalize(torch.tensor(counts, dtype=torch.float32), dim=1)

    def states(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        vectors = self.encode(texts)
        return vectors[:, None], torch.ones(len(vectors), dtype=torch.long)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classifier().eval().requires_grad_(False)


def test_the_vector_is_the_weighted_mean_of_class_names(classifier: Classifier) -> None:
    conse = Conse(classifier, Letters(), top=3)
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(1))
    names = Letters().encode(class_names())
    for row, found in zip(logits, conse.combine(logits), strict=True):
        chances = torch.exp(row) / torch.exp(row).sum()
        best = sorted(range(1000), key=lambda c: -chances[c])[:3]
        mean = sum(chances[c] * names[c] for c in best)
        torch.testing.assert_close(found, mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_pictures_become_scores(classifier: Classifier) -> None:
    conse = Conse(classifier, Letters())
    crops = crop_boxes(scene(), [(60, 50, 180, 170), (0, 0, 40, 40)])
    scores = conse.scores(crops, ["ball", "sky", "z"])
    assert scores.shape == (2, 3)
    alone = conse.vectors(crops[:1]) @ Letters().encode(["ball", "sky", "z"]).T
    torch.testing.assert_close(scores[:1], alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match="top=0 must be 1 to 1000"):
        Conse(classifier, Letters(), top=0)
    with pytest.raises(DataError, match="no pictures"):
        conse.vectors([])


def test_features_lead_to_the_classes(classifier: Classifier) -> None:
    model = randomised(Classifier())
    assert isinstance(model, Classifier)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        features, logits = model.features(images), model(images)
        head = model.network.get_classifier()
        assert isinstance(head, torch.nn.Linear)
        torch.testing.assert_close(head(features), logits, rtol=1e-4, atol=1e-4)
    assert features.shape == (2, 1280)


def test_class_names() -> None:
    names = class_names()
    assert len(names) == 1000
    assert names[0] == "tench, Tinca tinca"
    assert names[967] == "espresso"


@pytest.mark.skipif(
    not (is_present("efficientnet-lite0") and is_present("wordllama")),
    reason="an asset is not fetched; lifted by: polyzoo assets fetch efficientnet-lite0, and "
    "wordllama",
)
def test_the_real_towers_name_a_drawn_ball() -> None:
    conse = Conse(load_classifier(), load_text_tower("wordllama"))
    crops = crop_boxes(scene(), [(70, 60, 170, 160)])
    names = ["ball", "cat", "bridge", "espresso", "car", "tree", "violin", "boat"]
    assert names[int(conse.scores(crops, names).argmax())] == "ball"
    batch = image_batch(crops, size=(SIZE, SIZE), normalise=HALF)
    assert load_classifier()(batch).shape == (1, 1000)
