"""The `eval` command: how near the small model's images are to real ones, and to their prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from polyzoo.core.icons import IconPack
from polyzoo.core.icons.captions import prompt as plain_prompt
from polyzoo.core.icons.records import CORE_GROUPS
from polyzoo.pixart_delta.edges import edge_agreement, edge_maps
from polyzoo.pixart_delta.folders import write_json
from polyzoo.pixart_delta.options import EvalConfig
from polyzoo.pixart_delta.pictures import to_tensor
from polyzoo.pixart_delta.pipeline import PixArtDeltaPipeline
from polyzoo.towers import kernel_distance, load_dinov2, load_text_tower
from polyzoo.towers.pictures import image_batch
from polyzoo.towers.retrieval import recall_at
from polyzoo.towers.ridge import RidgeMap

_SIDE = 98
_RIDGE_PICTURES = 400
"""Training pictures that the map from features to text vectors is fitted on."""


@dataclass(frozen=True)
class SetFigures:
    """One way of drawing, measured."""

    name: str
    images: int
    kernel_distance: float
    """To the real pictures of the same prompts, DINOv2 class tokens, 98 px."""
    recall_1: float
    """Share of images whose name is the nearest of all names by a linear map of features."""
    recall_5: float
    recall_10: float


@dataclass(frozen=True)
class EvalReport:
    """Figures of all ways of drawing; the first row is the real pictures themselves."""

    split: str
    names: int
    """Different names among which the right one is looked for."""
    sets: list[SetFigures]
    edge_f1: dict[str, float]
    """Agreement of outlines with the control map, with and without control."""
    out: str


def main(config: EvalConfig) -> EvalReport:
    """Run the command."""
    pack = IconPack.open(config.icons)
    groups: list[int | None] = [*CORE_GROUPS]
    chosen = pack.subset(split=config.split, groups=groups)
    order = random.Random(config.seed).sample(chosen, min(config.images, len(chosen)))  # noqa: S311
    records = [pack.records[i] for i in order]
    real = [Image.fromarray(pack.rgb(i)) for i in order]
    prompts = [plain_prompt(record.label, record.style) for record in records]
    measure = _Measure(pack, [record.label for record in records], real, config)
    sets = [measure(f"real pictures ({config.split})", real)]
    pipe = PixArtDeltaPipeline.from_pretrained(config.model, device=config.device)
    draw = _Drawer(pipe, prompts, config)
    grids: dict[str, list[Image.Image]] = {"real": real}
    for steps in config.steps:
        grids[f"lcm {steps}"] = draw(num_inference_steps=steps, scheduler="lcm")
    edges: dict[str, float] = {}
    if config.control and pipe.controlnet is not None:
        edges = _edges(draw, real, grids, config)
    pipe.unload_lora_weights()
    pipe.kind = "base"
    teacher = f"teacher ddim {config.teacher_steps}, guidance {config.guidance:g}"
    grids[teacher] = draw(
        num_inference_steps=config.teacher_steps, scheduler="ddim", guidance_scale=config.guidance
    )
    grids["ddim 4, guided"] = draw(
        num_inference_steps=4, scheduler="ddim", guidance_scale=config.guidance
    )
    sets += [measure(name, images) for name, images in grids.items() if name != "real"]
    config.out.mkdir(parents=True, exist_ok=True)
    shown = [name for name in grids if not name.startswith("edges")]
    _grid([grids[name][:16] for name in shown]).save(config.out / "sets.png")
    if edges:
        rows = [name for name in grids if name.startswith("edges")]
        _grid([real[:16], *(grids[name][:16] for name in rows)]).save(config.out / "control.png")
    report = EvalReport(config.split, measure.names, sets, edges, str(config.out))
    write_json(config.out / "figures.json", {**asdict(report), "rows": shown})
    return report


class _Drawer:
    """Draws all prompts one way; image i has seed + i whatever the way."""

    def __init__(
        self, pipe: PixArtDeltaPipeline, prompts: Sequence[str], config: EvalConfig
    ) -> None:
        self.pipe, self.prompts, self.config = pipe, prompts, config

    def __call__(
        self, *, controls: Sequence[Image.Image] = (), **options: Any
    ) -> list[Image.Image]:
        images: list[Image.Image] = []
        for start in range(0, len(self.prompts), self.config.batch):
            part = self.prompts[start : start + self.config.batch]
            more = dict(options)
            if controls:
                more |= {
                    "control_image": list(controls[start : start + len(part)]),
                    "control_type": "edges",
                }
            seeds = [self.config.seed + start + i for i in range(len(part))]
            images += self.pipe(part, seed=seeds, **more).images  # pyright: ignore[reportOperatorIssue]
        return images


class _Measure:
    """Kernel distance to the real pictures, and retrieval of the name."""

    def __init__(
        self,
        pack: IconPack,
        labels: Sequence[str],
        real: Sequence[Image.Image],
        config: EvalConfig,
    ) -> None:
        self.network = load_dinov2(device=config.device)
        self.device = next(self.network.parameters()).device
        text = load_text_tower("minilm")
        names = sorted(set(labels))
        self.names = len(names)
        self.truth = torch.tensor([names.index(label) for label in labels])
        self.vectors = text.encode(names).cpu()
        groups: list[int | None] = [*CORE_GROUPS]
        train = pack.subset(split="train", groups=groups)
        picked = random.Random(config.seed).sample(train, min(_RIDGE_PICTURES, len(train)))  # noqa: S311
        _, pooled = self.features([Image.fromarray(pack.rgb(i)) for i in picked])
        described = [", ".join((pack.records[i].label, *pack.records[i].tags)) for i in picked]
        self.ridge = RidgeMap.fit(pooled, text.encode(described).cpu())
        self.real, _ = self.features(real)

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Class tokens `(n, d)`, and pooled features `(n, 2 d)`."""
        tokens, pooled = [], []
        for start in range(0, len(pictures), 32):
            batch = image_batch(list(pictures[start : start + 32]), size=(_SIDE, _SIDE))
            found = self.network(batch.to(self.device))
            tokens.append(found.cls.cpu())
            pooled.append(found.pooled.cpu())
        return torch.cat(tokens), torch.cat(pooled)

    def __call__(self, name: str, pictures: Sequence[Image.Image]) -> SetFigures:
        tokens, pooled = self.features(pictures)
        recall = recall_at(self.ridge(pooled) @ self.vectors.T, self.truth)
        distance = 0.0 if name.startswith("real") else kernel_distance(tokens, self.real)
        return SetFigures(
            name, len(pictures), round(distance, 3), *(round(recall[k], 3) for k in (1, 5, 10))
        )


