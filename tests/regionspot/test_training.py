"""Caching, training, evaluation and conversion, on tiny models and the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polyzoo.core import config as configs
from polyzoo.core.errors import ConfigError, DataError
from polyzoo.core.weights import write_weights
from polyzoo.regionspot.cache import CachedData, TokenMaker, build_cache
from polyzoo.regionspot.data import (
    OnlineData,
    augment,
    collate,
    random_crop,
    read_annotations,
    squashed_uint8,
)
from polyzoo.regionspot.evaluate import evaluate
from polyzoo.regionspot.folders import load_on_towers
from polyzoo.regionspot.integration import Integration, region_logits
from polyzoo.regionspot.losses import region_loss
from polyzoo.regionspot.metrics import top_k
from polyzoo.regionspot.options import EvalConfig
from polyzoo.regionspot.paper_objective import PaperStep, region_tokens
from polyzoo.regionspot.pipeline import RegionSpotPipeline
from polyzoo.regionspot.presets import PRESETS, RegionSpotTrainConfig
from polyzoo.regionspot.text import fingerprint
from polyzoo.regionspot.train import main
from support.regionspot_models import (
    tiny_config,
    tiny_model,
    tiny_pipeline,
    tiny_sam,
    write_coco,
)


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def pipeline() -> RegionSpotPipeline:
    return tiny_pipeline()


def maker(seed: int = 0) -> TokenMaker:
    return TokenMaker(tiny_model(seed).sam, tiny_sam(), torch.device("cpu"))


class TestAnnotations:
    def test_reading(self, coco: tuple[Path, Path]):
        found = read_annotations(*coco)
        assert [len(image.labels) for image in found.images] == [1, 2, 3, 1, 2, 3]
        assert found.names == ("red_square", "green_square", "blue_square")
        assert found.category_ids == (3, 10, 17)
        assert found.without_boxes == 1
        row = json.loads(coco[0].read_text())["annotations"][0]
        x, y, w, h = row["bbox"]
        assert found.images[0].boxes[0].tolist() == [x, y, x + w, y + h]

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"category_id": 5}, "category_id 5, which is not among the 3"),
            ({"image_id": 5}, "unknown image_id 5"),
            ({"bbox": [1, 2]}, r"annotations\[0\] is damaged"),
        ],
    )
    def test_refusing(
        self, coco: tuple[Path, Path], tmp_path: Path, change: dict[str, object], said: str
    ):
        data = json.loads(coco[0].read_text())
        data["annotations"][0] |= change
        (tmp_path / "bad.json").write_text(json.dumps(data))
        with pytest.raises(DataError, match=said):
            read_annotations(tmp_path / "bad.json", coco[1])

    def test_equal_names_share_a_row(self, coco: tuple[Path, Path], tmp_path: Path):
        data = json.loads(coco[0].read_text())
        data["categories"][2]["name"] = "red_square"
        (tmp_path / "same.json").write_text(json.dumps(data))
        found = read_annotations(tmp_path / "same.json", coco[1])
        assert found.names == ("red_square", "green_square")
        assert int(max(image.labels.max() for image in found.images)) < 2


class TestAugmentation:
    """What happens to the image happens to its boxes, before either tower sees it."""

    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize("crop", [None, (10, 4, 58, 44)])
    def test_boxes_follow_the_pixels(self, flip: bool, crop: tuple[int, int, int, int] | None):
        image = Image.new("RGB", (64, 48))
        image.paste((255, 0, 0), (20, 10, 40, 30))
        given = torch.tensor([[20.0, 10.0, 40.0, 30.0], [0.0, 40.0, 9.0, 48.0]])
        out, moved, labels = augment(image, given, torch.tensor([4, 5]), flip=flip, crop=crop)
        red = np.asarray(out)[..., 0] > 0
        ys, xs = red.any(1).nonzero()[0], red.any(0).nonzero()[0]
        assert moved[0].tolist() == [xs[0], ys[0], xs[-1] + 1, ys[-1] + 1]
        assert labels.tolist() == ([4, 5] if crop is None else [4])

    def test_both_towers_see_the_same_flip_and_crop(self, coco: tuple[Path, Path]):
        dataset = read_annotations(*coco)
        data = OnlineData(dataset, sam_side=64, clip_side=28, antialias=False, augmented=True)
        plain = OnlineData(dataset, sam_side=64, clip_side=28, antialias=False, augmented=False)
        changed = 0
        for seed in range(24):
            torch.manual_seed(seed)
            sample = data[1]
            assert sample.sam is not None
            assert sample.boxes is not None
            # The mean colour inside every box is the same in SAM's and in CLIP's picture.
            height, width = sample.sam.shape[1:]
            for x0, y0, x1, y1 in sample.boxes.tolist():
                inside = sample.sam[:, round(y0) + 2 : round(y1) - 2, round(x0) + 2 : round(x1) - 2]
                across, down = 28 / width, 28 / height
                small = sample.clip[
                    :, int(y0 * down) + 1 : max(int(y0 * down) + 2, int(y1 * down) - 1),
                    int(x0 * across) + 1 : max(int(x0 * across) + 2, int(x1 * across) - 1),
                ]  # fmt: skip
                means = inside.float().mean((1, 2)), small.float().mean((1, 2))
                assert means[0].argmax() == means[1].argmax()
            changed += not torch.equal(sample.clip, plain[1].clip)
        assert 6 < changed < 24

    def test_crops_stay_inside(self):
        import random

        generator = random.Random(0)
        for _ in range(50):
            crop = random_crop(40, 30, generator, chance=1.0)
            assert crop is not None
            assert 0 <= crop[0] < crop[2] <= 40
            assert 0 <= crop[1] < crop[3] <= 30

    def test_mirrored_tokens_are_those_of_the_mirrored_image(
        self, coco: tuple[Path, Path], tmp_path: Path
    ):
        dataset = read_annotations(*coco)
        build_cache(dataset, maker(), tmp_path, image_size=28)
        data = CachedData(tmp_path)
        row = dataset.images[2]
        image = Image.open(row.file).convert("RGB")
        flipped, boxes, _ = augment(image, row.boxes, row.labels, flip=True)
        wanted = maker().tokens(flipped, boxes)
        squashed = squashed_uint8(flipped, 28, antialias=False)
        seen = set()
        for seed in range(20):
            torch.manual_seed(seed)
            sample = data[2]
            assert sample.tokens is not None
            mirrored = torch.equal(sample.tokens, wanted)
            difference = (sample.clip.int() - squashed.int()).abs().max()
            assert mirrored == (int(difference) <= 1)
            seen.add(mirrored)
        assert seen == {False, True}


class TestCache:
    def test_it_goes_on_where_it_stopped(self, coco: tuple[Path, Path], tmp_path: Path):
        dataset = read_annotations(*coco)
        first = build_cache(dataset, maker(), tmp_path, image_size=28, shard=2)
        assert (first.images, first.boxes, first.made) == (6, 12, 6)
        size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
        before = [CachedData(tmp_path, augmented=False)[i] for i in range(6)]
        (tmp_path / "tokens-00001.safetensors").unlink()
        with pytest.raises(DataError, match=r"not finished, tokens-00001.*goes on"):
            CachedData(tmp_path)
        again = build_cache(dataset, maker(), tmp_path, image_size=28, shard=2)
        assert again.made == 2
        data = CachedData(tmp_path, augmented=False)
        for index, sample in enumerate(before):
            assert torch.equal(data[index].clip, sample.clip)
            assert torch.equal(data[index].tokens, sample.tokens)
            assert torch.equal(data[index].labels, sample.labels)
        assert again.bytes_per_image == pytest.approx(size / 6)

    def test_of_another_sam_or_size(self, coco: tuple[Path, Path], tmp_path: Path):
        dataset = read_annotations(*coco)
        build_cache(dataset, maker(), tmp_path, image_size=28)
        with pytest.raises(DataError, match="this cache has sam"):
            build_cache(dataset, maker(1), tmp_path, image_size=28)
        with pytest.raises(DataError, match="this cache has image_size 28, this call asks for 35"):
            build_cache(dataset, maker(), tmp_path, image_size=35)
        with pytest.raises(DataError, match="tokens of SAM"):
            CachedData(tmp_path, sam="0" * 64)
        with pytest.raises(DataError, match="this CLIP reads 224"):
            CachedData(tmp_path, image_size=224)
        with pytest.raises(DataError, match="is no cache"):
            CachedData(tmp_path / "nowhere")

    def test_cached_and_live_tokens_agree(self, coco: tuple[Path, Path], tmp_path: Path):
        dataset = read_annotations(*coco)
        model = tiny_model()
        build_cache(dataset, maker(), tmp_path, image_size=28)
        cached = CachedData(tmp_path, sam=fingerprint(model.sam), augmented=False)
        live = OnlineData(dataset, sam_side=64, clip_side=28, antialias=False, augmented=False)
        batch = collate([cached[i] for i in range(6)])
        online = collate([live[i] for i in range(6)])
        found = region_tokens(model, online)
        torch.testing.assert_close(found, batch["tokens"].float(), rtol=1e-3, atol=2e-3)
        assert torch.equal(batch["clip"], online["clip"])
        assert torch.equal(batch["present"], online["present"])


def recipe(coco: tuple[Path, Path], folder: Path, **paper: object) -> RegionSpotTrainConfig:
    return configs.merge(
        replace(PRESETS["paper-bl"](), model=tiny_config()),
        {
            "out": folder / "model",
            "paper": {"templates": "plain", **paper},
            "train": {
                "run_dir": folder / "run", "steps": 12, "batch_size": 3, "device": "cpu",
                "optim": {"lr": 2e-3}, "schedule": {"kind": "constant", "warmup_steps": 0},
                "data": {"workers": 0, "drop_last": False}, "checkpoint": {"every": 6},
                "log": {"every": 1, "progress": False, "plots": False},
            },
        },
    )  # fmt: skip


class TestTraining:
    def test_from_a_cache_and_again_after_a_stop(
        self, coco: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setenv("POLYZOO_HOME", str(tmp_path / "home"))
        model = tiny_model()
        towers = {"sam_weights": tmp_path / "sam.safetensors",
                  "clip_weights": tmp_path / "clip.safetensors"}  # fmt: skip
        write_weights(towers["sam_weights"], model.sam.state_dict())
        write_weights(towers["clip_weights"], model.clip.state_dict())
        build_cache(read_annotations(*coco), maker(), tmp_path / "cache", image_size=28)
        whole = recipe(coco, tmp_path / "a", cache=tmp_path / "cache", **towers)
        report = main(whole)
        assert report.steps == 12
        losses = logged(tmp_path / "a" / "run")
        assert losses[12] < 0.8 * losses[1]
        part = configs.merge(
            recipe(coco, tmp_path / "b", cache=tmp_path / "cache", **towers),
            {"train": {"steps": 6}},
        )
        main(part)
        main(configs.merge(part, {"train": {"steps": 12}}))
        assert logged(tmp_path / "b" / "run") == losses
        trained = load_on_towers(tmp_path / "a" / "model", **towers)
        assert len(trained.trained_tensors()) == 60
        other = load_on_towers(tmp_path / "b" / "model", **towers)
        for name, tensor in trained.trained_tensors().items():
            assert torch.equal(tensor, other.trained_tensors()[name])

    def test_without_a_cache(self, coco: tuple[Path, Path], tmp_path: Path):
        config = recipe(coco, tmp_path, annotations=coco[0], images=coco[1])
        report = main(configs.merge(config, {"train": {"steps": 2}}))
        assert report.steps == 2
        assert report.trained == sum(p.numel() for p in tiny_model().integration.parameters())

    def test_no_data(self, coco: tuple[Path, Path], tmp_path: Path):
        with pytest.raises(ConfigError, match=r"paper\.cache"):
            main(recipe(coco, tmp_path))
        with pytest.raises(ConfigError, match=r"scenes\.material"):
            main(PRESETS["scenes"]())

    def test_the_published_repetition(self):
        """Repeated boxes give the published loss; padding gives the mean over real boxes."""
        model = tiny_model()
        classes = torch.nn.functional.normalize(torch.randn(5, 24), dim=1)
        batch = {
            "clip": torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8),
            "tokens": torch.randn(2, 3, 32),
            "labels": torch.tensor([[0, 1, 2], [3, 0, 0]]),
            "present": torch.tensor([[True, True, True], [True, False, False]]),
        }
        ours = PaperStep(classes, 20.0)(model.integration, model, batch).loss
        official = PaperStep(classes, 20.0, compat="official")(model.integration, model, batch).loss
        pixels = batch["clip"].float() / 255
        from polyzoo.regionspot.clip import MEAN, STD

        mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
        memory = model.semantic_map((pixels - mean) / std)
        repeated = torch.stack([batch["tokens"][0], batch["tokens"][1, :1].repeat(3, 1)])
        labels = torch.tensor([[0, 1, 2], [3, 3, 3]])
        wanted = region_loss(region_logits(model(repeated, memory), classes, 20.0), labels)
        torch.testing.assert_close(official, wanted)
        each = [
            region_loss(
                region_logits(
                    model(batch["tokens"][i : i + 1, :k], memory[i : i + 1]), classes, 20.0
                ),
                batch["labels"][i : i + 1, :k],
            )
            for i, k in ((0, 3), (1, 1))
        ]
        torch.testing.assert_close(ours, each[0] + each[1], rtol=1e-5, atol=1e-5)

    def test_only_the_map_and_the_token_together_solve_the_lookup(self):
        """The module learns to read the map where the token points, and cannot without either."""
        assert lookup() > 0.9
        assert lookup(map_on=False, steps=60) < 0.5
        assert lookup(token_on=False, steps=60) < 0.6


def logged(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["event"] == "train"}


def lookup(*, map_on: bool = True, token_on: bool = True, steps: int = 220) -> float:
    from polyzoo.regionspot.config import IntegrationConfig

    torch.manual_seed(0)
    width, classes, patches, boxes = 32, 4, 6, 4
    codes = torch.nn.functional.normalize(torch.randn(classes, width), dim=1)
    places = torch.nn.functional.normalize(torch.randn(patches, width), dim=1)
    project = torch.randn(width, 24) / width**0.5
    names = torch.nn.functional.normalize(torch.randn(classes, 16), dim=1)
    config = IntegrationConfig(heads=2, layers=2, mlp=64, dropout=0.0)
    module = Integration(24, width, 16, config)
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3)

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        kinds = torch.randint(0, classes, (count, patches))
        at = torch.stack([torch.randperm(patches)[:boxes] for _ in range(count)])
        memory = codes[kinds] + places
        memory = torch.cat([torch.zeros(count, 1, width), memory], 1) * map_on
        return places[at] @ project * token_on, memory, kinds.gather(1, at)

    for _ in range(steps):
        tokens, memory, labels = draw(64)
        logits = region_logits(module(tokens, memory), names, 20.0)
        loss = region_loss(logits, labels) / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        tokens, memory, labels = draw(256)
        logits = region_logits(module(tokens, memory), names, 20.0)
    return float((logits.argmax(-1) == labels).float().mean())


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
class TestEvaluation:
    def options(self, coco: tuple[Path, Path], **changes: object) -> EvalConfig:
        return EvalConfig(annotations=coco[0], images=coco[1], device="cpu", **changes)  # pyright: ignore

    def test_top_k_counts_ties_against_the_model(self):
        scores = torch.tensor([[3.0, 2, 1], [1, 1, 1], [0, 1, 2]])
        found = top_k(scores, torch.tensor([0, 1, 2]))
        assert found.top1 == pytest.approx(2 / 3)
        assert found.top5 == 1.0

    def test_top_1_of_boxes(self, coco: tuple[Path, Path], pipeline: RegionSpotPipeline):
        dataset = read_annotations(*coco)
        report = evaluate(self.options(coco), dataset, pipeline)
        names = ["red square", "green square", "blue square"]
        right = sum(
            label == names[int(own)]
            for image in dataset.images
            for label, own in zip(
                pipeline(image.file, names=names, boxes=image.boxes, masks=False).labels,
                image.labels, strict=True,
            )
        )  # fmt: skip
        assert report.top1 == pytest.approx(right / 12)
        assert (report.images, report.boxes, report.names, report.top5) == (6, 12, 3, 1.0)

    @pytest.mark.parametrize("protocol", ["coco", "lvis"])
    def test_average_precision(
        self, coco: tuple[Path, Path], pipeline: RegionSpotPipeline, tmp_path: Path, protocol: str
    ):
        path = coco[0]
        data = json.loads(path.read_text())
        if protocol == "lvis":
            for row in data["images"]:
                row |= {"not_exhaustive_category_ids": [], "neg_category_ids": [3, 10, 17],
                        "coco_url": f"http://x/val/{row['file_name']}"}  # fmt: skip
            for row in data["categories"]:
                row |= {"frequency": "f", "image_count": 4, "instance_count": 4}
            for row in data["annotations"]:
                x, y, w, h = row["bbox"]
                row["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            path = tmp_path / "lvis.json"
            path.write_text(json.dumps(data))
        proposals = {row["image_id"]: {"boxes": [], "scores": []} for row in data["annotations"]}
        for row in data["annotations"]:
            x, y, w, h = row["bbox"]
            proposals[row["image_id"]]["boxes"].append([x, y, x + w, y + h])
            proposals[row["image_id"]]["scores"].append(0.9)
        (tmp_path / "boxes.json").write_text(json.dumps(proposals))
        options = EvalConfig(
            annotations=path,
            images=coco[1],
            protocol=protocol,
            device="cpu",
            proposals=tmp_path / "boxes.json",
        )  # pyright: ignore
        report = evaluate(options, read_annotations(path, coco[1]), pipeline)
        assert report.top1 is None
        assert report.box_ap is not None
        # Every box is right and gets every name: precision is at least that of chance.
        assert 0.1 < report.box_ap["AP"] <= 1.0

    def test_bad_proposals(
        self, coco: tuple[Path, Path], pipeline: RegionSpotPipeline, tmp_path: Path
    ):
        (tmp_path / "p.json").write_text("[1]")
        options = self.options(coco, proposals=tmp_path / "p.json")
        with pytest.raises(DataError, match="must be JSON such as"):
            evaluate(options, read_annotations(*coco), pipeline)

    def test_nothing_to_measure(self, coco: tuple[Path, Path], pipeline: RegionSpotPipeline):
        dataset = replace(read_annotations(*coco), images=())
        with pytest.raises(DataError, match="no image with a box"):
            evaluate(self.options(coco), dataset, pipeline)


def test_an_official_checkpoint_round_trips(tmp_path: Path):
    """The published layout, with frozen parts; and its number of weights at full size."""
    from polyzoo.regionspot.config import IntegrationConfig
    from polyzoo.regionspot.convert import compare_tower, load_module
    from polyzoo.regionspot.model import split_official

    model = tiny_model()
    official = {f"model.{name}": tensor for name, tensor in model.trained_tensors().items()}
    official |= {f"model.sam.{name}": tensor for name, tensor in model.sam.state_dict().items()}
    official |= {f"model.clip_model.{n}": tensor for n, tensor in model.clip.state_dict().items()}
    official["model.ln_clip.weight"] = torch.zeros(3)
    parts = split_official(official)
    fresh = tiny_model(1)
    load_module(fresh, parts["integration"], source="x")
    compare_tower(fresh.sam, parts["sam"], name="sam", given=False)
    compare_tower(fresh.clip, parts["clip"], name="clip", given=False)
    for a, b in zip(fresh.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    from polyzoo.core.errors import WeightsError

    with pytest.raises(WeightsError, match="was trained with other weights"):
        compare_tower(tiny_model(1).sam, parts["sam"], name="sam", given=True)
    for width, text, count in ((768, 512, 24_226_304), (1024, 768, 38_853_376)):
        with torch.device("meta"):
            full = Integration(256, width, text, IntegrationConfig())
        assert len(full.state_dict()) == 60
        assert sum(p.numel() for p in full.parameters()) == count
