"""The recipe of a training run as plain values. Torch-free; every field is a command-line flag."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from polyzoo.core.errors import ConfigError

Precision = Literal["auto", "bf16", "fp16", "fp32"]
Schedule = Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"]
StrategyName = Literal[
    "auto", "single", "ddp", "fsdp2", "fsdp2-cpu", "zero3", "zero3-opt-cpu", "zero3-cpu",
    "zero3-opt-nvme", "zero3-nvme",
]  # fmt: skip


def _at_least(owner: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and not value >= least:
            raise ConfigError(f"{name}={value!r} must be at least {least:g}")


def _above(owner: object, limit: float, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and not value > limit:
            raise ConfigError(f"{name}={value!r} must be above {limit:g}")


def _fraction(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not 0 <= value <= 1:
            raise ConfigError(f"{name}={value!r} must be between 0 and 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """How weights follow gradients."""

    name: str = "adamw"
    """adamw, or the import path of a torch optimizer class, such as torch.optim:SGD."""
    lr: float = 3e-4
    """Peak learning rate; the schedule multiplies it by a factor from 0 to 1."""
    weight_decay: float = 0.01
    """Decay of weights with two or more axes; decoupled in AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's two moving-average factors."""
    eps: float = 1e-8
    """AdamW's guard against division by zero."""
    decay_all: bool = False
    """Decay biases, norms and other one-axis parameters too."""
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Keyword arguments of an optimizer given by import path, such as momentum."""

    def __post_init__(self) -> None:
        _above(self, 0, "lr", "eps")
        _at_least(self, 0, "weight_decay")
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ConfigError(f"betas={self.betas!r} must lie in [0, 1)")
        if self.name != "adamw" and ":" not in self.name:
            raise ConfigError(f"name={self.name!r} must be adamw or an import path package:Class")
        if self.name == "adamw" and self.options:
            raise ConfigError(f"options={self.options!r} are for optimizers given by import path")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """How the learning rate moves over the run; a pure function of the step."""

    kind: Schedule = "cosine"
    """constant, linear or cosine to the end, inverse_sqrt, or wsd (warm-up, stable, decay)."""
    warmup_steps: int = 0
    """Steps of linear growth from 0 to the peak."""
    warmup_fraction: float = 0.0
    """The same as a share of all steps; only one of the two may be set."""
    final_fraction: float = 0.0
    """Last learning rate as a share of the peak; linear, cosine and wsd."""
    decay_fraction: float = 0.1
    """Share of all steps spent on wsd's decay."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "warmup_steps")
        _fraction(self, "warmup_fraction", "final_fraction", "decay_fraction")
        if self.warmup_steps and self.warmup_fraction:
            raise ConfigError(
                f"warmup_steps={self.warmup_steps} and warmup_fraction={self.warmup_fraction} "
                "say the same thing twice; set one to 0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When the run is saved, what stays on disk, and how it is read back."""

    every: int | None = 500
    """Steps between two checkpoints; None saves only at the end and when interrupted."""
    keep_last: int = 2
    """Newest checkpoints that stay."""
    keep_every: int | None = None
    """Checkpoints at multiples of this step stay for good."""
    verify: bool = True
    """Compare the hash of every file before resuming; sizes are always compared."""
    from_step: int | None = None
    """Resume from this step instead of the newest; later checkpoints and log lines are removed."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "every", "keep_last", "keep_every", "from_step")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """How samples become batches."""

    shuffle: bool = True
    """Draw a new order every epoch, from the seed and the epoch alone."""
    drop_last: bool = False
    """Leave out the samples that do not fill the last batch of an epoch; their number is logged."""
    workers: int = 0
    """Loader processes; 0 reads in the training process. Results do not depend on it."""
    prefetch: int = 2
    """Batches each loader process prepares ahead."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "workers")
        _at_least(self, 1, "prefetch")


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What the run tells while it runs and leaves behind."""

    every: int = 10
    """Steps between two lines of metrics.jsonl; device values are read only then."""
    progress: bool = True
    """Show progress on stderr: a bar on a terminal, plain lines elsewhere."""
    tensorboard: bool = False
    """Write TensorBoard event files to run_dir/tensorboard."""
    plots: bool = True
    """Draw run_dir/plots/*.png when the run ends or is interrupted."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "every")


@dataclass(frozen=True, kw_only=True, slots=True)
class EmaConfig:
    """Moving average of the weights, in fp32; evaluated and returned in their place."""

    decay: float | None = None
    """Share of the old average kept at each step, such as 0.999; None keeps no average."""
    warmup: bool = True
    """Start with a smaller share, (1 + step) / (10 + step), so that early weights are forgotten."""

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ConfigError(f"decay={self.decay!r} must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters (peft) in place of full training; the rest of the model is frozen."""

    rank: int = 8
    """Inner size of each adapter."""
    alpha: float = 16.0
    """Adapters are scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout before each adapter."""
    targets: tuple[str, ...] = ("all-linear",)
    """Endings of the names of adapted layers; all-linear takes every linear layer."""
    modules_to_save: tuple[str, ...] = ()
    """Endings of the names of modules trained and stored in full, such as a new head."""
    dora: bool = False
    """Split weights into magnitude and direction (DoRA)."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "rank")
        _above(self, 0, "alpha")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout!r} must lie in [0, 1)")
        if not self.targets:
            raise ConfigError("targets=() adapts nothing; name layers, or all-linear")


@dataclass(frozen=True, kw_only=True, slots=True)
class TierConfig:
    """How the sharded and offloaded strategies use the machine; what is None is computed."""

    nvme_path: Path | None = None
    """Folder on a local drive for the nvme strategies; its files are removed at the end."""
    pin_memory: bool = True
    """Page-locked host buffers: faster copies, but they cannot be paged out."""
    sharded_init: bool = False
    """Build the model in pieces, for a model that fits in no single process; its first weights are
    then rounded to the compute dtype."""
    host_optimizer: Literal["fused", "deepspeed"] = "fused"
    """AdamW of the offloaded strategies: ours, one pass over memory, or DeepSpeed's CPUAdam."""
    overlap: bool = False
    """zero3-cpu with the fused step: begin the next forward pass while later layers are still being
    updated; each layer waits for its own. Same numbers; not yet measured on a GPU."""
    host_threads: int | None = None
    """Threads of the host's optimizer step; by default the cores of the process's share."""
    sub_group_size: int | None = None
    """Parameters updated at a time by the offloaded strategies."""
    bucket_size: int | None = None
    """Gradient elements reduced at a time."""
    tile_linears: int = 1
    """Compute large linear layers in this many tiles; saves GPU memory under zero3. A run's
    checkpoints belong to their number; best/ and results have whole layers."""
    tile_above: int = 64 * 2**20
    """Elements of a weight from which tile_linears applies."""
    extra: Path | None = None
    """JSON file of DeepSpeed settings that go over the computed ones."""
    timeout: float = 30.0
    """Minutes without progress after which a process writes where it stands and gives up."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "host_threads", "sub_group_size", "bucket_size", "tile_linears")
        _at_least(self, 1, "tile_above")
        _above(self, 0, "timeout")
        if self.tile_linears > 1 and self.sharded_init:
            raise ConfigError("tile_linears cuts whole layers: set sharded_init to false")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run: how long, on what, how precise, and where it is kept.

    Example:
        >>> TrainConfig(run_dir=Path("runs/first"), steps=1000, optim=OptimConfig(lr=1e-3)).steps
        1000
    """

    run_dir: Path = Path("runs/train")
    """Folder of the run: checkpoints, best weights, metrics, plots."""
    steps: int | None = None
    """Optimizer steps in all; set this or epochs."""
    epochs: int | None = None
    """Passes over the data in all; set this or steps."""
    batch_size: int = 32
    """Samples in a micro-batch, the unit of one forward pass; each process has its own."""
    grad_accum: int = 1
    """Micro-batches in an optimizer step; an epoch's last step may hold fewer."""
    grad_clip: float | None = 1.0
    """Largest global norm of the gradients; None leaves them alone."""
    seed: int = 0
    """Decides weights, data order, dropout and every other draw; 0 to 2**32 - 1."""
    precision: Precision = "auto"
    """Of the forward pass; master weights are fp32. auto: bf16 on CUDA, fp32 elsewhere."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    strategy: StrategyName = "auto"
    """How weights, gradients and optimizer are spread over GPUs, host memory and drive. auto: the
    fastest that fits."""
    activation_checkpointing: bool = False
    """Recompute the model's blocks in the backward pass to save memory."""
    deterministic: bool = False
    """Ask torch for deterministic kernels; slower, and some operations refuse."""
    nan_policy: Literal["raise", "skip"] = "raise"
    """A non-finite loss or gradient ends the run, or leaves the weights alone for that step."""
    max_skips: int = 10
    """Consecutive skipped steps after which the run ends anyway."""
    eval_every: int | None = None
    """Steps between two evaluations; the last step is always evaluated."""
    best_metric: str | None = None
    """Evaluation metric whose best weights are kept in run_dir/best."""
    best_mode: Literal["max", "min"] = "max"
    """Whether more or less of best_metric is better."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: go on from a checkpoint if there is one; never: refuse one; must: refuse none."""
    accept_changes: bool = False
    """Resume although the recipe differs from the one run_dir was started with."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over time."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and resuming."""
    data: DataConfig = field(default_factory=DataConfig)
    """Batches."""
    log: LogConfig = field(default_factory=LogConfig)
    """Metrics, progress, plots."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """Averaged weights."""
    tier: TierConfig = field(default_factory=TierConfig)
    """Sharding and offload."""
    lora: LoraConfig | None = None
    """Adapters; None trains the model itself."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} must be 0 to {2**32 - 1}")
        _at_least(self, 1, "steps", "epochs", "batch_size", "grad_accum", "max_skips", "eval_every")
        _above(self, 0, "grad_clip")
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(
                f"steps={self.steps} and epochs={self.epochs} both say how long; set one to None"
            )


FREE_ON_RESUME = frozenset(
    {
        "run_dir", "steps", "epochs", "batch_size", "grad_accum", "device", "precision", "strategy",
        "tier",
        "activation_checkpointing", "deterministic", "nan_policy", "max_skips", "eval_every",
        "resume", "accept_changes", "checkpoint", "log", "data.workers", "data.prefetch",
    }
)  # fmt: skip
"""Fields that may change when a run is resumed; all others are its recipe."""
