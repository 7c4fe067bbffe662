"""Recipes: what the two train commands take, and the named starting points. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from polyzoo.core.errors import ConfigError
from polyzoo.seed.codebook_config import CodebookConfig
from polyzoo.seed.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    HeadConfig,
    PreprocessConfig,
    QFormerConfig,
    SeedConfig,
    VisionConfig,
)
from polyzoo.seed.decoder_config import DecoderConfig
from polyzoo.training.config import (
    CheckpointConfig,
    DataConfig,
    EmaConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)

Stage = Literal["tower", "stage1", "stage2", "decoder"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedDataConfig:
    """Pictures and captions."""

    pack: Path | None = None
    """Icon pack (`polyzoo icons build`); its training split is used, its validation split tests."""
    pairs: Path | None = None
    """Or a .jsonl file: {"image": FILE, "caption": TEXT or a list} a line."""
    images: Path | None = None
    """Folder of the files that pairs names."""
    valid_pairs: Path | None = None
    """Validation pairs, of the same folder."""
    prepared: Path | None = None
    """Folder of `polyzoo seed prepare`: the text branch's pieces, and vectors of the texts."""
    size: int = 64
    """Side the pictures are kept at in memory."""
    limit: int | None = None
    """Use only so many pictures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerTrainConfig:
    """Training of a tokenizer: one stage of four, each starting from the folder of the last.

    tower: a small image tower learns DINOv2's features. stage1: images meet captions. stage2:
    codebook and de-tokeniser. decoder: our small picture decoder.
    """

    out: Path = Path("models/seed")
    """Folder of the finished tokenizer."""
    stage: Stage = "stage1"
    """Which stage to train."""
    start: Path | None = None
    """Folder of the stage before; without it weights are random."""
    model: SeedConfig = field(default_factory=SeedConfig)
    """Shape, where start is not given."""
    data: SeedDataConfig = field(default_factory=SeedDataConfig)
    """Pictures and captions."""
    augment: Literal["none", "light", "strong"] = "light"
    """How far pictures are moved, turned and tinted."""
    teacher_text: float = 0.0
    """stage1: weight of meeting a sentence encoder's vectors (data.prepared); the paper has 0."""
    generation: float = 0.0
    """stage1: weight of keeping what the generator needs; the paper has 0."""
    thumbnail: int = 8
    """Side of the thumbnail in our own generator's target; 0 leaves the teacher's embedding."""
    teacher_size: int = 112
    """Side of the pictures DINOv2 is shown; a multiple of 14."""
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    """stage2: start and repair of the codebook."""
    weighting: Literal["legacy", "fixed"] = "legacy"
    """stage2: legacy as the reference trains; fixed is the textbook's commitment weight."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """decoder: shape of the picture decoder."""
    int8: bool = False
    """Store matrices as int8 with one scale a row: a quarter of the size."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The run."""

    def __post_init__(self) -> None:
        """Check the relations between parts."""
        if self.teacher_size % 14:
            raise ConfigError(f"teacher_size={self.teacher_size} must be a multiple of 14")
        if self.stage in ("stage2", "decoder") and self.start is None:
            raise ConfigError(
                f"stage={self.stage!r} needs start: the folder of the stage before it"
            )
        if self.stage == "stage1" and self.train.batch_size < 2:
            raise ConfigError(
                f"train.batch_size={self.train.batch_size}: one pair has no negatives; use 2"
            )
        for name in ("teacher_text", "generation", "thumbnail"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """Low-rank adapters; the defaults are the published configuration but for `rows`."""

    rank: int = 16
    """Inner size of each adapter."""
    alpha: float = 32.0
    """Adapters are scaled by alpha / rank."""
    dropout: float = 0.05
    """Before each adapter."""
    targets: tuple[str, ...] = ("all-linear",)
    """Endings of the names of adapted layers; all-linear takes every linear layer."""
    rows: Literal["new", "all"] = "new"
    """new trains the embeddings of image words only (a few MB); all trains and stores embeddings,
    output layer and norms in full, as published."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"rank={self.rank} must be at least 1, alpha={self.alpha} above 0 and "
                f"dropout={self.dropout} in [0, 1)"
            )
        if not self.targets:
            raise ConfigError("targets=() adapts nothing; name layers, or all-linear")


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallLanguageConfig:
    """Our own small language model, trained from nothing on captions and codes."""

    width: int = 160
    """Channels."""
    layers: int = 3
    """Layers."""
    heads: int = 5
    """Attention heads; divides width."""
    ffn: int = 320
    """Inner width of the gated feed-forward layers."""
    dropout: float = 0.1
    """Of attention, while training."""

    def __post_init__(self) -> None:
        """Check the relations between fields."""
        if self.heads < 1 or self.width % self.heads:
            raise ConfigError(f"heads={self.heads} must divide width={self.width}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageDataConfig:
    """What the language model learns from."""

    pack: Path | None = None
    """Icon pack; its pictures are tokenised first."""
    pairs: Path | None = None
    """Or a .jsonl file of image and caption."""
    images: Path | None = None
    """Folder of the files that pairs names."""
    records: Path | None = None
    """Or a .jsonl file of records with codes in them (captions, documents, questions, edits)."""
    tokens: Path | None = None
    """Folder of `polyzoo seed tokenize` with the codes of pack or pairs; tokenised here if not."""
    text: Path | None = None
    """Plain text to keep the model's own language; a paragraph a sample."""
    text_share: float = 0.0
    """Share of samples drawn from it."""
    draw: float = 0.5
    """Share of captions whose image comes second: text to image."""
    views: int = 1
    """Slightly moved views of each picture whose codes are told; pack and pairs only."""
    mask_left: bool = True
    """Count only the second half of a caption sample; the published pretraining counts all."""
    max_length: int = 96
    """Ids of a sample, at most."""
    limit: int | None = None
    """Use only so many pictures or records."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("draw", "text_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be between 0 and 1")
        if self.text_share and self.text is None:
            raise ConfigError(f"text_share={self.text_share} needs text, a file of plain text")
        if self.views < 1:
            raise ConfigError(f"views={self.views} must be at least 1")
        if self.max_length < 8:
            raise ConfigError(f"max_length={self.max_length} must be at least 8")


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageTrainConfig:
    """Training of a language model that reads and writes a tokenizer's codes."""

    out: Path = Path("models/seed-language")
    """Folder of the model, or of its adapters."""
    tokenizer: str = "embedded"
    """SEED tokenizer: embedded, a folder, or a hub id."""
    base: str = "small"
    """small: our own, from nothing; or an asset (smollm2-135m), a folder, a hub id."""
    small: SmallLanguageConfig = field(default_factory=SmallLanguageConfig)
    """Shape of our own."""
    adapters: AdapterConfig | None = None
    """Train low-rank adapters of base; None trains all of it."""
    data: LanguageDataConfig = field(default_factory=LanguageDataConfig)
    """Samples."""
    int8: bool = False
    """Store a whole model's matrices as int8 with one scale a row."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The run."""

    def __post_init__(self) -> None:
        """Check the relations between parts."""
        if self.base == "small" and self.adapters is not None:
            raise ConfigError("adapters adapt a trained model; base='small' starts from nothing")
        if self.train.lora is not None:
            raise ConfigError("train.lora: set adapters instead, which also train image words")


def small_shape() -> SeedConfig:
    """The embedded tokenizer: 16 codes of 512 an image, 64 pixels, a tower of 1.6 M."""
    width = 128
    return SeedConfig(
        vision=VisionConfig(
            image_size=64, patch_size=8, width=160, depth=5, heads=5, mlp_hidden=640
        ),
        qformer=QFormerConfig(
            width=width, layers=4, heads=4, ffn=512, dropout=0.05, vocabulary=4096, max_text=32
        ),
        head=HeadConfig(dim=384 + 3 * 64, mlp=(128, 96, 24)),
        preprocess=PreprocessConfig(mean=IMAGENET_MEAN, std=IMAGENET_STD),
        tokens_per_image=16,
        codes=512,
        code_dim=16,
        decode_depth=1,
        decode_heads=4,
        contrast_dim=384,
    )


def dinov2_shape() -> SeedConfig:
    """The real run's tokenizer on frozen DINOv2: 16 codes of 1024 an image, 112 pixels."""
    return SeedConfig(
        vision=VisionConfig(
            kind="dinov2", image_size=112, patch_size=14, width=384, depth=12, heads=6,
            mlp_hidden=1536,
        ),
        qformer=QFormerConfig(
            width=256, layers=6, heads=4, ffn=1024, dropout=0.1, vocabulary=4096, max_text=32
        ),
        head=HeadConfig(dim=384 + 3 * 64, mlp=(256, 128, 32)),
        preprocess=PreprocessConfig(mean=IMAGENET_MEAN, std=IMAGENET_STD),
        tokens_per_image=16,
        codes=1024,
        decode_depth=2,
        decode_heads=4,
        contrast_dim=384,
    )  # fmt: skip


def _run(name: str, *, steps: int, batch: int, lr: float, decay: float = 0.05) -> TrainConfig:
    return TrainConfig(
        run_dir=Path(f"runs/seed-{name}"),
        steps=steps,
        batch_size=batch,
        eval_every=max(1, steps // 4),
        optim=OptimConfig(lr=lr, weight_decay=decay, betas=(0.9, 0.99)),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=min(200, steps // 10)),
        checkpoint=CheckpointConfig(every=2000, keep_last=1),
        data=DataConfig(drop_last=True, workers=3),
        log=_LOG,
    )


_LOG = replace(TrainConfig().log, every=100)


def tiny() -> TokenizerTrainConfig:
    """Two layers from nothing, on the CPU: shows that stage 1 works; see --stage for the others."""
    shape = small_shape()
    return TokenizerTrainConfig(
        out=Path("models/seed-tiny"),
        model=replace(
            shape,
            vision=replace(shape.vision, depth=2, width=96, heads=3, mlp_hidden=192),
            qformer=replace(shape.qformer, width=96, layers=2, heads=3, ffn=192, dropout=0.0),
            decode_heads=3,
            codes=256,
            contrast_dim=64,
        ),
        augment="none",
        train=replace(_run("tiny", steps=100, batch=24, lr=1e-3), data=DataConfig(drop_last=True)),
    )


def tower() -> TokenizerTrainConfig:
    """Our small tower learns DINOv2's tokens: 3 minutes on one H100."""
    return TokenizerTrainConfig(
        out=Path("models/seed-tower"),
        stage="tower",
        model=small_shape(),
        augment="strong",
        train=_run("tower", steps=8000, batch=512, lr=1e-3),
    )


def stage1() -> TokenizerTrainConfig:
    """Stage 1 of the embedded tokenizer, from the tower's folder."""
    return TokenizerTrainConfig(
        out=Path("models/seed-stage1"),
        stage="stage1",
        start=Path("models/seed-tower"),
        model=small_shape(),
        augment="strong",
        teacher_text=1.0,
        generation=0.5,
        train=_run("stage1", steps=4000, batch=512, lr=1e-3),
    )


def stage2() -> TokenizerTrainConfig:
    """Stage 2 of the embedded tokenizer, from the folder of stage 1."""
    return TokenizerTrainConfig(
        out=Path("models/seed-stage2"),
        stage="stage2",
        start=Path("models/seed-stage1"),
        model=small_shape(),
        augment="light",
        train=_run("stage2", steps=6000, batch=512, lr=1e-3, decay=0.01),
    )


def decoder() -> TokenizerTrainConfig:
    """The embedded picture decoder, from the folder of stage 2."""
    return TokenizerTrainConfig(
        out=Path("models/seed-embedded"),
        stage="decoder",
        start=Path("models/seed-stage2"),
        model=small_shape(),
        augment="light",
        decoder=DecoderConfig(widths=(48, 96, 128), context_width=128),
        int8=True,
        train=replace(
            _run("decoder", steps=12000, batch=256, lr=1e-3, decay=0.01),
            ema=EmaConfig(decay=0.9995),
        ),
    )


def sketch() -> TokenizerTrainConfig:
    """The embedded one-shot decoder, from the folder of stage 2: minutes on a CPU."""
    return replace(
        decoder(),
        decoder=DecoderConfig(kind="sketch", context_width=128),
        train=replace(
            _run("sketch", steps=4000, batch=128, lr=1e-3, decay=0.05), ema=EmaConfig(decay=0.998)
        ),
    )


def paper() -> TokenizerTrainConfig:
    """The published recipe of stage 1 at full size; give --data.pairs, and BLIP-2's start."""
    return TokenizerTrainConfig(
        out=Path("models/seed-paper"),
        model=SeedConfig(qformer=QFormerConfig(vocabulary=30523, max_text=512), contrast_dim=256),
        augment="light",
        train=TrainConfig(
            run_dir=Path("runs/seed-paper"),
            epochs=10,
            batch_size=64,
            grad_accum=64,
            optim=OptimConfig(lr=3e-5, weight_decay=0.05),
            schedule=ScheduleConfig(kind="cosine", warmup_steps=2000, final_fraction=0.1),
        ),
    )


def dinov2_stage1() -> TokenizerTrainConfig:
    """Stage 1 on frozen DINOv2."""
    return replace(
        stage1(),
        out=Path("models/seed-dinov2-stage1"),
        start=None,
        model=dinov2_shape(),
        train=_run("dinov2-stage1", steps=3000, batch=512, lr=5e-4),
    )


def dinov2_stage2() -> TokenizerTrainConfig:
    """Stage 2 on frozen DINOv2."""
    return replace(
        stage2(),
        out=Path("models/seed-dinov2"),
        start=Path("models/seed-dinov2-stage1"),
        model=dinov2_shape(),
        train=_run("dinov2-stage2", steps=4000, batch=512, lr=5e-4, decay=0.01),
    )


TOKENIZER_PRESETS = {
    "tiny": tiny,
    "tower": tower,
    "stage1": stage1,
    "stage2": stage2,
    "decoder": decoder,
    "sketch": sketch,
    "dinov2-stage1": dinov2_stage1,
    "dinov2-stage2": dinov2_stage2,
    "paper": paper,
}


def small_language() -> LanguageTrainConfig:
    """The embedded language model: 3 layers, 1.5 M parameters, 2 minutes on one H100."""
    return LanguageTrainConfig(
        out=Path("models/seed-language"),
        data=LanguageDataConfig(max_length=64, views=6),
        int8=True,
        train=replace(
            _run("language", steps=8000, batch=256, lr=2e-3, decay=0.05),
            ema=EmaConfig(decay=0.999),
            data=DataConfig(drop_last=True, workers=6),
        ),
    )


def smollm2() -> LanguageTrainConfig:
    """SmolLM2-135M with adapters, on one GPU; fetch the asset smollm2-135m first."""
    return LanguageTrainConfig(
        out=Path("models/seed-smollm2"),
        base="smollm2-135m",
        adapters=AdapterConfig(),
        data=LanguageDataConfig(max_length=80, views=6),
        train=replace(
            _run("smollm2", steps=1500, batch=64, lr=1e-3, decay=0.0),
            data=DataConfig(drop_last=True, workers=6),
        ),
    )


def language_paper() -> LanguageTrainConfig:
    """The published pretraining recipe; give --base and --data.records."""
    return LanguageTrainConfig(
        out=Path("models/seed-llama"),
        base="lmsys/vicuna-7b-v1.5",
        adapters=AdapterConfig(rows="all"),
        data=LanguageDataConfig(mask_left=False, max_length=200),
        train=TrainConfig(
            run_dir=Path("runs/seed-llama"),
            steps=30000,
            batch_size=116,
            grad_accum=4,
            activation_checkpointing=True,
            optim=OptimConfig(lr=1.5e-4, weight_decay=0.05, betas=(0.9, 0.95), eps=1e-5),
            schedule=ScheduleConfig(kind="cosine", warmup_fraction=0.03, final_fraction=0.05),
        ),
    )


LANGUAGE_PRESETS = {"small": small_language, "smollm2": smollm2, "paper": language_paper}
