"""What the frozen towers know, in figures: the ones in the towers' README.

    python benchmarks/towers_figures.py [--icons DIR] [--photos DIR] [--images N] [--quick]

One JSON line per figure. Needs the assets minilm, wordllama, efficientnet-lite0 and dinov2-small
(`polyzoo assets fetch NAME`); what is missing is said and left out. `--icons` is a pack
(`polyzoo icons build`); `--photos` a folder with `boxes.json` (COCO style) and `images/`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyzoo.core.assets import is_present
from polyzoo.core.icons import IconPack
from polyzoo.core.icons.records import CORE_GROUPS
from polyzoo.core.icons.sources import STYLES
from polyzoo.towers import (
    Conse,
    PromptJudge,
    crop_boxes,
    kernel_distance,
    load_classifier,
    load_dinov2,
    load_text_tower,
    picture_features,
    propose,
    recall_at,
)

Row = dict[str, Any]
PAIRS = (
    ("a photo of a cat", "a kitten"),
    ("a photo of a cat", "a racing car"),
    ("how do I sort a list in python?", "def sort_list(xs): return sorted(xs)"),
)


def cosines() -> Iterator[Row]:
    for name in ("minilm", "wordllama"):
        tower = load_text_tower(name)
        for one, other in PAIRS:
            a, b = tower.encode([one, other])
            yield {"figure": "cosine", "tower": name, "texts": [one, other], "value": float(a @ b)}


def labels_found(icons: Path, images: int) -> Iterator[Row]:
    """How often the judge finds the label of a real picture that nothing was trained on."""
    pack = IconPack.open(icons)
    judge = PromptJudge.load(load_dinov2(), load_text_tower("minilm"))
    for split in ("reserved-concept", "reserved-combination"):
        for style in STYLES:
            held = pack.subset(split=split, styles=[style], groups=(*CORE_GROUPS, None))[:images]
            if not held:  # clip art has no combinations
                continue
            labels = [pack.records[index].label for index in held]
            found = judge.retrieval([pack.rgb(index) for index in held], labels)
            yield {"figure": "label", "split": split, "style": style, **asdict(found)}


def styles(icons: Path, images: int) -> Iterator[Row]:
    """Kernel distance between halves of one style and between styles."""
    pack, model = IconPack.open(icons), load_dinov2()
    chance = random.Random(0)
    tokens: dict[str, Tensor] = {}
    for style in ("fluent-3d", "noto", "clipart"):
        chosen = pack.subset(styles=[style], groups=(*CORE_GROUPS, None))
        chosen = chance.sample(chosen, min(images, len(chosen)))
        features = picture_features([pack.rgb(index) for index in chosen], model)
        tokens[style] = features[:, : model.config.dim]
        half = len(chosen) // 2
        value = kernel_distance(tokens[style][:half], tokens[style][half:])
        yield {"figure": "kernel distance", "between": [style, style], "each": half, "value": value}
    for one, other in (("fluent-3d", "noto"), ("noto", "clipart"), ("fluent-3d", "clipart")):
        value = kernel_distance(tokens[one], tokens[other])
        yield {
            "figure": "kernel distance",
            "between": [one, other],
            "each": [len(tokens[one]), len(tokens[other])],
            "value": value,
        }


def photographs(folder: Path) -> Iterator[Row]:
    """Names of hand-drawn boxes by ConSE; boxes found again by saliency."""
    table = json.loads((folder / "boxes.json").read_text())
    names = [category["name"] for category in table["categories"]]
    places = {category["id"]: place for place, category in enumerate(table["categories"])}
    boxes: dict[int, list[tuple[float, ...]]] = {}
    truth: list[int] = []
    for image in table["images"]:
        for item in table["annotations"]:
            if item["image_id"] == image["id"]:
                x, y, width, height = item["bbox"]
                boxes.setdefault(image["id"], []).append((x, y, x + width, y + height))
                truth.append(places[item["category_id"]])
    files = {image["id"]: folder / "images" / image["file_name"] for image in table["images"]}
    classifier = load_classifier()
    crops = [crop for key, file in files.items() for crop in crop_boxes(file, boxes[key])]
    for tower in ("minilm", "wordllama"):
        conse = Conse(classifier, load_text_tower(tower))
        start = time.perf_counter()
        scores = conse.scores(crops, names)
        seconds = (time.perf_counter() - start) / len(crops)
        recall = recall_at(scores, torch.tensor(truth), ks=(1, 5))
        yield {
            "figure": "crop + ConSE",
            "tower": tower,
            "boxes": len(crops),
            "names": len(names),
            "recall": recall,
            "ms_a_box": round(1000 * seconds, 1),
        }
    model = load_dinov2()
    found = [max_overlaps(propose(file, model), boxes[key]) for key, file in files.items()]
    flat = [value for values in found for value in values]
    yield {
        "figure": "boxes found by saliency (IoU 0.5)",
        "boxes": len(flat),
        "share": sum(value >= 0.5 for value in flat) / len(flat),
        "images_with_one_found": sum(max(values) >= 0.5 for values in found),
        "images": len(found),
    }


def max_overlaps(proposals: list[Any], boxes: list[tuple[float, ...]]) -> list[float]:
    return [max((overlap(p.box, box) for p in proposals), default=0.0) for box in boxes]


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return width * height / (sum(areas) - width * height)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--icons", type=Path)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--images", type=int, default=350, help="pictures of a style at most")
    parser.add_argument("--quick", action="store_true", help="few pictures")
    arguments = parser.parse_args()
    images = 12 if arguments.quick else arguments.images
    parts: list[tuple[tuple[str, ...], Iterator[Row]]] = [(("minilm", "wordllama"), cosines())]
    if arguments.icons:
        parts.append((("dinov2-small",), styles(arguments.icons, images)))
        parts.append((("minilm", "dinov2-small"), labels_found(arguments.icons, images)))
    if arguments.photos:
        needed = ("minilm", "wordllama", "efficientnet-lite0", "dinov2-small")
        parts.append((needed, photographs(arguments.photos)))
    for needed, rows in parts:
        absent = [name for name in needed if not is_present(name)]
        if absent:
            print(json.dumps({"left out": rows.__name__, "absent assets": absent}))
            continue
        for row in rows:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
