"""The four stages of a tokenizer's training: what each builds, minimises, measures and leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyzoo.core.errors import ConfigError
from polyzoo.seed.asset_tower import load_dino
from polyzoo.seed.augment import beside, views
from polyzoo.seed.bank import ImageBank
from polyzoo.seed.codebook import CodebookHealth, plot_usage
from polyzoo.seed.decoder import PixelDecoder
from polyzoo.seed.folders import SeedParts, load_parts, save_decoder, save_parts
from polyzoo.seed.material import Material
from polyzoo.seed.model import SeedModel
from polyzoo.seed.objective import (
    DecoderStage,
    GeneratorTarget,
    Losses,
    Stage1,
    Stage2,
    TowerStage,
    normalise,
)
from polyzoo.seed.presets import TokenizerTrainConfig
from polyzoo.seed.sketch import SketchDecoder

_DINO_WIDTH = 384


@dataclass(frozen=True)
class At:
    """Where in a run a step is taken."""

    step: int
    generator: torch.Generator
    frozen: Mapping[str, nn.Module]


Step = Callable[[Any, dict[str, Tensor], At], Losses]


@dataclass(frozen=True)
class TokenizerTrainReport:
    """A finished stage."""

    out: str
    """Folder of the tokenizer."""
    stage: str
    run_dir: str
    steps: int
    pictures: int
    metrics: dict[str, float]
    """Of the last evaluation, on the validation split where there is one."""
    codebook: CodebookHealth | None
    """Over the training pictures, after stage 2."""
    megabytes: float
    """Size of the folder."""
    failed: list[str] = field(default_factory=list)
    """Pictures that could not be read, and why."""


def start(config: TokenizerTrainConfig, material: Material) -> SeedParts:
    """Load the stage before, or build an untrained model."""
    if config.start is not None:
        return load_parts(config.start)
    shape = config.model
    pieces = 0 if material.pieces is None else len(material.pieces)
    if pieces and shape.qformer.vocabulary not in (0, pieces):
        raise ConfigError(
            f"model.qformer.vocabulary={shape.qformer.vocabulary}, and data.prepared has {pieces} "
            "pieces: set the same number"
        )
    return SeedParts(config.out, SeedModel(shape), material.pieces, None)


def needs_target(config: TokenizerTrainConfig) -> bool:
    """Tell whether the stage compares with DINOv2 or with the generator's condition."""
    return config.stage in ("tower", "stage2") or (
        config.stage == "stage1" and config.generation > 0
    )


def generator_target(config: TokenizerTrainConfig) -> GeneratorTarget:
    """Load DINOv2 as teacher, and as part of what our generator is told."""
    return GeneratorTarget(
        load_dino(), thumbnail=config.thumbnail, teacher_size=config.teacher_size
    )


def _tower(config: TokenizerTrainConfig, parts: SeedParts) -> tuple[nn.Module, Step]:
    stage = TowerStage(parts.model, teacher_width=_DINO_WIDTH)

    def step(model: Any, batch: dict[str, Tensor], at: At) -> Losses:
        generator = at.generator
        images = beside(batch["images"], generator=generator, share=0.3)
        rgb = views(images, strength=config.augment, generator=generator)
        return model(rgb, at.frozen["target"].tokens(rgb))  # pyright: ignore[reportCallIssue]

    return stage, step


def _stage1(config: TokenizerTrainConfig, parts: SeedParts) -> tuple[nn.Module, Step]:
    if parts.model.contrast is None or not parts.model.config.qformer.vocabulary:
        raise ConfigError("stage1 needs model.contrast_dim and model.qformer.vocabulary above 0")
    stage = Stage1(parts.model, teacher=config.teacher_text, generation=config.generation)

    def step(model: Any, batch: dict[str, Tensor], at: At) -> Losses:
        rgb = views(batch["images"], strength=config.augment, generator=at.generator)
        target = at.frozen["target"](rgb) if config.generation else None
        return model(rgb, batch, target)

    return stage, step


def _stage2(config: TokenizerTrainConfig, parts: SeedParts) -> tuple[nn.Module, Step]:
    stage = Stage2(parts.model, codebook=config.codebook, weighting=config.weighting)
    total = config.train.steps or 10**9

    def step(model: Any, batch: dict[str, Tensor], at: At) -> Losses:
        generator = at.generator
        rgb = views(batch["images"], strength=config.augment, generator=generator)
        return model(rgb, at.frozen["target"](rgb), step=at.step, total=total, generator=generator)

    return stage, step


def _decoder(config: TokenizerTrainConfig, parts: SeedParts) -> tuple[nn.Module, Step]:
    shape = config.decoder
    fresh = SketchDecoder(shape) if shape.kind == "sketch" else PixelDecoder(shape)
    # Another kind than the folder's starts anew.
    same = parts.decoder is not None and parts.decoder.config.kind == shape.kind
    stage = DecoderStage(parts.model, parts.decoder if same and parts.decoder else fresh)

    def step(model: Any, batch: dict[str, Tensor], at: At) -> Losses:
        generator = at.generator
        rgb = views(batch["images"], strength=config.augment, generator=generator)
        return model(rgb, generator=generator)

    return stage, step


