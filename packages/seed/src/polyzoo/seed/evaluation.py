"""The `eval` command: what codes keep of an image's meaning, captions, and drawings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyzoo.core.errors import ConfigError, UsageError
from polyzoo.core.log import get_logger
from polyzoo.seed import metrics
from polyzoo.seed.bank import ImageBank
from polyzoo.seed.codebook import CodebookHealth
from polyzoo.seed.decoder import PixelDecoder
from polyzoo.seed.metrics import Recall
from polyzoo.seed.objective import normalise
from polyzoo.seed.options import EvalConfig
from polyzoo.seed.pipeline import SeedPipeline
from polyzoo.seed.preprocessing import to_pixels

_log = get_logger(__name__)
_REDRAWN_STEPS = 10


@dataclass(frozen=True)
class Retrieval:
    """Both directions: captions of an image, images of a caption."""

    to_text: Recall
    to_image: Recall


@dataclass(frozen=True)
class SplitReport:
    """One set of pictures."""

    split: str
    pictures: int
    concepts: int
    embeddings: Retrieval
    """Continuous causal embeddings: no codes."""
    codes: Retrieval
    """Causal embeddings made of codes."""
    detokenised: Retrieval | None
    """Pictures drawn from codes and embedded again; of the first `drawings` pictures."""
    chance: Retrieval
    kept: float
    """Mean R@10 of codes as a share of the embeddings'."""
    captions_named: float | None
    """Share of captions that name the right concept."""
    copied_named: float | None
    """The same for the caption of the nearest training picture."""
    captions_grouped: float | None
    """Share of captions that name a concept of the right group."""
    copied_grouped: float | None
    drawn: Recall | None
    """Prompt retrieval of drawn pictures among the prompts."""
    drawn_real: Recall | None
    """The same for real pictures of these prompts."""
    examples: list[tuple[str, str]] = field(default_factory=list)
    """Right name and caption of the first pictures."""


@dataclass(frozen=True)
class EvalReport:
    """All that was measured."""

    model: str
    text: str
    """Who encoded the captions."""
    splits: list[SplitReport]
    codebook: CodebookHealth
    failed: list[str]
    """Pictures that could not be read."""


def main(config: EvalConfig) -> EvalReport:
    """Run the command."""
    if (config.pack is None) == (config.pairs is None):
        raise UsageError("eval: give either --pairs FILE.jsonl with --images DIR, or --pack DIR")
    pipeline = SeedPipeline.from_pretrained(config.model, device=config.device)
    if config.language is not None:
        pipeline.use_language(config.language, base=config.base)
    size = pipeline.config.vision.image_size
    train: ImageBank | None = None
    if config.pack is not None:
        train = ImageBank.from_pack(config.pack, size=size, split="train")
        banks = {
            name: ImageBank.from_pack(config.pack, size=size, split=name, limit=config.limit)
            for name in ("reserved-combination", "reserved-concept")
        }
    else:
        if config.images is None or config.pairs is None:
            raise UsageError("eval --pairs needs --images, the folder of the files it names")
        banks = {
            "pairs": ImageBank.from_pairs(
                config.pairs, config.images, size=size, limit=config.limit
            )
        }
    measure = _Measure(pipeline, config, train)
    reports = [measure.split(name, bank) for name, bank in banks.items()]
    return EvalReport(
        model=config.model,
        text=config.text,
        splits=reports,
        codebook=CodebookHealth.of(np.concatenate(measure.seen), entries=pipeline.config.codes),
        failed=[why for bank in banks.values() for why in bank.failed],
    )


