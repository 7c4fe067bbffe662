"""The judge of pictures: fitted on training pictures only, right where the answer is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from polyzoo.core.assets import is_present
from polyzoo.core.errors import DataError, WeightsError
from polyzoo.core.icons import IconPack, IconRecord
from polyzoo.core.icons.pack import write_pack
from polyzoo.core.weights import write_weights
from polyzoo.towers import (
    PromptJudge,
    compare_folders,
    image_batch,
    kernel_distance,
    load_dinov2,
    load_text_tower,
    picture_features,
)
from polyzoo.towers.folders import pictures_in
from polyzoo.towers.judge import SHIPPED, read_prompts
from support.cli import run_cli
from support.tower_samples import scene, small_dinov2

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (30, 60, 220),
    "yellow": (230, 220, 30),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
}


class Colours:
    """A text tower that knows colours: the vector of a text is the colour it names."""

    dim = 3

    def encode(self, texts: Sequence[str]) -> Tensor:
        found = [next(v for k, v in COLOURS.items() if text.startswith(k)) for text in texts]
        return F.normalize(torch.tensor(found, dtype=torch.float32) - 127.5, dim=1)

    def states(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return self.encode(texts)[:, None], torch.ones(len(texts), dtype=torch.long)


def plain(colour: str, rng: np.random.Generator) -> Image.Image:
    noise = rng.integers(-12, 13, (32, 32, 3)) + np.array(COLOURS[colour])
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8)).convert("RGBA")


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> IconPack:
    """Plain colours to train on; the reserved ones carry the wrong name."""
    rng = np.random.default_rng(0)
    names = list(COLOURS)
    items = []
    for number in range(48):
        colour = names[number % 6]
        reserved = number >= 36
        label = names[(number + 1) % 6] if reserved else colour
        record = IconRecord(
            id=str(number),
            concept=str(number),
            style="noto",
            label=label,
            tags=("tag",),
            group=4,
            split="reserved-concept" if reserved else "train",
            licence="MIT",
        )
        items.append((record, plain(colour, rng)))
    folder = tmp_path_factory.mktemp("icons") / "pack"
    write_pack(folder, items, size=32, sources={}, languages={})
    return IconPack.open(folder)


@pytest.fixture(scope="module")
def judge(pack: IconPack) -> PromptJudge:
    return PromptJudge.fit(pack, small_dinov2(), Colours(), penalty=1.0)


def test_it_names_what_it_has_learnt(judge: PromptJudge) -> None:
    rng = np.random.default_rng(1)
    colours = [colour for colour in COLOURS for _ in range(3)]
    pictures = [plain(colour, rng) for colour in colours]
    found = judge.retrieval(pictures, [f"{colour} thing" for colour in colours])
    assert (found.pictures, found.candidates) == (18, 6)
    assert found.recall["1"] > 0.9
    assert found.chance == {"1": 0.1667, "5": 0.8333, "10": 1.0}


def test_reserved_pictures_are_not_learnt(pack: IconPack, judge: PromptJudge) -> None:
    """Their wrong names would have spoilt the map; and without them it is the same map."""
    train = pack.subset(split="train")
    features = picture_features([pack.rgb(index) for index in train], judge.model)
    torch.testing.assert_close(judge.ridge.mean, features.double().mean(0), rtol=0, atol=1e-9)


def test_further_candidates_make_it_harder(judge: PromptJudge) -> None:
    rng = np.random.default_rng(2)
    pictures = [plain("red", rng), plain("blue", rng)]
    found = judge.retrieval(pictures, ["red", "blue"], candidates=["red", "blue", "green"], ks=(1,))
    assert (found.candidates, found.chance) == (3, {"1": 0.3333})
    with pytest.raises(DataError, match="the text 'black' is not among the candidates"):
        judge.retrieval(pictures[:1], ["black"], candidates=["red"])
    with pytest.raises(DataError, match="1 pictures and 2 texts"):
        judge.retrieval(pictures[:1], ["red", "blue"])


def test_it_is_stored_and_read(judge: PromptJudge, tmp_path: Path) -> None:
    judge.save(tmp_path / "judge.safetensors")
    again = PromptJudge.load(judge.model, Colours(), path=tmp_path / "judge.safetensors")
    pictures = [plain(colour, np.random.default_rng(3)) for colour in COLOURS]
    names = list(COLOURS)
    torch.testing.assert_close(
        again.scores(pictures, names), judge.scores(pictures, names), rtol=0, atol=0.02
    )
    with pytest.raises(WeightsError, match="maps 96 features to 3 channels; these towers have 96"):
        wide = Colours()
        wide.dim = 4
        PromptJudge.load(judge.model, wide, path=tmp_path / "judge.safetensors")
    write_weights(tmp_path / "other.safetensors", judge.ridge.tensors())
    with pytest.raises(WeightsError, match="is no prompt judge"):
        PromptJudge.load(judge.model, Colours(), path=tmp_path / "other.safetensors")


def test_features_do_not_depend_on_the_batch() -> None:
    model = small_dinov2()
    pictures = [scene(60), scene(40).rotate(90), scene(50).rotate(180)]
    one = picture_features(pictures, model, batch_size=1, quiet=True)
    three = picture_features(pictures, model, batch_size=3, quiet=True)
    torch.testing.assert_close(one, three, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        expected = model(image_batch([pictures[1]], size=(98, 98)))
    torch.testing.assert_close(one[1, : model.config.dim], expected.cls[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(DataError, match="no pictures"):
        picture_features([], model)


def test_folders_are_compared(tmp_path: Path) -> None:
    model, rng = small_dinov2(), np.random.default_rng(4)
    for folder, colours in (("a", ("red", "blue")), ("b", ("green", "black", "white"))):
        (tmp_path / folder / "deep").mkdir(parents=True)
        for number, colour in enumerate(colours):
            plain(colour, rng).save(tmp_path / folder / "deep" / f"{number}.png")
    (tmp_path / "a" / "note.txt").write_text("not a picture")
    found = compare_folders(tmp_path / "a", tmp_path / "b", model)
    assert (found.first, found.second, found.side) == (2, 3, 98)
    tokens = [
        picture_features(pictures_in(tmp_path / name), model)[:, : model.config.dim]
        for name in ("a", "b")
    ]
    assert found.kernel_distance == pytest.approx(kernel_distance(*tokens), abs=1e-4)
    (tmp_path / "one").mkdir()
    with pytest.raises(DataError, match="one: holds no pictures"):
        compare_folders(tmp_path / "one", tmp_path / "b", model)
    plain("red", rng).save(tmp_path / "one" / "x.png")
    with pytest.raises(DataError, match="holds one picture; two are the least"):
        compare_folders(tmp_path / "one", tmp_path / "b", model)
    with pytest.raises(DataError, match="none: no such folder"):
        compare_folders(tmp_path / "none", tmp_path / "b", model)


def test_prompts_are_read(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"image": "a.png", "prompt": "red"}\n\n{"image": "b/c.png", "prompt": "x"}\n')
    assert read_prompts(file) == [(tmp_path / "a.png", "red"), (tmp_path / "b/c.png", "x")]
    for text in ('{"image": "a.png"}', "[1]", "{", '{"image": 1, "prompt": "x"}'):
        file.write_text(f'{{"image": "a.png", "prompt": "red"}}\n{text}\n')
        with pytest.raises(DataError, match=r"prompts\.jsonl:2: must be"):
            read_prompts(file)
    file.write_text("")
    with pytest.raises(DataError, match="holds no line"):
        read_prompts(file)
    with pytest.raises(DataError, match="no such file"):
        read_prompts(tmp_path / "none.jsonl")


@pytest.mark.skipif(
    not (is_present("dinov2-small") and is_present("minilm")),
    reason="an asset is not fetched; lifted by: polyzoo assets fetch dinov2-small, and minilm",
)
def test_the_shipped_judge_knows_a_ball() -> None:
    assert SHIPPED.stat().st_size < 700_000
    judge = PromptJudge.load(load_dinov2(), load_text_tower("minilm"))
    names = ["crystal ball", "dog face", "racing car", "pine tree", "house", "keyboard", "banana"]
    ball = scene().crop((60, 50, 180, 170))
    assert names[int(judge.scores([ball], names).argmax())] == "crystal ball"


def test_commands_say_what_is_wrong(tmp_path: Path) -> None:
    done = run_cli("towers", "retrieve", tmp_path / "none.jsonl", "--json")
    assert done.returncode == 1
    assert "no such file" in json.loads(done.stderr)["error"]["message"]
    helped = run_cli("towers", "distance", "--help")
    assert helped.returncode == 0
    assert "A folder of pictures" in helped.stdout