STAGES: dict[str, Callable[..., tuple[nn.Module, Step]]] = {
    "tower": _tower,
    "stage1": _stage1,
    "stage2": _stage2,
    "decoder": _decoder,
}


def evaluation(
    config: TokenizerTrainConfig, valid: ImageBank | None, material: Material
) -> Callable[[Any, At], dict[str, float]]:
    """Return the stage's validation, on the validation split where there is one."""
    bank = valid or material.train
    images = torch.from_numpy(bank.images[:512])

    def evaluate(module: Any, at: At) -> dict[str, float]:
        rgb = views(images.to(at.generator.device), strength="none", generator=at.generator)
        if config.stage == "tower":
            _, parts = module(rgb, at.frozen["target"].tokens(rgb))  # pyright: ignore[reportCallIssue]
            return {name: float(value) for name, value in parts.items()}
        if config.stage == "decoder":
            loss, _ = module(rgb, generator=at.generator)
            return {"picture": float(loss)}
        return _retrieval(config, module, rgb, bank, material)

    return evaluate


def _retrieval(
    config: TokenizerTrainConfig, module: Any, rgb: Tensor, bank: ImageBank, material: Material
) -> dict[str, float]:
    model: SeedModel = module.model
    causal = model.embed(model.features(normalise(rgb, model)))
    found = {"embeddings": causal}
    result: dict[str, float] = {}
    if config.stage == "stage2":
        codes = model.quantise(causal).codes
        decoded = model.decode(codes).causal
        assert decoded is not None  # noqa: S101 - checked when the stage was built
        found["codes"] = decoded
        result["used"] = float(len(codes.unique()) / model.config.codes)
    if model.contrast is None or material.pieces is None:
        return result
    # One caption a concept, so that styles of one concept do not compete.
    texts = {int(m): bank.captions[i][0] for i, m in enumerate(bank.meanings[: len(rgb)])}
    ids, mask = material.pieces.encode(list(texts.values()), length=32)
    captions = model.text_vectors(ids.to(rgb.device), mask.to(rgb.device))
    own = torch.tensor([list(texts).index(int(m)) for m in bank.meanings[: len(rgb)]])
    for name, states in found.items():
        scores = (model.image_vectors(states) @ captions.T).float().cpu()
        rank = (scores > scores.gather(1, own[:, None])).sum(1)
        result[f"{name}_recall_1"] = float((rank < 1).float().mean())
        result[f"{name}_recall_10"] = float((rank < 10).float().mean())
    return result


def finish(
    config: TokenizerTrainConfig,
    material: Material,
    parts: SeedParts,
    *,
    module: Any,
    run_dir: Path,
    steps: int,
    metrics: dict[str, float],
) -> TokenizerTrainReport:
    """Write the folder, look at the codebook, and report."""
    model = parts.model
    device = next(module.parameters()).device
    model.to(device).eval()
    health = None
    if config.stage == "stage2":
        codes = codes_of(model, material.train)
        health = CodebookHealth.of(codes, entries=model.config.codes)
        plot_usage(codes, run_dir / "plots" / "codebook.png", entries=model.config.codes)
    if config.stage == "decoder":
        assert config.start is not None  # noqa: S101 - the recipe was checked
        # The very file: saving int8 rows again would change them a little, and with them codes.
        save_decoder(config.out, module.decoder, like=config.start, int8=config.int8)
    else:
        pieces = config.start if config.start is not None else config.data.prepared
        file = None if pieces is None else pieces / "tokenizer.json"
        save_parts(
            config.out,
            model.cpu(),
            pieces=file if file is not None and file.is_file() else None,
            decoder=parts.decoder,
            int8=config.int8,
        )
    size = sum(file.stat().st_size for file in config.out.rglob("*") if file.is_file())
    return TokenizerTrainReport(
        out=str(config.out),
        stage=config.stage,
        run_dir=str(run_dir),
        steps=steps,
        pictures=len(material.train),
        metrics=metrics,
        codebook=health,
        megabytes=round(size / 2**20, 2),
        failed=list(material.train.failed),
    )


@torch.no_grad()
def codes_of(model: SeedModel, bank: ImageBank, *, batch: int = 512) -> Tensor:
    """Return the codes (n, tokens) of all pictures of a bank, laid on white."""
    device = model.queries.device
    generator = torch.Generator(device)
    found = []
    for start in range(0, len(bank), batch):
        images = torch.from_numpy(bank.images[start : start + batch]).to(device)
        rgb = views(images, strength="none", generator=generator)
        found.append(model.encode(normalise(rgb, model)).cpu())
    return torch.cat(found)


def render(report: TokenizerTrainReport) -> str:
    """The report for people."""
    lines = [
        f"{report.out}: {report.stage}, {report.megabytes} MiB after {report.steps} steps on "
        f"{report.pictures} pictures"
    ]
    if report.metrics:
        lines.append(", ".join(f"{k} {v:.4g}" for k, v in report.metrics.items()))
    if report.codebook is not None:
        health = report.codebook
        lines.append(
            f"codebook: {health.used} of {health.codes} entries used, perplexity "
            f"{health.perplexity:.0f}: {health.verdict}"
        )
    if report.failed:
        lines.append(f"{len(report.failed)} pictures left out, first: {report.failed[0]}")
    return "\n".join(lines)
