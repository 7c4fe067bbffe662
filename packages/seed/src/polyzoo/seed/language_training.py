"""What the language model's training builds, minimises, measures and leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyzoo.core.errors import ConfigError, DataError
from polyzoo.seed import adapters
from polyzoo.seed.bank import ImageBank
from polyzoo.seed.language import (
    Language,
    grow,
    load_base,
    perplexity,
    save_language,
    save_tokenizer,
    small_model,
)
from polyzoo.seed.language_data import CaptionSamples, Padding, RecordSamples
from polyzoo.seed.pipeline import SeedPipeline
from polyzoo.seed.presets import LanguageTrainConfig
from polyzoo.seed.samples import IGNORED as IGNORED
from polyzoo.seed.samples import SampleBuilder
from polyzoo.seed.shards import read_tokens
from polyzoo.seed.small_tokenizer import small_tokenizer

_VALIDATED = 256


@dataclass
class LanguageParts:
    """All that a run needs."""

    language: Language
    train: Any
    valid: list[dict[str, Tensor]] | None
    """Fixed batches, in both directions."""
    collate: Callable[[list[Any]], dict[str, Tensor]]
    perplexity: float | None
    """Of the plain text before training."""


@dataclass(frozen=True)
class LanguageTrainReport:
    """A finished training."""

    out: str
    """Folder of the model or of its adapters."""
    run_dir: str
    steps: int
    samples: int
    trained_parameters: int
    parameters: int
    metrics: dict[str, float]
    """Of the last evaluation."""
    perplexity_before: float | None
    """Of data.text under the base model, where it is given and the base was trained."""
    perplexity_after: float | None
    megabytes: float
    """Size of what was written."""
    peak_gib: float
    """Peak GPU memory, 0 on the CPU."""


def prepare(config: LanguageTrainConfig) -> LanguageParts:
    """Build model, samples and validation batches."""
    pipeline = SeedPipeline.from_pretrained(config.tokenizer, device=config.train.device)
    shape = pipeline.config
    shape.require_causal()
    language = _language(config, pipeline)
    builder = SampleBuilder(
        language.tokenizer, language.vocabulary, max_length=config.data.max_length
    )
    pad = language.tokenizer.pad_token_id
    collate = Padding(language.tokenizer.eos_token_id if pad is None else pad)
    before = None
    if config.data.text is not None and config.base != "small":
        before = perplexity(language, config.data.text.read_text(encoding="utf-8")[:200_000])
    if config.data.records is not None:
        train: Any = RecordSamples(config.data.records, builder, config.data)
        return LanguageParts(_adapted(config, language), train, None, collate, before)
    bank = _bank(config, shape.vision.image_size, "train")
    codes = _codes(config, pipeline, bank)[:, None]
    if config.data.views > 1 and config.data.tokens is None:
        moved = [
            pipeline.encode_bank(bank, moved=config.train.seed + view)[:, None]
            for view in range(1, config.data.views)
        ]
        codes = np.concatenate([codes, *moved], axis=1)
    train = CaptionSamples(codes, bank.captions, builder, config.data, prompts=bank.prompts)
    valid = None
    if config.data.pack is not None:
        other = _bank(config, shape.vision.image_size, "val")
        valid = _batches(other, _codes(config, pipeline, other), builder, config, collate)
    return LanguageParts(_adapted(config, language), train, valid, collate, before)


def _language(config: LanguageTrainConfig, pipeline: SeedPipeline) -> Language:
    shape = pipeline.config
    if config.base == "small":
        if pipeline.pieces is None:
            raise ConfigError(
                "base='small' spells captions with the tokenizer's own pieces, and this one has "
                "no text branch; name another base"
            )
        tokenizer = small_tokenizer(pipeline.pieces)
        model: Any = None
    else:
        model, tokenizer = load_base(config.base)
    if model is None:
        from polyzoo.seed.vocabulary import ImageVocabulary

        vocabulary = ImageVocabulary.extend(
            tokenizer, codes=shape.codes, tokens_per_image=shape.tokens_per_image
        )
        small = config.small
        model = small_model(
            tokenizer,
            width=small.width,
            layers=small.layers,
            heads=small.heads,
            ffn=small.ffn,
            positions=max(128, config.data.max_length),
        )
        model.config.attention_dropout = small.dropout
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = small.dropout
    else:
        vocabulary = grow(
            model, tokenizer, codes=shape.codes, tokens_per_image=shape.tokens_per_image
        )
    return Language(model, tokenizer, vocabulary)


def _adapted(config: LanguageTrainConfig, language: Language) -> Language:
    if config.adapters is not None:
        language.model = adapters.adapt(language.model, config.adapters, language.vocabulary)
    return language


def _bank(config: LanguageTrainConfig, size: int, split: str) -> ImageBank:
    data = config.data
    if data.pack is not None and data.pairs is None:
        return ImageBank.from_pack(data.pack, size=size, split=split, limit=data.limit)
    if data.pairs is None or data.images is None or data.pack is not None:
        raise ConfigError("data: set one of pack, pairs (with images) and records")
    return ImageBank.from_pairs(data.pairs, data.images, size=size, limit=data.limit)


def _codes(
    config: LanguageTrainConfig, pipeline: SeedPipeline, bank: ImageBank
) -> NDArray[np.integer]:
    if config.data.tokens is None:
        return pipeline.encode_bank(bank)
    found = read_tokens(config.data.tokens)
    missing = [key for key in bank.keys if key not in found]
    if missing:
        raise DataError(
            f"{config.data.tokens}: {len(missing)} pictures have no codes, first {missing[0]!r}"
        )
    return np.stack([found[key] for key in bank.keys])


def _batches(
    bank: ImageBank,
    codes: NDArray[np.integer],
    builder: SampleBuilder,
    config: LanguageTrainConfig,
    collate: Padding,
) -> list[dict[str, Tensor]]:
    """The plain caption of some pictures, told and drawn."""
    batches = []
    step = max(1, len(bank) // _VALIDATED)
    places = range(0, len(bank), step)
    for image_first in (True, False):
        samples = [
            builder.caption(
                codes[i].tolist(), bank.captions[i][0], image_first=image_first, mask_left=True
            )
            for i in places
        ]
        size = config.train.batch_size
        batches += [collate(samples[i : i + size]) for i in range(0, len(samples), size)]
    return batches


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean next-token loss over the ids that count."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    counted = labels != IGNORED
    # Only where something counts: the vocabulary is wide.
    return nn.functional.cross_entropy(
        logits[:, :-1][counted].float(), labels[counted], reduction="sum"
    ) / counted.sum().clamp(min=1)


def validate(model: Any, parts: LanguageParts, device: torch.device) -> dict[str, float]:
    """Loss of telling and of drawing, on fixed samples."""
    assert parts.valid is not None  # noqa: S101 - only then it is called
    half = len(parts.valid) // 2
    result = {}
    for name, batches in (("tell", parts.valid[:half]), ("draw", parts.valid[half:])):
        losses = [
            float(loss_of(model, {k: v.to(device) for k, v in batch.items()})) for batch in batches
        ]
        result[f"{name}_loss"] = sum(losses) / len(losses)
    return result


def finish(
    config: LanguageTrainConfig,
    parts: LanguageParts,
    *,
    model: Any,
    run_dir: Path,
    steps: int,
    metrics: dict[str, float],
    memory: int,
) -> LanguageTrainReport:
    """Write the model or its adapters, and report."""
    language = parts.language
    language.model = model.eval()
    after = None
    if parts.perplexity is not None and config.data.text is not None:
        after = perplexity(language, config.data.text.read_text(encoding="utf-8")[:200_000])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if config.adapters is not None:
        adapters.save_adapters(config.out, model, base=config.base)
        save_tokenizer(config.out, language)
    else:
        save_language(config.out, language, int8=config.int8)
    size = sum(file.stat().st_size for file in config.out.rglob("*") if file.is_file())
    return LanguageTrainReport(
        out=str(config.out),
        run_dir=str(run_dir),
        steps=steps,
        samples=len(parts.train),
        trained_parameters=trained,
        parameters=sum(p.numel() for p in model.parameters()),
        metrics=metrics,
        perplexity_before=parts.perplexity,
        perplexity_after=after,
        megabytes=round(size / 2**20, 2),
        peak_gib=round(memory / 2**30, 2),
    )


def render(report: LanguageTrainReport) -> str:
    """The report for people."""
    lines = [
        f"{report.out}: {report.megabytes} MiB after {report.steps} steps on {report.samples} "
        f"samples; {report.trained_parameters:,} of {report.parameters:,} parameters trained"
    ]
    if report.metrics:
        lines.append(", ".join(f"{name} {value:.4g}" for name, value in report.metrics.items()))
    if report.perplexity_before is not None:
        lines.append(
            f"perplexity of plain text {report.perplexity_before:.2f} before, "
            f"{report.perplexity_after:.2f} after"
        )
    return "\n".join(lines)
