"""Recipes: what `polyzoo pixart-delta train` takes, and the named starting points. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from polyzoo.core.errors import ConfigError
from polyzoo.pixart_delta.config import ControlConfig, PixArtConfig, xl
from polyzoo.pixart_delta.recipe import LcmRecipe, NoiseRecipe, VaeRecipe
from polyzoo.training.config import (
    CheckpointConfig,
    DataConfig,
    EmaConfig,
    LoraConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)

Task = Literal["base", "lcm", "lcm-lora", "controlnet", "vae"]

LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "proj", "linear", "linear_1", "linear_2",
)  # fmt: skip
"""Layers that the published LCM-LoRA adapts, the patch convolution among them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PixArtDataConfig:
    """What a model learns from; one of manifest, official and icons is set."""

    manifest: Path | None = None
    """Folder of features written by `polyzoo pixart-delta extract`."""
    official: Path | None = None
    """Folder of official feature files, which holds data_info.json and the feature folders."""
    icons: Path | None = None
    """An icon pack, encoded when training starts."""
    resolution: int = 1024
    """Image side that official feature folders are named by, and that buckets are of."""
    bad_limit: int = 20
    """Unreadable files after which training stops; each is named."""
    min_per_bucket: int = 1
    """Buckets with fewer images are left out."""
    balanced: bool = False
    """Draw as many batches of every bucket as of the smallest one."""

    def __post_init__(self) -> None:
        """Check that at most one source is given."""
        given = [n for n in ("manifest", "official", "icons") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ConfigError(f"data.{given[0]} and data.{given[1]}: give one source of data")


@dataclass(frozen=True, kw_only=True, slots=True)
class PixArtTrainConfig:
    """Training of a part of PIXART-delta: data, objective, and the run itself."""

    task: Task = "base"
    """base, lcm, lcm-lora, controlnet, or vae (the small autoencoder)."""
    out: Path = Path("models/pixart-delta")
    """Folder of the finished model; parts already in it that this task does not train stay."""
    start: Path | None = None
    """Model folder to begin from; the teacher of lcm, the frozen base of controlnet."""
    model: PixArtConfig = field(default_factory=PixArtConfig)
    """Shape of a transformer that is trained from nothing; ignored with `start`."""
    control: ControlConfig = field(default_factory=ControlConfig)
    """Shape of the control branch."""
    data: PixArtDataConfig = field(default_factory=PixArtDataConfig)
    """Images and captions."""
    noise: NoiseRecipe = field(default_factory=NoiseRecipe)
    """Objective of base and controlnet."""
    lcm: LcmRecipe = field(default_factory=LcmRecipe)
    """Objective of lcm and lcm-lora; of controlnet too with control_objective=lcm."""
    vae: VaeRecipe = field(default_factory=VaeRecipe)
    """Objective of vae."""
    control_objective: Literal["noise", "lcm"] = "noise"
    """Train the control branch as published, or on an LCM base by the consistency objective."""
    auto_lr: Literal["none", "sqrt"] = "none"
    """sqrt: multiply the learning rate by the root of the global batch over 256."""
    compile: bool = False
    """Compile the network; pays on a GPU for runs of more than a few minutes."""
    int8: bool = False
    """Store large matrices as int8 with one scale per row: a quarter of the size."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The run: steps, batch, optimizer, schedule, checkpoints."""

    def __post_init__(self) -> None:
        """Check the relations between parts."""
        if self.task in ("lcm", "lcm-lora", "controlnet") and self.start is None:
            raise ConfigError(f"task={self.task!r} needs start: the folder of the base model")
        if self.task == "lcm-lora" and self.train.lora is None:
            raise ConfigError("task='lcm-lora' needs train.lora: rank and targets of the adapters")
        if self.task != "lcm-lora" and self.train.lora is not None:
            raise ConfigError(f"train.lora is for task='lcm-lora', not task={self.task!r}")
        if self.task == "vae" and self.data.icons is None:
            raise ConfigError("task='vae' trains the small autoencoder: give data.icons")


def paper() -> PixArtTrainConfig:
    """Base training at 1024 px with size conditions, the official hyper-parameters."""
    return PixArtTrainConfig(
        out=Path("models/pixart-1024"),
        model=xl(1024),
        train=TrainConfig(
            run_dir=Path("runs/pixart-1024"),
            steps=100_000,
            batch_size=12,
            grad_clip=0.01,
            precision="fp16",
            activation_checkpointing=True,
            optim=OptimConfig(lr=2e-5, weight_decay=0.03, eps=1e-10, decay_all=True),
            schedule=ScheduleConfig(kind="constant", warmup_steps=1000),
            ema=EmaConfig(decay=0.9999, warmup=False),
            data=DataConfig(drop_last=True, workers=4),
        ),
    )


def paper_512() -> PixArtTrainConfig:
    """Base training at 512 px on one square size, the official hyper-parameters."""
    return PixArtTrainConfig(
        out=Path("models/pixart-512"),
        model=xl(512),
        data=PixArtDataConfig(resolution=512),
        train=TrainConfig(
            run_dir=Path("runs/pixart-512"),
            steps=100_000,
            batch_size=40,
            grad_clip=1.0,
            precision="fp16",
            activation_checkpointing=True,
            optim=OptimConfig(lr=1e-4, weight_decay=0.03, eps=1e-10, decay_all=True),
            schedule=ScheduleConfig(kind="constant", warmup_steps=1000),
            ema=EmaConfig(decay=0.9999, warmup=False),
            data=DataConfig(drop_last=True, workers=4),
        ),
    )


def paper_lcm() -> PixArtTrainConfig:
    """Consistency distillation at 1024 px; give --start, the folder of the base model."""
    return PixArtTrainConfig(
        task="lcm",
        out=Path("models/pixart-lcm"),
        start=Path("models/pixart-1024"),
        train=TrainConfig(
            run_dir=Path("runs/pixart-lcm"),
            steps=5000,
            batch_size=12,
            grad_clip=0.01,
            precision="fp16",
            activation_checkpointing=True,
            optim=OptimConfig(lr=2e-5, weight_decay=0.0, eps=1e-10),
            schedule=ScheduleConfig(kind="constant", warmup_steps=100),
            data=DataConfig(drop_last=True, workers=4),
        ),
    )


def paper_lcm_lora() -> PixArtTrainConfig:
    """Consistency distillation into adapters of rank 32; give --start."""
    whole = paper_lcm()
    return replace(
        whole,
        task="lcm-lora",
        out=Path("models/pixart-lcm-lora"),
        lcm=LcmRecipe(null="empty"),
        train=replace(
            whole.train,
            run_dir=Path("runs/pixart-lcm-lora"),
            lora=LoraConfig(rank=32, alpha=8.0, targets=LORA_TARGETS),
        ),
    )


def paper_controlnet() -> PixArtTrainConfig:
    """ControlNet-Transformer at 1024 px over a frozen base; give --start."""
    return PixArtTrainConfig(
        task="controlnet",
        out=Path("models/pixart-control"),
        start=Path("models/pixart-1024"),
        train=TrainConfig(
            run_dir=Path("runs/pixart-control"),
            steps=10_000,
            batch_size=4,
            grad_accum=4,
            grad_clip=0.01,
            precision="fp16",
            activation_checkpointing=True,
            optim=OptimConfig(lr=2e-5, weight_decay=0.03, eps=1e-10, decay_all=True),
            schedule=ScheduleConfig(kind="constant"),
            data=DataConfig(drop_last=True, workers=4),
        ),
    )


ICON_MODEL = PixArtConfig(
    sample_size=16,
    num_layers=8,
    num_attention_heads=6,
    attention_head_dim=32,
    caption_channels=256,
    caption_length=24,
    use_additional_conditions=False,
)
"""5.1 M parameters: 64 tokens of 4 x 4 latent pixels' quarter, for images of 64 pixels."""


def icons_vae() -> PixArtTrainConfig:
    """The small autoencoder, on the icon pack; one GPU, two minutes."""
    return PixArtTrainConfig(
        task="vae",
        out=Path("models/icons"),
        data=PixArtDataConfig(icons=Path("icons/64")),
        compile=True,
        train=TrainConfig(
            run_dir=Path("runs/icons-vae"),
            steps=3000,
            batch_size=256,
            optim=OptimConfig(lr=1e-3, weight_decay=0.0, betas=(0.9, 0.99)),
            schedule=ScheduleConfig(kind="cosine", warmup_steps=100, final_fraction=0.02),
            ema=EmaConfig(decay=0.995),
            checkpoint=CheckpointConfig(every=500, keep_last=1),
            data=DataConfig(drop_last=True),
        ),
    )


def icons() -> PixArtTrainConfig:
    """The small transformer, on the icon pack, after icons-vae; one GPU, six minutes."""
    return PixArtTrainConfig(
        task="base",
        out=Path("models/icons"),
        model=ICON_MODEL,
        data=PixArtDataConfig(icons=Path("icons/64"), resolution=64),
        noise=NoiseRecipe(null="empty"),
        compile=True,
        train=TrainConfig(
            run_dir=Path("runs/icons"),
            steps=20_000,
            batch_size=512,
            optim=OptimConfig(lr=1e-3, weight_decay=0.0, betas=(0.9, 0.99)),
            schedule=ScheduleConfig(kind="cosine", warmup_steps=300, final_fraction=0.02),
            ema=EmaConfig(decay=0.9995),
            checkpoint=CheckpointConfig(every=2000, keep_last=1),
            data=DataConfig(drop_last=True),
        ),
    )


def icons_lcm() -> PixArtTrainConfig:
    """Consistency distillation of the small transformer into adapters, after icons."""
    return PixArtTrainConfig(
        task="lcm-lora",
        out=Path("models/icons"),
        start=Path("models/icons"),
        data=PixArtDataConfig(icons=Path("icons/64"), resolution=64),
        lcm=LcmRecipe(null="empty", guidance=2.0),
        compile=True,
        train=TrainConfig(
            run_dir=Path("runs/icons-lcm"),
            steps=4000,
            batch_size=512,
            optim=OptimConfig(lr=5e-4, weight_decay=0.0, betas=(0.9, 0.99)),
            schedule=ScheduleConfig(kind="cosine", warmup_steps=100, final_fraction=0.05),
            checkpoint=CheckpointConfig(every=1000, keep_last=1),
            data=DataConfig(drop_last=True),
            lora=LoraConfig(rank=32, alpha=32.0, targets=LORA_TARGETS),
        ),
    )


def icons_controlnet() -> PixArtTrainConfig:
    """Control of the small transformer by edge maps, after icons."""
    return PixArtTrainConfig(
        task="controlnet",
        out=Path("models/icons"),
        start=Path("models/icons"),
        control=ControlConfig(num_blocks=2),
        data=PixArtDataConfig(icons=Path("icons/64"), resolution=64),
        noise=NoiseRecipe(null="empty", caption_dropout=0.3),
        compile=True,
        train=TrainConfig(
            run_dir=Path("runs/icons-controlnet"),
            steps=4000,
            batch_size=512,
            optim=OptimConfig(lr=1e-3, weight_decay=0.0, betas=(0.9, 0.99)),
            schedule=ScheduleConfig(kind="cosine", warmup_steps=100, final_fraction=0.02),
            checkpoint=CheckpointConfig(every=1000, keep_last=1),
            data=DataConfig(drop_last=True),
        ),
    )


PRESETS = {
    "paper": paper,
    "paper-512": paper_512,
    "paper-lcm": paper_lcm,
    "paper-lcm-lora": paper_lcm_lora,
    "paper-controlnet": paper_controlnet,
    "icons-vae": icons_vae,
    "icons": icons,
    "icons-lcm": icons_lcm,
    "icons-controlnet": icons_controlnet,
}
