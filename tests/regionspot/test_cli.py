"""The commands as people run them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from support.cli import run_cli
from support.regionspot_models import picture, write_coco

DEMO = Path(__file__).parents[2] / "packages/regionspot/src/polyzoo/regionspot/assets/demo"


def test_help_needs_no_torch():
    for command in ("infer", "train", "eval", "cache", "convert", "prepare"):
        done = run_cli("regionspot", command, "--help")
        assert done.returncode == 0, done.stderr
        assert "usage" in done.stdout
    code = run_cli("regionspot", "train", "paper-bl", "--help")
    assert "paper-bl-336" in code.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["infer", "x.jpg"], "--names"),
        (
            ["infer", "x.jpg", "--names", "cat", "--auto", "--boxes", "b.json"],
            "exclude one another",
        ),
        (["train", "papr-bl"], "did you mean paper-bl"),
        (["eval"], "annotations"),
    ],
)
def test_wrong_usage_in_one_line(arguments: list[str], said: str):
    done = run_cli("regionspot", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_infer_writes_everything(tmp_path: Path):
    (tmp_path / "boxes.json").write_text("[[168, 16, 420, 312], [318, 64, 432, 332]]")
    done = run_cli(
        "regionspot", "infer", DEMO / "coffee.jpg", "--names", "coffee cup,horse,car",
        "--boxes", tmp_path / "boxes.json", "--overlay", tmp_path / "o.png",
        "--out", tmp_path / "r.csv", "--device", "cpu", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["images"][0]
    assert result["regions"][0]["name"] == "coffee cup"
    assert result["regions"][0]["box"] == [168, 16, 420, 312]
    assert result["regions"][0]["mask"]["size"] == [400, 600]
    with Image.open(tmp_path / "o.png") as drawn:
        assert drawn.size == (600, 400)
    rows = (tmp_path / "r.csv").read_text().splitlines()
    assert len(rows) == 3
    assert rows[1].endswith(f"{result['regions'][0]['score']:.4f}")


def test_infer_on_a_folder_finds_regions_itself(tmp_path: Path):
    (tmp_path / "in").mkdir()
    for index in range(2):
        picture(90, 70, index).save(tmp_path / "in" / f"{index}.png")
    done = run_cli(
        "regionspot", "infer", tmp_path / "in", "--names", "ball,car", "--limit", "3",
        "--overlay", tmp_path / "out", "--out", tmp_path / "r.coco.json", "--device", "cpu",
        "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.png", "1.png"]
    rows = json.loads((tmp_path / "r.coco.json").read_text())
    assert {row["image_id"] for row in rows} <= {1, 2}


def test_eval(tmp_path: Path):
    path, images = write_coco(tmp_path / "coco")
    done = run_cli(
        "regionspot", "eval", "--annotations", path, "--images", images, "--device", "cpu",
        "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["images"], report["boxes"]) == (6, 12)
    assert 0 <= report["top1"] <= report["top5"] == 1


def test_errors_say_what_to_do(tmp_path: Path):
    done = run_cli("regionspot", "infer", tmp_path / "no.jpg", "--names", "cat", "--device", "cpu")
    assert done.returncode == 1
    assert "no such file" in done.stderr
