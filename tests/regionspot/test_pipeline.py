"""The pipeline on both kinds of model: inputs, prompts, batches, sessions, exports."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polyzoo.core.errors import DataError
from polyzoo.regionspot.boxes import non_maximum
from polyzoo.regionspot.overlay import draw
from polyzoo.regionspot.pipeline import RegionSpotPipeline
from polyzoo.regionspot.results import RegionResult
from polyzoo.regionspot.rle import Rle
from support.regionspot_models import boxes, picture, tiny_pipeline

# pycocotools 2.0 with NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

NAMES = ["red square", "green square", "blue square", "cat"]


@pytest.fixture(scope="module")
def on_sam() -> RegionSpotPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def embedded() -> RegionSpotPipeline:
    return RegionSpotPipeline.from_pretrained(device="cpu")


@pytest.fixture(params=["sam", "embedded"])
def pipeline(request: pytest.FixtureRequest) -> RegionSpotPipeline:
    return request.getfixturevalue("on_sam" if request.param == "sam" else "embedded")


def test_all_kinds_of_input_agree(pipeline: RegionSpotPipeline, tmp_path: Path):
    image = picture()
    image.save(tmp_path / "p.png")
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    wanted = pipeline(image, names=NAMES, boxes=boxes())
    for source in (tmp_path / "p.png", str(tmp_path / "p.png"), np.array(image), tensor):
        found = pipeline(source, names=NAMES, boxes=boxes().numpy())
        assert torch.equal(found.logits, wanted.logits)
        assert found.masks == wanted.masks


def test_batches_keep_their_order_and_equal_single_calls(pipeline: RegionSpotPipeline):
    images = [picture(80, 60), picture(50, 90, 1), picture(64, 64, 2)]
    given = [boxes(), boxes()[:1] * 0.6, torch.zeros(0, 4)]
    together = pipeline(images, names=NAMES, boxes=given, batch_size=2)
    assert [len(result) for result in together] == [3, 1, 0]
    for image, one, result in zip(images, given, together, strict=True):
        alone = pipeline(image, names=NAMES, boxes=one)
        torch.testing.assert_close(result.scores, alone.scores, rtol=1e-4, atol=1e-5)


def test_sessions_look_once(pipeline: RegionSpotPipeline):
    session = pipeline.open(picture())
    first = session.predict(names=NAMES, boxes=boxes(), masks=False)
    again = session.predict(names=list(reversed(NAMES)), boxes=boxes(), masks=False)
    torch.testing.assert_close(first.scores, again.scores.flip(1))
    assert torch.equal(first.embeddings, session.embed(boxes()))
    direct = pipeline(picture(), names=pipeline.classifier(NAMES), boxes=boxes(), masks=False)
    assert torch.equal(direct.logits, first.logits)


def test_order_of_boxes(pipeline: RegionSpotPipeline):
    session = pipeline.open(picture())
    plain = session.embed(boxes())
    torch.testing.assert_close(session.embed(boxes().flip(0)), plain.flip(0), rtol=0, atol=5e-6)


def test_each_box_alone(pipeline: RegionSpotPipeline):
    session = pipeline.open(picture())
    alone = session.predict(names=NAMES, boxes=boxes(), independent=True, masks=False)
    single = session.predict(names=NAMES, boxes=boxes()[1:2], masks=False)
    torch.testing.assert_close(alone.embeddings[1:2], single.embeddings, rtol=0, atol=1e-5)


def test_points_and_automatic_regions(pipeline: RegionSpotPipeline):
    session = pipeline.open(picture())
    at = session.predict(names=NAMES, points=[[16, 19], [40, 28]])
    assert at.boxes.shape == (2, 4)
    inside = (at.boxes[:, 2:] > at.boxes[:, :2]).all() and (at.boxes >= 0).all()
    assert inside
    several = session.predict(
        names=NAMES, points=[[[16, 19], [60, 50]]], point_labels=[[1, 0]], masks=False
    )
    assert several.boxes.shape == (1, 4)
    found = session.predict(names=NAMES, auto=True, limit=5)
    assert len(found) <= 5
    assert found.proposal_scores is not None
    limit = torch.tensor([80.0, 60.0, 80.0, 60.0])
    assert bool(((found.boxes >= 0) & (found.boxes <= limit)).all())


def test_rejection(pipeline: RegionSpotPipeline):
    session = pipeline.open(picture())
    every = session.predict(names=NAMES, boxes=boxes(), min_similarity=2.0, masks=False)
    assert every.rejected.all()
    none = session.predict(names=NAMES, boxes=boxes(), min_similarity=-2.0, masks=False)
    assert not none.rejected.any()
    plain = session.predict(names=["red square", "cat"], boxes=boxes(), masks=False)
    against = session.predict(
        names=["red square"], negative_names=["cat", "red square"], boxes=boxes(), masks=False
    )
    assert against.names == ("red square",)
    torch.testing.assert_close(against.scores, plain.scores[:, :1])
    assert torch.equal(against.rejected, plain.best == 1)
    with pytest.raises(DataError, match="not a TextClassifier"):
        session.predict(names=pipeline.classifier(NAMES), negative_names=["cat"], boxes=boxes())


def test_mirrored_average_does_not_depend_on_the_side(pipeline: RegionSpotPipeline):
    image = picture()
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    other = boxes()[:, [2, 1, 0, 3]].clone()
    other[:, [0, 2]] = 80 - other[:, [0, 2]]
    one = pipeline(image, names=NAMES, boxes=boxes(), flip=True, masks=False)
    two = pipeline(mirrored, names=NAMES, boxes=other, flip=True, masks=False)
    torch.testing.assert_close(one.similarity, two.similarity, rtol=0, atol=2e-5)
    plain = pipeline(image, names=NAMES, boxes=boxes(), masks=False)
    assert not torch.equal(plain.similarity, one.similarity)


def test_exports(pipeline: RegionSpotPipeline):
    result = pipeline(picture(), names=NAMES, boxes=boxes())
    plain = json.loads(json.dumps(result.to_dict()))
    assert [row["name"] for row in plain["regions"]] == result.labels
    rows = json.loads(json.dumps(result.to_coco(image_id=7)))
    check_with_pycocotools(result, rows)
    detections = result.to_supervision()
    assert list(detections.data["class_name"]) == result.labels
    assert detections.mask.shape == (3, 60, 80)
    np.testing.assert_allclose(detections.xyxy, boxes().numpy())
    with pytest.raises(DataError, match="category_ids lacks 'red square'"):
        result.to_coco(image_id=1, category_ids={"cat": 1})
    some = result.chosen([2, 0])
    assert some.labels == [result.labels[2], result.labels[0]]
    drawn = draw(picture(), result)
    assert drawn.size == (80, 60)
    assert np.asarray(drawn)[10, 8].tolist() != np.asarray(picture())[10, 8].tolist()


def check_with_pycocotools(result: RegionResult, rows: list[dict]) -> None:
    from pycocotools import mask as masks

    assert result.masks is not None
    for row, outline in zip(rows, result.masks, strict=True):
        decoded = masks.decode(row["segmentation"]).astype(bool)
        assert np.array_equal(decoded, outline.decode())
        assert int(masks.area(row["segmentation"])) == outline.area


@pytest.mark.parametrize("kind", ["none", "all", "noise", "stripes", "corner"])
def test_run_lengths_equal_cocos(kind: str):
    from pycocotools import mask as masks

    mask = np.zeros((37, 53), dtype=bool)
    if kind == "all":
        mask[:] = True
    elif kind == "noise":
        mask = np.random.default_rng(0).random((37, 53)) < 0.4
    elif kind == "stripes":
        mask[:, ::2] = True
    elif kind == "corner":
        mask[0, 0] = mask[-1, -1] = True
    found = Rle.encode(mask)
    assert np.array_equal(found.decode(), mask)
    assert found.area == mask.sum()
    theirs = masks.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert found.to_coco()["counts"] == theirs["counts"].decode()


def test_overlapping_boxes_are_thinned_like_torchvisions():
    from torchvision.ops import nms

    corner = torch.rand(60, 2) * 50
    given = torch.cat([corner, corner + 5 + torch.rand(60, 2) * 30], 1)
    scores = torch.rand(60)
    assert torch.equal(non_maximum(given, scores, overlap=0.4), nms(given, scores, 0.4))


def test_class_vectors_are_kept_on_disk(tmp_path: Path):
    pipeline = tiny_pipeline(tmp_path)
    first = pipeline.classifier(NAMES)
    files = list(tmp_path.iterdir())
    assert len(files) == 1
    stamp = files[0].stat().st_mtime_ns
    again = pipeline.classifier(NAMES)
    assert torch.equal(again.vectors, first.vectors)
    assert files[0].stat().st_mtime_ns == stamp
    pipeline.classifier([*NAMES, "dog"])
    assert len(list(tmp_path.iterdir())) == 2


def test_a_huge_image_needs_little_memory(embedded: RegionSpotPipeline, tmp_path: Path):
    """Masks of a large image are kept as run lengths, and made one after the other."""
    import tracemalloc

    image = Image.new("RGB", (6000, 4000), (90, 120, 60))
    given = [[100 + 50 * i, 100, 3000 + 50 * i, 3500] for i in range(20)]
    tracemalloc.start()
    result = embedded(image, names=NAMES, boxes=given)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.masks is not None
    assert len(result.masks) == 20
    assert peak < 400 * 2**20  # twenty boolean masks alone would be 480 MB
