"""Our own model: scenes with exact truth, its parts, its files, and its training."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from polyzoo.core import config as configs
from polyzoo.core.errors import DataError, WeightsError
from polyzoo.core.weights import write_weights
from polyzoo.regionspot import scene_folder, scene_material
from polyzoo.regionspot.compose import compose
from polyzoo.regionspot.config import SceneSpotConfig
from polyzoo.regionspot.four_bits import cosine_basis, pack, unpack
from polyzoo.regionspot.lite0 import Lite0, fold
from polyzoo.regionspot.presets import PRESETS
from polyzoo.regionspot.scene_losses import places_of
from polyzoo.regionspot.scene_model import SceneSpot
from polyzoo.regionspot.scene_proposals import propose
from polyzoo.regionspot.train import main
from polyzoo.regionspot.word_fit import choose_words, fit_table
from polyzoo.regionspot.words import WordTable, split_words

ASSETS = Path(scene_folder.__file__).parent / "assets" / "embedded"


def cutouts() -> torch.Tensor:
    """A filled disc and a filled square, on nothing."""
    made = []
    for kind in ("ellipse", "rectangle"):
        image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
        getattr(ImageDraw.Draw(image), kind)((2, 2, 29, 29), fill=(250, 20, 20, 255))
        made.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return torch.stack(made)


class TestCompose:
    def made(self, seed: int = 0):
        grounds = torch.zeros(2, 4, 40, 40, dtype=torch.uint8)
        grounds[:, 2] = 255
        generator = torch.Generator().manual_seed(seed)
        return compose(cutouts(), grounds, scenes=16, side=64, most=4, generator=generator)

    def test_boxes_bound_what_is_visible(self):
        scenes = self.made()
        assert scenes.present.any(1).all()
        assert (scenes.images >= 0).all()
        assert (scenes.images <= 1).all()
        for image in range(16):
            for slot in scenes.present[image].nonzero().flatten().tolist():
                mask = scenes.masks[image, slot]
                x0, y0, x1, y1 = (scenes.boxes[image, slot] * 16).tolist()
                ys, xs = mask.nonzero().unbind(1)
                assert int(xs.min()) == int(x0 + 1e-4)
                assert int(ys.min()) == int(y0 + 1e-4)
                assert int(xs.max()) + 1 == -int(-(x1 - 1e-4) // 1)
                assert int(ys.max()) + 1 == -int(-(y1 - 1e-4) // 1)

    def test_masks_show_the_pasted_colour(self):
        scenes = self.made()
        red = F.avg_pool2d(scenes.images[:, 0:1] - scenes.images[:, 2:3], 4)[:, 0]
        union = (scenes.masks & scenes.present[..., None, None]).any(1)
        inner = F.max_pool2d((~union).float()[:, None], 3, 1, 1)[:, 0] == 0
        colours = scenes.images[:, :3]
        colourful = (colours.amax(1) - colours.amin(1)).amax((1, 2)) > 0.3  # some become grey
        assert (red[inner & colourful[:, None, None]] > 0).float().mean() > 0.95

    def test_the_seed_decides(self):
        assert torch.equal(self.made(3).images, self.made(3).images)
        assert not torch.equal(self.made(3).images, self.made(4).images)

    def test_chances_choose_the_cutouts(self):
        grounds = torch.zeros(1, 3, 40, 40, dtype=torch.uint8)
        generator = torch.Generator().manual_seed(0)
        only = compose(
            cutouts(), grounds, scenes=4, side=32, generator=generator,
            chances=torch.tensor([0.0, 1.0]),
        )  # fmt: skip
        assert (only.cutouts == 1).all()


def test_the_tower_is_timms_network():
    import timm

    torch.manual_seed(0)
    peer = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    for module in peer.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    own = Lite0()
    own.load_state_dict(fold(peer.state_dict()))
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        pyramid = own(images)
        torch.testing.assert_close(
            pyramid.top, peer.forward_features(images * 2 - 1), rtol=1e-4, atol=1e-4
        )
        logits = own.classifier(pyramid.top.mean((2, 3)))
        torch.testing.assert_close(logits, peer(images * 2 - 1), rtol=1e-4, atol=1e-4)
    assert [m.shape[-1] for m in pyramid] == [12, 6, 3, 3]
    with pytest.raises(WeightsError, match="is missing"):
        fold({})


def test_places_of_boxes():
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.25, 0.25, 0.75, 0.75], [0, 0, 0.5, 0.5]]])
    found = places_of(boxes, torch.tensor([[True, True, False]]), 8, 8)
    assert found.sides[0, :, 3, 4].tolist() == [2.5, 1.5, 1.5, 2.5]  # the smaller box wins
    assert found.sides[0, :, 0, 0].tolist() == [0.5, 0.5, 7.5, 7.5]
    assert found.inside[0, 3, 3]
    assert not found.inside[0, 0, 0]
    assert float(found.center.max()) <= 1


class TestModel:
    @pytest.fixture(scope="class")
    @classmethod
    def model(cls) -> SceneSpot:
        return scene_folder.load(ASSETS)[0].requires_grad_(False)

    def test_the_shipped_files_are_small(self):
        files = [path for path in ASSETS.iterdir() if path.is_file()]
        assert {path.name for path in files} == {
            "config.json", "model.safetensors", "words.safetensors",
        }  # fmt: skip
        assert sum(path.stat().st_size for path in files) <= 6 * 2**20

    def test_padding_does_not_matter(self, model: SceneSpot):
        maps = model.maps(torch.rand(1, 3, 96, 64))
        boxes = torch.tensor([[[0.1, 0.1, 0.6, 0.7], [0.3, 0.2, 0.9, 0.9]]])
        wanted = model.regions(maps, boxes, mask_size=14)
        padded = torch.cat([boxes, torch.rand(1, 2, 4).sort(-1).values], 1)
        present = torch.tensor([[True, True, False, False]])
        found = model.regions(maps, padded, present, mask_size=14)
        torch.testing.assert_close(found.embeddings[:, :2], wanted.embeddings, rtol=0, atol=1e-6)
        assert found.masks is not None
        assert wanted.masks is not None
        torch.testing.assert_close(found.masks[:, :2], wanted.masks, rtol=1e-5, atol=1e-5)
        assert not found.embeddings[:, 2:].any()

    def test_save_and_load(self, model: SceneSpot, tmp_path: Path):
        words = WordTable.load(ASSETS)
        scene_folder.save(tmp_path, model, words)
        again, same = scene_folder.load(tmp_path)
        images = torch.rand(1, 3, 64, 64)
        boxes = torch.tensor([[[0.1, 0.1, 0.6, 0.7]]])
        with torch.no_grad():
            one = model.regions(model.maps(images), boxes).embeddings
            two = again.regions(again.maps(images), boxes).embeddings
        assert float((one * two).sum()) > 0.99  # packed a second time
        assert same.words == words.words

    def test_proposals_find_what_the_maps_say(self, model: SceneSpot):
        maps = model.maps(torch.rand(1, 3, 64, 64))
        saliency = torch.full_like(maps.saliency, -8.0)
        saliency[0, 1:4, 2:6] = 8.0
        center = torch.full_like(maps.center, -8.0)
        center[0, 6, 6] = 8.0
        sides = torch.ones_like(maps.sides)
        found = propose(replace(maps, saliency=saliency, center=center, sides=sides), limit=5)
        wanted = torch.tensor([[2.0, 1.0, 6.0, 4.0], [5.5, 5.5, 7.5, 7.5]]) / 8
        order = found.boxes[:, 0].argsort()
        torch.testing.assert_close(found.boxes[order], wanted)


class TestWords:
    def test_known_words_and_their_forms(self):
        table = WordTable.load(ASSETS)
        cat, shouted = table.encode(["cat", "A Cat!"])
        torch.testing.assert_close(cat, shouted)
        small = WordTable(["lady", "box", "bake", "fire", "truck"], torch.eye(5), torch.zeros(5), 0)
        forms = small.encode(["ladies", "boxes", "baking", "baked", "firetrucks"])
        assert [row.nonzero().flatten().tolist() for row in forms] == [[0], [1], [2], [2], [3, 4]]
        near = table.encode(["kitten", "dog", "motorcycle"]) @ cat
        assert near[0] > near[2]
        assert near[1] > near[2]
        both = table.encode(["red apple"])[0]
        assert float(both @ table.encode(["apple"])[0]) > 0.5

    def test_unknown_words(self, caplog: pytest.LogCaptureFixture):
        table = WordTable.load(ASSETS)
        with pytest.raises(DataError, match="'zxqv' has no word among the"):
            table.encode(["zxqv"])
        with caplog.at_level("WARNING", "polyzoo"):
            table.encode(["zxqv cat"])
        assert "is read without 'zxqv'" in caplog.text

    def test_splitting(self):
        assert split_words("Café-Crème 2, cat's  toy") == ["cafe", "creme", "cat", "toy"]

    def test_a_fitted_table_is_nearer_to_phrases(self):
        generator = torch.Generator().manual_seed(0)
        names = [f"word{chr(97 + i)}" for i in range(12)]
        vectors = F.normalize(torch.randn(12, 16, generator=generator), dim=1)
        phrases, targets = [], []
        for i in range(12):
            for j in range(12):
                if i != j:
                    phrases.append(f"{names[i]} {names[j]}")
                    targets.append(F.normalize(vectors[i] + 3 * vectors[j], dim=0))
        wanted = torch.stack(targets)
        plain = fit_table(names, vectors, phrases, wanted, steps=0)
        fitted = fit_table(names, vectors, phrases, wanted, steps=60)
        before = (plain.encode(phrases) * wanted).sum(1).mean()
        after = (fitted.encode(phrases) * wanted).sum(1).mean()
        assert after > before + 0.05
        assert fitted.last > 0.3

    def test_words_near_things_are_chosen(self):
        vectors = {"cat": [1.0, 0.0], "lion": [0.9, 0.1], "because": [0.0, 1.0]}

        def encode(texts: list[str]) -> torch.Tensor:
            return F.normalize(torch.tensor([vectors[text] for text in texts]), dim=1)

        chosen = choose_words(
            {"cat": 4.0}, ["because", "lion"], encode, torch.tensor([[1.0, 0.0]]), count=2
        )
        assert chosen == ["cat", "lion"]


def test_four_bits():
    rows = torch.randn(20, 64)
    back = unpack(*pack(rows))
    assert F.cosine_similarity(rows, back).min() > 0.98
    basis = cosine_basis(64)
    torch.testing.assert_close(basis @ basis.T, torch.eye(64), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="even"):
        pack(torch.zeros(2, 3))


def write_material(folder: Path) -> None:
    """A material folder as `prepare` leaves it, with discs and squares in four colours."""
    folder.mkdir(parents=True)
    colours = [(230, 40, 40), (40, 200, 60), (60, 80, 230), (230, 210, 40)]
    with zipfile.ZipFile(folder / scene_material.CUTOUTS, "w") as archive:
        for place, colour in enumerate(colours * 2):
            image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
            shape = "ellipse" if place < 4 else "rectangle"
            getattr(ImageDraw.Draw(image), shape)((3, 3, 28, 28), fill=(*colour, 255))
            data = io.BytesIO()
            image.save(data, "WEBP", lossless=True)
            archive.writestr(f"{place:05d}.webp", data.getvalue())
    with zipfile.ZipFile(folder / scene_material.BACKGROUNDS, "w") as archive:
        for place in range(2):
            noise = np.random.default_rng(place).integers(0, 90, (64, 64, 3), dtype=np.uint8)
            data = io.BytesIO()
            Image.fromarray(noise).save(data, "JPEG")
            archive.writestr(f"{place}.jpg", data.getvalue())
    torch.manual_seed(0)
    write_weights(folder / scene_material.SALIENCY, {"saliency": torch.zeros(2, 16, 16).byte()})
    write_weights(folder / scene_material.TOWER, Lite0().state_dict())
    vectors = F.normalize(torch.randn(8, 16), dim=1)
    write_weights(
        folder / scene_material.NAMES,
        {
            "vocabulary": vectors.half(),
            "label": torch.arange(8),
            "split": torch.tensor([0] * 6 + [1] * 2),
            "chance": torch.ones(8),
            "classes": F.normalize(torch.randn(1000, 16), dim=1).half(),
            "basis": torch.eye(16),
        },
        metadata={"names": json.dumps([f"thing {i}" for i in range(8)])},
    )
    WordTable(["thing", "cat"], torch.randn(2, 16), torch.zeros(2), 0.0).save(folder)


def test_training_on_scenes(tmp_path: Path):
    write_material(tmp_path / "material")
    config = configs.merge(
        PRESETS["scenes"](),
        {
            "out": tmp_path / "model",
            "scene_model": {"side": 64, "width": 32, "text_dim": 16, "mlp": 32, "pyramid": 16},
            "scenes": {
                "material": tmp_path / "material", "photos_per_step": 1, "boxes_per_photo": 1,
            },
            "train": {
                "run_dir": tmp_path / "run", "steps": 10, "batch_size": 6, "device": "cpu",
                "eval_every": 10, "optim": {"lr": 3e-3}, "schedule": {"warmup_steps": 0},
                "ema": {"decay": None},
                "log": {"every": 1, "progress": False, "plots": False},
            },
        },
    )  # fmt: skip
    report = main(config)
    assert {"reserved_top1", "reserved_mixture_top1", "reserved_all_top5"} <= set(report.valid)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "train"]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    model, words = scene_folder.load(tmp_path / "model")
    assert model.config.text_dim == 16
    assert words.words == ("thing", "cat")
    frozen = Lite0().state_dict().keys()
    assert set(model.tower.state_dict()) == set(frozen)
    assert SceneSpotConfig().text_dim == 192


def test_a_folder_that_is_no_material(tmp_path: Path):
    with pytest.raises(DataError, match="polyzoo regionspot prepare"):
        scene_material.read_material(tmp_path)
