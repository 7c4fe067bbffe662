"""Recipes: what `polyzoo sea train` takes, and the named starting points. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from polyzoo.core.errors import ConfigError
from polyzoo.sea.config import (
    Language,
    RandomEncoderConfig,
    SeaConfig,
    SplitConfig,
    StudentConfig,
)
from polyzoo.training.config import (
    CheckpointConfig,
    DataConfig,
    LoraConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SeaDataConfig:
    """What a model learns from."""

    train: Path | None = None
    """Pairs: CodeSearchNet-format .jsonl or .jsonl.gz, or a file of `polyzoo sea prepare`."""
    valid: Path | None = None
    """Pairs for the validation MRR; without them the last step's weights are kept."""
    extra: Path | None = None
    """Functions without documentation: further negatives, and more to distil from."""
    extra_per_pair: int = 1
    """How many of them join each pair; others in every epoch."""
    negatives: Path | None = None
    """Hard negatives, a JSON object per line: {"url": ..., "negatives": [url, ...]}."""
    negatives_per_pair: int = 1
    """How many of them join each pair."""
    language: Language | None = None
    """Of records that do not say."""
    limit: int | None = None
    """Use only so many pairs."""
    cache: bool = True
    """Keep split files under the cache folder, and use them."""
    workers: int | None = None
    """Processes that split; one per core on large files by default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The contrastive objective."""

    temperature: float = 0.05
    """Divides the scores; 1 as published, 0.05 suits normalised vectors."""
    symmetric: bool = True
    """Also from code to query; the published loss is one-directional."""
    recompute: bool = False
    """Encode every chunk again in the backward pass: memory for one chunk, not for the batch."""
    max_tokens_per_forward: int = 262144
    """Token budget of one forward pass, and of one chunk with recompute."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not self.temperature > 0:
            raise ConfigError(f"temperature={self.temperature} must be above 0")
        if self.max_tokens_per_forward < 1:
            raise ConfigError(
                f"max_tokens_per_forward={self.max_tokens_per_forward} must be at least 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """Learning from a larger model's vectors beside the pairs."""

    teacher: str = "minilm"
    """minilm, a model folder, or encoder:NAME."""
    contrastive: float = 1.0
    """Weight of the contrastive loss on the pairs."""
    vectors: float = 2.0
    """Weight of the cosine distance to the teacher's query and function vectors."""
    blocks: float = 1.0
    """Weight of the cosine distance to the teacher's block vectors."""
    scores: float = 1.0
    """Weight of the divergence from the teacher's ranking of the batch."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("contrastive", "vectors", "blocks", "scores"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class SeaTrainConfig:
    """Training of a SEA model: shape, data, objective, and the run itself."""

    out: Path = Path("models/sea")
    """Folder of the finished model."""
    model: SeaConfig = field(default_factory=SeaConfig)
    """Shape."""
    data: SeaDataConfig = field(default_factory=SeaDataConfig)
    """Pairs."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Objective."""
    distill: DistillConfig | None = None
    """A teacher to learn from."""
    student: StudentConfig | None = None
    """Cut the encoder out of the teacher instead of taking model.encoder."""
    random: RandomEncoderConfig | None = None
    """Start from an untrained encoder instead of model.encoder."""
    dropout: float = 0.1
    """Of hidden states."""
    attention_dropout: float = 0.0
    """Of attention weights; above 0 it costs speed and memory."""
    search_discount: float | None = None
    """count_discount of the saved model, where its validation wants another than its training."""
    int8: bool = False
    """Store large matrices as int8 with one scale per row: a quarter of the size."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The run: steps, batch, optimizer, schedule, checkpoints."""

    def __post_init__(self) -> None:
        """Check the relations between parts."""
        if self.student is not None and self.distill is None:
            raise ConfigError("student needs distill: the teacher it is cut out of")
        if self.student is not None and self.random is not None:
            raise ConfigError("student and random both say where the encoder comes from: set one")
        if self.train.lora is not None and (self.student or self.random):
            raise ConfigError("lora adapts an existing encoder; student and random train their own")
        if self.train.lora is not None and self.train.lora.dora:
            raise ConfigError("lora.dora: a model folder cannot hold it; use plain LoRA")
        if self.train.batch_size < 2:
            raise ConfigError(
                f"train.batch_size={self.train.batch_size}: one pair has no negatives; use 2"
            )