class _Measure:
    """Measures one split after another with the same models."""

    def __init__(self, pipeline: SeedPipeline, config: EvalConfig, train: ImageBank | None) -> None:
        self.pipeline, self.config, self.train = pipeline, config, train
        self.seen: list[NDArray[np.int64]] = []
        self._train_vectors: Tensor | None = None
        self._speaks = config.captions and _has_language(pipeline)

    def split(self, name: str, bank: ImageBank) -> SplitReport:
        seed = self.pipeline
        causal, codes = self._embed(bank)
        self.seen.append(codes)
        texts, right = _pool(bank)
        words = self._texts(texts)
        continuous = _vectors(seed, causal)
        decoded = seed.model.decode(torch.from_numpy(codes).to(seed.device)).causal
        if decoded is None:
            raise ConfigError("the tokenizer does not reconstruct causal embeddings (v1 weights)")
        discrete = _vectors(seed, decoded)
        embeddings, coded = _both(continuous, words, right), _both(discrete, words, right)
        base = embeddings.to_text.r10 + embeddings.to_image.r10
        captions = self._captions(codes) if self._speaks else None
        copies = self._copies(continuous) if self._speaks and self.train is not None else None
        drawn, real = self._drawings(texts, bank, right) if self._speaks else (None, None)
        known = self._known()
        return SplitReport(
            split=name,
            pictures=len(bank),
            concepts=len(texts),
            embeddings=embeddings,
            codes=coded,
            detokenised=self._redrawn(codes, words, right),
            chance=Retrieval(metrics.chance(right), metrics.chance(right.T)),
            kept=(coded.to_text.r10 + coded.to_image.r10) / base if base else 0.0,
            captions_named=_named(captions, bank),
            copied_named=_named(copies, bank),
            captions_grouped=_grouped(captions, bank, known),
            copied_grouped=_grouped(copies, bank, known),
            drawn=drawn,
            drawn_real=real,
            examples=list(zip(bank.names[:12], captions[:12], strict=False)) if captions else [],
        )

    @torch.no_grad()
    def _embed(self, bank: ImageBank) -> tuple[Tensor, NDArray[np.int64]]:
        seed, found, codes = self.pipeline, [], []
        for start in range(0, len(bank), 128):
            rgb = seed.bank_rgb(bank, slice(start, start + 128))
            causal = seed.model.embed(seed.model.features(
                normalise(rgb, seed.model).to(seed.dtype)
            ))  # fmt: skip
            found.append(causal)
            codes.append(seed.model.quantise(causal).codes.cpu().numpy())
        return torch.cat(found), np.concatenate(codes)

    def _texts(self, texts: Sequence[str]) -> Tensor:
        if self.config.text == "own":
            return self.pipeline.text_vectors(texts)
        from polyzoo.towers.text import load_text_tower

        tower = load_text_tower("minilm")
        if tower.dim != self.pipeline.config.contrast_dim:
            raise ConfigError(
                f"--text minilm: the tokenizer's images lie in {self.pipeline.config.contrast_dim} "
                f"dimensions, MiniLM's texts in {tower.dim}: it was not trained to meet them"
            )
        return tower.encode(texts).float()

    def _redrawn(
        self, codes: NDArray[np.int64], words: Tensor, right: NDArray[np.bool_]
    ) -> Retrieval | None:
        seed, count = self.pipeline, self.config.drawings
        if seed.parts.decoder is None or not count:
            return None
        # Spread over the whole set, not its first concepts.
        rows = np.unique(np.linspace(0, len(codes) - 1, min(count, len(codes))).astype(int))
        pictures = seed.decode(codes[rows], steps=self._steps())
        vectors = self._again(pictures)
        scores = (vectors @ words.T).numpy()
        columns = right[rows].any(0)
        return Retrieval(
            metrics.recall(scores, right[rows]),
            metrics.recall(scores.T[columns], right[rows].T[columns]),
        )

    def _steps(self) -> int | None:
        decoder = self.pipeline.parts.decoder
        return _REDRAWN_STEPS if isinstance(decoder, PixelDecoder) else None

    @torch.no_grad()
    def _again(self, pictures: Sequence[object]) -> Tensor:
        seed = self.pipeline
        pixels = torch.stack([to_pixels(picture, seed.config) for picture in pictures])
        causal = seed.model.embed(seed.model.features(pixels.to(seed.device, seed.dtype)))
        return _vectors(seed, causal)

    def _captions(self, codes: NDArray[np.int64]) -> list[str]:
        return self.pipeline.caption_codes(codes, new_tokens=24)

    def _copies(self, vectors: Tensor) -> list[str]:
        assert self.train is not None  # noqa: S101 - the caller has checked
        if self._train_vectors is None:
            causal, _ = self._embed(self.train)
            self._train_vectors = _vectors(self.pipeline, causal)
        nearest = (vectors @ self._train_vectors.T).argmax(1).tolist()
        return [self.train.captions[i][0] for i in nearest]

    def _known(self) -> dict[str, int]:
        if self.train is None:
            return {}
        return {
            metrics.named(name): int(group)
            for name, group in zip(self.train.names, self.train.groups, strict=True)
            if group >= 0
        }

    def _drawings(
        self, texts: Sequence[str], bank: ImageBank, right: NDArray[np.bool_]
    ) -> tuple[Recall | None, Recall | None]:
        seed, count = self.pipeline, self.config.drawings
        if seed.parts.decoder is None or not count:
            return None, None
        # One picture of each chosen concept: its own caption is the prompt.
        columns = np.unique(np.linspace(0, len(texts) - 1, min(count, len(texts))).astype(int))
        rows = [int(np.argmax(right[:, column])) for column in columns]
        prompts = [bank.captions[row][0] for row in rows]
        words = self._texts(prompts)
        own = np.eye(len(prompts), dtype=bool)
        pictures = seed.draw(prompts, seed=self.config.seed, steps=self._steps())
        with torch.no_grad():
            causal = seed.model.embed(seed.model.features(
                normalise(seed.bank_rgb(bank, rows), seed.model).to(seed.dtype)
            ))  # fmt: skip
        real = _vectors(seed, causal)
        return (
            metrics.recall((self._again(pictures) @ words.T).numpy(), own),
            metrics.recall((real @ words.T).numpy(), own),
        )


