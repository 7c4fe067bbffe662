"""Every row of the table of bad input: what is refused, what is mended, and what is said."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polyzoo.core.errors import ConfigError, DataError, WeightsError
from polyzoo.regionspot.boxes import check_boxes
from polyzoo.regionspot.clip import build_clip
from polyzoo.regionspot.config import ClipConfig, ClipShape
from polyzoo.regionspot.convert import choose_clip, load_module
from polyzoo.regionspot.folders import (
    check_quick_gelu,
    load_engine,
    load_on_towers,
    save_integration,
)
from polyzoo.regionspot.inputs import read_image
from polyzoo.regionspot.names import check_names
from polyzoo.regionspot.options import ConvertConfig
from polyzoo.regionspot.pipeline import RegionSpotPipeline
from polyzoo.regionspot.text import TextClassifier
from support.regionspot_models import boxes, picture, tiny_model, tiny_pipeline


@pytest.fixture(scope="module")
def pipeline() -> RegionSpotPipeline:
    return tiny_pipeline()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([[1, 2, 3]], r"shape \(1, 3\); it must be \(boxes, 4\)"),
        ([1, 2, 3, 4], r"shape \(4,\)"),
        ([[1, 2, 3, 4], [1, float("nan"), 3, 4]], r"boxes\[1\].*not finite"),
        ([["a", "b", "c", "d"]], "cannot be read as numbers"),
        ([[30, 30, 10, 10]], r"without area.*\[0\] \[30.0, 30.0, 10.0, 10.0\]"),
        ([[10, 10, 10, 20]], "without area"),
        ([[50, 40, 20, 15]] * 3, r"look like xywh; pass box_format='xywh'"),
        ([[0.1, 0.2, 0.5, 0.9]], r"pass box_format='xyxyn'"),
        ([[200, 200, 300, 300]], "entirely outside the 80 x 60 image"),
    ],
)
def test_boxes_refused(given: list[list[float]], said: str):
    with pytest.raises(DataError, match=said):
        check_boxes(given, width=80, height=60)


def test_only_five_bad_rows_are_listed():
    with pytest.raises(DataError, match=r"\[4\] .* and 3 more"):
        check_boxes([[30, 30, 20, 20]] * 8, width=80, height=60)


def test_boxes_mended(caplog: pytest.LogCaptureFixture):
    given = [[-5, 10, 30, 40], [10, 10, 20, 20], [200, 0, 220, 9], [9, 9, 9, 9]]
    with caplog.at_level(logging.WARNING, "polyzoo"):
        found = check_boxes(given, width=80, height=60, on_invalid="drop")
    assert found.rows.tolist() == [0, 1]
    assert found.boxes[0].tolist() == [0, 10, 30, 40]
    assert "1 boxes reach beyond the image" in caplog.text


def test_other_box_formats():
    corners = check_boxes([[10, 20, 30, 40]], width=80, height=60).boxes
    sides = check_boxes([[10, 20, 20, 20]], width=80, height=60, box_format="xywh").boxes
    shares = [[10 / 80, 20 / 60, 30 / 80, 40 / 60]]
    relative = check_boxes(shares, width=80, height=60, box_format="xyxyn").boxes
    assert torch.equal(corners, sides)
    torch.testing.assert_close(corners, relative)
    with pytest.raises(DataError, match="shares"):
        check_boxes([[10, 20, 30, 40]], width=80, height=60, box_format="xyxyn")


def test_many_boxes_are_announced(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "polyzoo"):
        check_boxes([[1, 1, 9, 9]] * 2001, width=80, height=60)
    assert "2001 boxes at once" in caplog.text
    assert "MB" in caplog.text


def test_no_boxes_and_a_thousand(pipeline: RegionSpotPipeline):
    empty = pipeline(picture(), names=["red", "blue"], boxes=torch.zeros(0, 4))
    assert empty.scores.shape == (0, 2)
    assert empty.labels == []
    assert empty.to_coco(image_id=1) == []
    corner = torch.rand(1000, 2) * torch.tensor([60.0, 40.0])
    many = torch.cat([corner, corner + 5 + torch.rand(1000, 2) * 10], 1)
    found = pipeline(picture(), names=["red", "blue"], boxes=many, masks=False)
    assert found.scores.shape == (1000, 2)
    torch.testing.assert_close(found.scores.sum(1), torch.ones(1000))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "names is empty"),
        ("", "names is empty"),
        (["cat", " "], r"names\[1\] is empty"),
        (["cat", 3], "is a int; give text"),
    ],
)
def test_names_refused(names: list[str], said: str):
    with pytest.raises(DataError, match=said):
        check_names(names)


def test_names_merged(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "polyzoo"):
        assert check_names("cat, dog,cat") == ("cat", "dog")
    assert "merged: cat" in caplog.text


def test_a_name_longer_than_the_text_tower_reads(pipeline: RegionSpotPipeline):
    with pytest.raises(DataError, match="77 tokens or more"):
        pipeline.classifier(["cat", "very " * 100 + "long name"])


def test_one_name_gets_a_sigmoid(pipeline: RegionSpotPipeline, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "polyzoo"):
        found = pipeline(picture(), names="red", boxes=boxes(), masks=False)
    assert "sigmoid" in caplog.text
    torch.testing.assert_close(found.scores, found.logits.sigmoid())


def test_images_converted(pipeline: RegionSpotPipeline, tmp_path: Path):
    base = picture()
    for mode in ("L", "P", "RGBA", "CMYK", "I;16"):
        if mode == "I;16":
            image = Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257)
        else:
            image = base.convert(mode)
        assert read_image(image).mode == "RGB"
    grey = np.asarray(base.convert("L"))
    assert read_image(grey).size == base.size
    tensor = torch.from_numpy(np.array(base)).permute(2, 0, 1)
    for source in (tensor, tensor.float() / 255, np.array(base)):
        assert np.array_equal(np.asarray(read_image(source)), np.asarray(base))
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    base.save(turned, exif=exif)
    assert read_image(turned).size == (base.height, base.width)
    found = pipeline(turned, names="red,blue", boxes=[[5, 5, 50, 70]], masks=False)
    assert (found.width, found.height) == (60, 80)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (np.zeros((8, 9, 3), np.float32), r"float32 \(8, 9, 3\).*multiply by 255"),
        (np.full((8, 9, 3), 300, np.int64), r"int64 .* 300..300; give uint8"),
        (np.zeros((3, 8, 9), np.uint8), r"channels first; pass array.transpose\(1, 2, 0\)"),
        (np.zeros((8, 9, 2), np.uint8), r"give \(H, W\), \(H, W, 3\)"),
        (torch.full((3, 8, 9), 7.0), r"must lie in 0..1; .*7..7"),
        (torch.zeros(8, 9, 3), r"must be \(3, H, W\)"),
        (17, "cannot be a int"),
        ("nowhere.jpg", "no such file"),
    ],
)
def test_images_refused(source: object, said: str):
    with pytest.raises(DataError, match=said):
        read_image(source)


def test_too_many_pixels_are_refused_before_decoding(tmp_path: Path):
    path = tmp_path / "big.png"
    Image.new("L", (300, 200)).save(path)
    with pytest.raises(DataError, match=r"more than 50,000 pixels"):
        read_image(path, max_pixels=50_000)


def test_extreme_shapes_are_announced(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "polyzoo"):
        read_image(Image.new("RGB", (500, 100)))
    assert "5.0 : 1" in caplog.text


def test_where_to_look_must_be_said_once(pipeline: RegionSpotPipeline):
    session = pipeline.open(picture())
    with pytest.raises(DataError, match="none was given"):
        session.predict(names="red,blue")
    with pytest.raises(DataError, match="boxes and auto were given"):
        session.predict(names="red,blue", boxes=boxes(), auto=True)
    with pytest.raises(DataError, match=r"points\[0\].*outside the 80 x 60 image"):
        session.predict(names="red,blue", points=[[90, 5]])
    with pytest.raises(DataError, match="points have shape"):
        session.predict(names="red,blue", points=[1, 2, 3])
    with pytest.raises(DataError, match="2 entries for 3 images"):
        pipeline([picture()] * 3, names="red,blue", boxes=[boxes()] * 2)


def test_class_vectors_of_another_text_tower(pipeline: RegionSpotPipeline, tmp_path: Path):
    made = pipeline.classifier("red,blue")
    made.save(tmp_path / "c.safetensors")
    again = TextClassifier.load(tmp_path / "c.safetensors", source=made.source)
    assert torch.equal(again.vectors, made.vectors)
    with pytest.raises(WeightsError, match="made by text tower"):
        TextClassifier.load(tmp_path / "c.safetensors", source="0" * 64)


def test_towers_must_be_the_ones_of_training(tmp_path: Path):
    from polyzoo.core.weights import write_weights

    model, other = tiny_model(0), tiny_model(1)
    save_integration(tmp_path / "m", model)
    for name, part in (("sam", model.sam), ("clip", model.clip), ("other", other.sam)):
        write_weights(tmp_path / f"{name}.safetensors", part.state_dict())
    right = {
        "sam_weights": tmp_path / "sam.safetensors", "clip_weights": tmp_path / "clip.safetensors",
    }  # fmt: skip
    again = load_on_towers(tmp_path / "m", **right)
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True)
    )
    with pytest.raises(WeightsError, match="trained with sam"):
        load_on_towers(tmp_path / "m", **{**right, "sam_weights": tmp_path / "other.safetensors"})
    with pytest.raises(WeightsError, match="give clip_weights="):
        load_engine(
            tmp_path / "m", device=torch.device("cpu"), dtype=torch.float32,
            sam_weights=right["sam_weights"],
        )  # fmt: skip


def test_plain_gelu_with_openai_weights():
    plain = build_clip(ClipConfig(shape=ClipShape(quick_gelu=False)))
    with pytest.raises(WeightsError, match="ViT-B-16-quickgelu"):
        check_quick_gelu(plain, "ViT-B-16", openai=True)
    check_quick_gelu(build_clip(ClipConfig(shape=ClipShape())), "ViT-B-16-quickgelu", openai=True)


def test_published_variants_told_apart():
    def module(width: int, text: int) -> dict[str, torch.Tensor]:
        return {"to_clip.weight": torch.zeros(width, 256), "projector.weight": torch.zeros(text, 1)}

    assert choose_clip(module(768, 512), None, source="x") == "ViT-B-16-quickgelu"
    with pytest.raises(ConfigError, match="ViT-L-14-quickgelu and ViT-L-14-336-quickgelu"):
        choose_clip(module(1024, 768), None, source="x")
    named = choose_clip(module(1024, 768), "ViT-L-14-336-quickgelu", source="x")
    assert named == "ViT-L-14-336-quickgelu"
    with pytest.raises(WeightsError, match="not of ViT-B-16-quickgelu"):
        choose_clip(module(1024, 768), "ViT-B-16-quickgelu", source="x")
    with pytest.raises(WeightsError, match="no published variant"):
        choose_clip(module(5, 6), None, source="x")
    with pytest.raises(WeightsError, match="no RegionSpot checkpoint"):
        choose_clip({}, None, source="x")


def test_sixty_tensors_or_none():
    model = tiny_model()
    tensors = model.trained_tensors()
    load_module(model, tensors, source="x")
    tensors.pop("projector.bias")
    with pytest.raises(WeightsError, match=r"1 missing \(projector.bias\)"):
        load_module(model, tensors, source="x")


def test_a_pickle_with_code_is_refused(tmp_path: Path):
    from polyzoo.regionspot.convert import main

    torch.save({"model": {"x": Path("y")}}, tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match="could run code"):
        main(ConvertConfig(source=tmp_path / "bad.pth", out=tmp_path / "out"))