def _edges(
    draw: _Drawer, real: Sequence[Image.Image], grids: dict[str, list[Image.Image]],
    config: EvalConfig,
) -> dict[str, float]:  # fmt: skip
    wanted = edge_maps(to_tensor(real))
    steps = 4 if 4 in config.steps else config.steps[-1]
    grids["edges wanted"] = [
        Image.fromarray((row[0] * 255).byte().numpy()).convert("RGB") for row in wanted
    ]
    grids["edges: with control"] = draw(controls=real, num_inference_steps=steps, scheduler="lcm")
    grids["edges: without control"] = grids[f"lcm {steps}"]
    return {
        name.removeprefix("edges: "): round(
            float(edge_agreement(edge_maps(to_tensor(grids[name])), wanted).mean()), 3
        )
        for name in ("edges: with control", "edges: without control")
    }


def _grid(rows: Sequence[Sequence[Image.Image]], side: int = 64) -> Image.Image:
    """Pictures side by side, a row for each set."""
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * side, len(rows) * side), "white")
    for top, row in enumerate(rows):
        for left, picture in enumerate(row):
            sheet.paste(picture.resize((side, side)), (left * side, top * side))
    return sheet


def render(report: EvalReport) -> str:
    """The report for people."""
    lines = [f"{report.split}, {report.names} names; grids in {Path(report.out)}"]
    lines += [
        f"{row.name:36} kernel distance {row.kernel_distance:7.3f}  R@1 {row.recall_1:.2f} "
        f"R@5 {row.recall_5:.2f} R@10 {row.recall_10:.2f}  ({row.images} images)"
        for row in report.sets
    ]
    lines += [f"edge F1 {name}: {value:.3f}" for name, value in report.edge_f1.items()]
    return "\n".join(lines)