def tiny() -> SeaTrainConfig:
    """A two-layer encoder from nothing, on the CPU: shows that everything works, finds little."""
    return SeaTrainConfig(
        out=Path("models/sea-tiny"),
        model=SeaConfig(
            encoder="random", split=SplitConfig(budget=126), max_query_tokens=64, raw="whole"
        ),
        random=RandomEncoderConfig(),
        loss=LossConfig(max_tokens_per_forward=32768),
        dropout=0.0,
        train=TrainConfig(
            run_dir=Path("runs/sea-tiny"),
            steps=100,
            batch_size=32,
            eval_every=50,
            best_metric="mrr",
            optim=OptimConfig(lr=2e-3, weight_decay=0.0),
            schedule=ScheduleConfig(kind="linear", warmup_steps=10),
            checkpoint=CheckpointConfig(every=50, keep_last=1),
        ),
    )


def paper() -> SeaTrainConfig:
    """The published hyper-parameters: released splitter and formula, pooler, no temperature.

    Give the encoder, such as --model.encoder microsoft/graphcodebert-base. The published tables
    come from the `released` protocol; train and compare with `full`.
    """
    return SeaTrainConfig(
        out=Path("models/sea-paper"),
        model=SeaConfig(
            encoder="microsoft/graphcodebert-base",
            pooling="pooler",
            normalize=False,
            aggregator="attn1_sum",
            split=SplitConfig(profile="released", window=32, step=16, min_line=3),
        ),
        loss=LossConfig(temperature=1.0, symmetric=False, max_tokens_per_forward=65536),
        dropout=0.1,
        attention_dropout=0.1,
        train=TrainConfig(
            run_dir=Path("runs/sea-paper"),
            epochs=15,
            batch_size=48,
            grad_clip=1.0,
            seed=5,
            eval_every=500,
            best_metric="mrr",
            optim=OptimConfig(lr=2e-5, weight_decay=0.0, eps=1e-8),
            schedule=ScheduleConfig(kind="linear", warmup_steps=10),
        ),
    )


def minilm() -> SeaTrainConfig:
    """MiniLM with low-rank adapters, scored softly by all entries of a function, for one GPU.

    Its truncation twin: the same with --model.aggregator first.
    """
    return SeaTrainConfig(
        out=Path("models/sea-minilm"),
        model=SeaConfig(
            encoder="minilm",
            aggregator="soft_maxsim",
            split=SplitConfig(budget=127, whole_budget=254, repeat_signature=True, max_blocks=32),
            head_pieces=32,
            split_identifiers=True,
        ),
        search_discount=0.95,
        train=_minilm_training(Path("runs/sea-minilm"), steps=300),
    )


def minilm_single() -> SeaTrainConfig:
    """MiniLM with low-rank adapters and one vector per function: the teacher of `embedded`."""
    return SeaTrainConfig(
        out=Path("models/sea-minilm-single"),
        model=_single_shape(),
        train=_minilm_training(Path("runs/sea-minilm-single"), steps=700),
    )


def _single_shape() -> SeaConfig:
    return SeaConfig(encoder="minilm", aggregator="attn1_mean", raw="whole", split_identifiers=True)


def _minilm_training(run_dir: Path, *, steps: int) -> TrainConfig:
    return TrainConfig(
        run_dir=run_dir,
        steps=steps,
        batch_size=512,
        eval_every=100,
        best_metric="mrr",
        optim=OptimConfig(lr=5e-4, weight_decay=0.01),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=30),
        checkpoint=CheckpointConfig(every=500, keep_last=1),
        data=DataConfig(drop_last=True, workers=6),
        lora=LoraConfig(
            rank=16,
            alpha=32.0,
            targets=("query", "key", "value", "dense"),
            modules_to_save=("aggregation",),
        ),
    )


def embedded() -> SeaTrainConfig:
    """A three-layer encoder cut out of a teacher and taught by it, 8 MB in int8, for one GPU.

    Give --distill.teacher the folder of a trained `minilm-single`. The prepared files are the
    teacher's.
    """
    return SeaTrainConfig(
        out=Path("models/sea-embedded"),
        model=_single_shape(),
        data=SeaDataConfig(extra_per_pair=1),
        distill=DistillConfig(),
        student=StudentConfig(),
        int8=True,
        train=TrainConfig(
            run_dir=Path("runs/sea-embedded"),
            steps=4000,
            batch_size=512,
            eval_every=200,
            best_metric="mrr",
            optim=OptimConfig(lr=1e-3, weight_decay=0.01),
            schedule=ScheduleConfig(kind="cosine", warmup_steps=200),
            checkpoint=CheckpointConfig(every=1000, keep_last=1),
            data=DataConfig(drop_last=True, workers=6),
        ),
    )


PRESETS = {
    "tiny": tiny,
    "paper": paper,
    "minilm": minilm,
    "minilm-single": minilm_single,
    "embedded": embedded,
}