def _has_language(pipeline: SeedPipeline) -> bool:
    try:
        return pipeline.language is not None
    except ConfigError as error:
        _log.info("captions and drawings are left out: %s", error)
        return False


def _vectors(pipeline: SeedPipeline, causal: Tensor) -> Tensor:
    with torch.no_grad():
        return pipeline.model.image_vectors(causal).float().cpu()


def _pool(bank: ImageBank) -> tuple[list[str], NDArray[np.bool_]]:
    """Candidate texts, one a concept, and which of them answers each picture."""
    concepts: dict[int, int] = {}
    texts: list[str] = []
    for row, meaning in enumerate(bank.meanings.tolist()):
        if meaning not in concepts:
            concepts[meaning] = len(texts)
            texts.append(bank.pool_text(row))
    columns = np.array([concepts[meaning] for meaning in bank.meanings.tolist()])
    return texts, columns[:, None] == np.arange(len(texts))[None]


def _both(images: Tensor, words: Tensor, right: NDArray[np.bool_]) -> Retrieval:
    scores = (images @ words.T).numpy()
    return Retrieval(metrics.recall(scores, right), metrics.recall(scores.T, right.T))


def _named(captions: list[str] | None, bank: ImageBank) -> float | None:
    return None if captions is None else metrics.share_named(captions, bank.names)


def _grouped(captions: list[str] | None, bank: ImageBank, known: dict[str, int]) -> float | None:
    if captions is None or not known:
        return None
    share, judged = metrics.share_grouped(captions, bank.groups.tolist(), known)
    return share if judged else None


def render(report: EvalReport) -> str:
    """The report for people."""
    lines = []
    for split in report.splits:
        lines.append(f"{split.split}: {split.pictures} pictures of {split.concepts} concepts")
        lines.append("                     image to text         text to image")
        lines.append("                     R@1   R@5   R@10      R@1   R@5   R@10")
        rows = {
            "causal embeddings": split.embeddings,
            "codes": split.codes,
            "de-tokenised": split.detokenised,
            "chance": split.chance,
        }
        for name, row in rows.items():
            if row is not None:
                lines.append(f"  {name:<18} {_shares(row.to_text)}     {_shares(row.to_image)}")
        lines.append(f"  codes keep {split.kept:.0%} of R@10")
        if split.captions_named is not None:
            lines.append(
                f"  captions name the concept {split.captions_named:.1%}"
                + _beside(split.copied_named)
                + (
                    f", the group {split.captions_grouped:.1%}" + _beside(split.copied_grouped)
                    if split.captions_grouped is not None
                    else ""
                )
            )
        if split.drawn is not None and split.drawn_real is not None:
            lines.append(
                f"  drawn prompts among {split.drawn.pool}: {_shares(split.drawn)}; real pictures "
                f"{_shares(split.drawn_real)}"
            )
    health = report.codebook
    lines.append(
        f"codebook: {health.used} of {health.codes} entries on these pictures, perplexity "
        f"{health.perplexity:.0f}"
    )
    if report.failed:
        lines.append(f"{len(report.failed)} pictures left out, first: {report.failed[0]}")
    return "\n".join(lines)


def _shares(row: Recall) -> str:
    return f"{row.r1:.3f} {row.r5:.3f} {row.r10:.3f}"


def _beside(share: float | None) -> str:
    return "" if share is None else f" (copying the nearest picture's caption {share:.1%})"
