"""What fits, how fast, and what bounds it: arithmetic on a model and a machine. Torch-free.

The formulas are those of the ZeRO-Infinity paper (arXiv 2104.07857, sections 3 and 4), with the
bytes that this engine really keeps in place of the paper's 20 a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from polyzoo.core.errors import ConfigError
from polyzoo.training.strategies.zero3_config import (
    PARAMETER_BUFFERS,
    PIPELINED_BUFFERS,
    SUB_GROUP,
    bucket_elements,
)

GIB = 2**30
MARGINS = {"gpu": 0.90, "host": 0.90, "drive": 0.95}
"""Share of each tier that a plan may fill."""
ENDURANCE = 600e12
"""Bytes that a common drive is rated to take; a tenth of it is worth a warning."""
STRATEGIES = (
    "single", "ddp", "fsdp2", "zero3", "zero3-opt-cpu", "fsdp2-cpu", "zero3-cpu",
    "zero3-opt-nvme", "zero3-nvme",
)  # fmt: skip

_PROCESS = 3.0 * GIB  # interpreter, torch, CUDA context and libraries in host memory
_CONTEXT = 0.3 * GIB  # workspaces on the GPU
_HOOKS = 0.0065  # seconds a block and micro-batch that ZeRO's hooks take, measured on an H100
_LIVE_SHARE = 0.25  # of the GPU for parameters that stay gathered; see strategies/zero3.py


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """The sizes of a model that decide what fits."""

    trainable: int
    """Trained parameters."""
    frozen: int = 0
    """Parameters that are not trained, such as the base under adapters."""
    largest_parameter: int = 0
    """Elements of the largest single parameter."""
    largest_block: int = 0
    """Parameters of the largest part that is gathered as one."""
    layers: int = 1
    """Repeated blocks."""
    width: int = 0
    """Channels between the blocks; 0 leaves activations out of the estimate."""
    heads: int = 1
    """Attention heads."""
    vocabulary: int = 0
    """Outputs of a token classifier at the end; 0 without one."""

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.trainable + self.frozen


def transformer(layers: int, width: int, *, heads: int = 1, vocabulary: int = 0) -> ModelSpec:
    """Return a transformer of 12 * layers * width**2 parameters (paper, section 3).

    Example:
        >>> f"{transformer(128, 25_600).trainable:.3e}"
        '1.007e+12'
    """
    block = 12 * width**2
    outer = 2 * vocabulary * width
    return ModelSpec(
        trainable=layers * block + outer,
        largest_parameter=max(4 * width**2, vocabulary * width),
        largest_block=block,
        layers=layers,
        width=width,
        heads=heads,
        vocabulary=vocabulary,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineSpec:
    """One node of a cluster, and how many there are; bytes, bytes a second, operations a second."""

    gpus: int = 1
    """Processes and GPUs per node."""
    nodes: int = 1
    """Equal nodes."""
    gpu_bytes: float = 80 * GIB
    """Memory of a GPU."""
    host_bytes: float = 128 * GIB
    """Memory of a node."""
    drive_bytes: float = 0.0
    """Free space on a node's local drive; 0 without one."""
    rate: float = 500e12
    """Operations a second that a GPU reaches in a large model in bf16."""
    link: float = 54e9
    """Bandwidth between host and one GPU, each way."""
    node_link: float = 200e9
    """Bandwidth between host and all GPUs of a node together."""
    peer: float = 300e9
    """Bandwidth of one GPU to the others (all-gather)."""
    host_memory: float = 145e9
    """Bandwidth of a node's memory in the optimizer step."""
    drive_read: float = 2.5e9
    """Bandwidth of reading from a node's drive."""
    drive_write: float = 1.3e9
    """Bandwidth of writing to a node's drive."""

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.gpus * self.nodes


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkSpec:
    """What a step does."""

    batch: int = 8
    """Samples of a micro-batch, per process."""
    sequence: int = 1024
    """Tokens of a sample."""
    accumulation: int = 1
    """Micro-batches in an optimizer step."""
    recompute: bool = True
    """Activation checkpointing of every block."""
    half: bool = True
    """Compute in 16 bits."""
    averaged: bool = False
    """Keep a moving average of the weights."""

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch, per process."""
        return self.batch * self.sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """One strategy on one machine."""

    strategy: str
    gpu: float
    """Peak bytes per GPU."""
    host: float
    """Peak bytes per node."""
    drive: float
    """Bytes on each node's drive."""
    step_seconds: float
    """One optimizer step."""
    bound: str
    """compute, link, optimizer or drive."""
    written: float
    """Bytes written to each node's drive per optimizer step."""
    shortfalls: dict[str, float] = field(default_factory=dict)
    """Missing bytes by tier, beyond the margin; empty if it fits."""
    reason: str | None = None
    """Why it does not apply here at all."""

    @property
    def fits(self) -> bool:
        """Whether every tier holds it."""
        return not self.shortfalls and self.reason is None


# --- memory ---


def model_states(parameters: float) -> float:
    """Return the paper's bytes of model states: 20 a parameter (section 3)."""
    return 20 * parameters


def checkpointed_activations(
    *, batch: int, sequence: int, width: int, layers: int, every: int = 1
) -> float:
    """Return bytes of activation checkpoints in 16 bits: 2 * b * n * d * layers / every."""
    return 2 * batch * sequence * width * layers / every


def state_working_memory(width: int) -> float:
    """Return bytes of the largest operator and its gradient in 16 bits: 4 * d * 4d."""
    return 4 * width * 4 * width


def activation_working_memory(
    *, batch: int, sequence: int, width: int, heads: int, every: int = 1, fused: bool = False
) -> float:
    """Return bytes of activations between two checkpoints.

    Args:
        batch: Sequences at a time.
        sequence: Tokens of each.
        width: Channels.
        heads: Of the attention.
        every: Blocks between two checkpoints.
        fused: Attention that does not keep its weights: the square term goes.
    """
    square = 0 if fused else 2 * heads * sequence
    return batch * sequence * every * (16 * width + square)


def activations(model: ModelSpec, work: WorkSpec, *, wide: bool) -> tuple[float, float]:
    """Return bytes of what blocks keep for the backward pass, and of what is alive besides.

    With fused attention, per process. The first has gone when the last gradient is there.

    Args:
        model: Its width and layers; nothing is counted where the width is not known.
        work: Tokens at a time, and whether blocks are recomputed.
        wide: The stream between the blocks is fp32 (autocast in front of fp32 weights).
    """
    if not model.width:
        return 0.0, 0.0
    stream = (4 if wide or not work.half else 2) * work.tokens * model.width
    inner = (34 if work.half else 68) * work.tokens * model.width
    logits = 3 * 4 * work.tokens * model.vocabulary
    kept = model.layers * (stream if work.recompute else inner)
    return kept, max(inner, logits)


def estimate(strategy: str, model: ModelSpec, machine: MachineSpec, work: WorkSpec) -> Estimate:
    """Return memory, time and wear of a strategy.

    Raises:
        ConfigError: No such strategy.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"strategy={strategy!r}: use one of {', '.join(STRATEGIES)}")
    gpu, host, drive = _memory(strategy, model, machine, work)
    seconds, bound, written = _time(strategy, model, machine, work)
    result = Estimate(
        strategy=strategy, gpu=gpu, host=host, drive=drive,
        step_seconds=seconds, bound=bound, written=written,
        reason=_unfit(strategy, machine),
    )  # fmt: skip
    limits = {
        "gpu": (gpu, machine.gpu_bytes), "host": (host, machine.host_bytes),
        "drive": (drive, machine.drive_bytes),
    }  # fmt: skip
    short = {
        tier: used - MARGINS[tier] * size
        for tier, (used, size) in limits.items()
        if used > MARGINS[tier] * size
    }
    return replace(result, shortfalls=short)


def _unfit(strategy: str, machine: MachineSpec) -> str | None:
    if strategy == "single" and machine.world > 1:
        return f"one process, not {machine.world}"
    if strategy == "ddp" and machine.world == 1:
        return "one process: single"
    if "nvme" in strategy and not machine.drive_bytes:
        return "no drive is given"
    return None


def _memory(
    strategy: str, model: ModelSpec, machine: MachineSpec, work: WorkSpec
) -> tuple[float, float, float]:
    """Return bytes per GPU, per node and on its drive."""
    trained, frozen = model.trainable, model.frozen
    own, own_frozen = trained / machine.world, frozen / machine.world
    half = 2 if work.half else 4
    average = 4 if work.averaged else 0
    block = model.largest_block or model.parameters
    host = machine.gpus * _PROCESS
    if strategy in ("single", "ddp"):
        kept, alive = activations(model, work, wide=True)
        gradients = 4 * trained  # they come while what is kept goes
        states = (12 + average) * trained + half * frozen
        return states + max(gradients, kept) + alive + _CONTEXT, host, 0.0
    if strategy.startswith("fsdp2"):
        states = (16 + average) * own + half * own_frozen
        # Two blocks gathered (one in use, one on its way), and the gradients of one in fp32.
        window = 2 * half * block + 4 * block + sum(activations(model, work, wide=True)) + _CONTEXT
        if strategy == "fsdp2":
            return states + window, host, 0.0
        return window, host + machine.gpus * states, 0.0
    gradient = half if work.accumulation == 1 else 4
    window = (
        zero3_window(model, machine, work, on_drive=strategy == "zero3-nvme")
        + sum(activations(model, work, wide=False))
        + _CONTEXT
    )
    weights = half * own + half * own_frozen
    per_host, per_drive = 0.0, 0.0
    if strategy == "zero3":
        return weights + (12 + average + gradient + 4) * own + window, host, 0.0
    if strategy == "zero3-opt-cpu":
        return weights + window, host + machine.gpus * (12 + average + gradient) * own, 0.0
    if strategy == "zero3-cpu":
        per_host = (12 + average + gradient) * own + weights
        return window, host + machine.gpus * per_host, 0.0
    buffers = nvme_buffers(model, machine)
    per_drive = 16 * own
    # With one micro-batch gradients go straight to the drive; sums of several wait in the host.
    per_host = buffers + average * own + (gradient * own if work.accumulation > 1 else 0)
    if strategy == "zero3-opt-nvme":
        return weights + window, host + machine.gpus * per_host, machine.gpus * per_drive
    per_drive += weights
    per_host += half * PARAMETER_BUFFERS * model.largest_parameter / machine.world
    return window, host + machine.gpus * per_host, machine.gpus * per_drive


def zero3_window(
    model: ModelSpec, machine: MachineSpec, work: WorkSpec, *, on_drive: bool
) -> float:
    """Return bytes of parameters and gradients in use on a GPU under ZeRO-3."""
    half = 2 if work.half else 4
    live = 0.0 if on_drive else min(model.parameters, _LIVE_SHARE * machine.gpu_bytes / half)
    prefetch = bucket_elements(model.largest_block)
    bucket = bucket_elements(model.largest_parameter)
    # In use: an operator and its gradient, buckets being filled and sent.
    return half * (max(live, model.largest_parameter + prefetch) + 2 * bucket) + (
        half * model.largest_parameter
    )


def nvme_buffers(model: ModelSpec, machine: MachineSpec) -> float:
    """Return bytes of page-locked buffers per process of an optimizer on a drive."""
    own = model.trainable / machine.world
    group = min(SUB_GROUP, own / 4) + model.largest_parameter / machine.world
    return (4 * PIPELINED_BUFFERS + 4 + 2) * group


# --- time ---


def efficiency(*, intensity: float, bandwidth: float, peak: float) -> float:
    """Return the share of peak reached without overlap: ait * bw / (ait * bw + peak)."""
    reached = intensity * bandwidth
    return reached / (reached + peak)


def _time(
    strategy: str, model: ModelSpec, machine: MachineSpec, work: WorkSpec
) -> tuple[float, str, float]:
    """Return seconds of an optimizer step, what bounds it, and bytes written to a drive."""
    world, half = machine.world, (2 if work.half else 4)
    micro = work.accumulation
    operations = (8 if work.recompute else 6) * model.parameters * work.tokens
    hooks = micro * model.layers * _HOOKS if strategy.startswith("zero3") else 0.0
    parts: dict[str, float] = {"compute": micro * operations / machine.rate}
    own = model.trainable / world
    written = 0.0
    link = min(machine.link, machine.node_link / machine.gpus)
    if world > 1:
        moved = half * model.parameters * (3 if strategy not in ("single", "ddp") else 2)
        parts["peer"] = micro * moved / machine.peer
    if strategy in ("fsdp2-cpu", "zero3-cpu"):
        # Parameters in twice (a block's recomputation and backward pass share one), gradients out.
        parts["link"] = micro * 2 * half * model.parameters / world / link
    elif strategy == "zero3-opt-cpu":
        parts["link"] = micro * half * own / link
    optimizer = 28 * own / 2e12  # of the GPU's own memory
    if strategy in ("fsdp2-cpu", "zero3-cpu", "zero3-opt-cpu"):
        # fsdp2-cpu scales gradients in a pass of its own, and gathers fp32 weights' copies.
        each = 44 if strategy == "fsdp2-cpu" else 28
        optimizer = each * own * machine.gpus / machine.host_memory
    if "nvme" in strategy:
        share = own * machine.gpus
        read, write = (12 + 4) * share, (12 + 4 * micro) * share
        if strategy == "zero3-nvme":
            read += micro * 2 * half * share
            write += half * share
        written = write
        optimizer = max(
            read / machine.drive_read + write / machine.drive_write,
            28 * share / machine.host_memory,
        )
    busy = max(parts.values()) + hooks
    total = busy + optimizer
    bound = max(parts, key=lambda name: parts[name])
    if optimizer > busy:
        bound = "drive" if "nvme" in strategy else "optimizer"
    return total, bound, written


# --- choice ---


def order(world: int) -> Sequence[str]:
    """Return the strategies from the fastest to the most frugal."""
    first = ("single",) if world == 1 else ("ddp", "fsdp2", "zero3")
    return (*first, "zero3-opt-cpu", "fsdp2-cpu", "zero3-cpu", "zero3-opt-nvme", "zero3-nvme")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Every strategy, and the one to take."""

    estimates: list[Estimate]
    recommended: str | None
    """None where nothing fits."""
    notes: list[str]


def recommend(
    model: ModelSpec,
    machine: MachineSpec,
    work: WorkSpec,
    *,
    has_deepspeed: bool = True,
    steps: int | None = None,
) -> Plan:
    """Return all estimates, and the fastest strategy that fits.

    Args:
        model: The model.
        machine: The machine.
        work: A step.
        has_deepspeed: Without it the zero3 strategies are left out of the choice.
        steps: Of the run, for what it writes to a drive.
    """
    estimates = {name: estimate(name, model, machine, work) for name in STRATEGIES}
    allowed = [
        name for name in order(machine.world) if has_deepspeed or not name.startswith("zero3")
    ]
    fitting = [name for name in allowed if estimates[name].fits]
    chosen: str | None = None
    if fitting:
        # The order is by speed but for the offloaded tiers, whose speed depends on the machine.
        offloaded = {"zero3-opt-cpu", "fsdp2-cpu", "zero3-cpu"}
        chosen = fitting[0]
        if chosen in offloaded:
            rivals = [name for name in fitting if name in offloaded]
            chosen = min(rivals, key=lambda name: estimates[name].step_seconds)
    return Plan(
        estimates=list(estimates.values()),
        recommended=chosen,
        notes=_notes(chosen, estimates, has_deepspeed, steps),
    )


def _notes(
    chosen: str | None,
    estimates: dict[str, Estimate],
    has_deepspeed: bool,
    steps: int | None,
) -> list[str]:
    notes: list[str] = []
    if chosen is None:
        closest = min(
            (e for e in estimates.values() if e.reason is None),
            key=lambda e: sum(e.shortfalls.values()),
        )
        missing = ", ".join(f"{t} {b / GIB:,.1f} GiB" for t, b in closest.shortfalls.items())
        notes.append(f"nothing fits; closest is {closest.strategy}, missing {missing}")
        return notes
    best = estimates[chosen]
    if not has_deepspeed:
        notes.append("DeepSpeed is not installed: the zero3 strategies are left out")
    if best.bound in ("optimizer", "drive"):
        notes.append("a larger grad_accum would spread the optimizer step over more tokens")
    if best.written and steps:
        total = best.written * steps
        if total > ENDURANCE / 10:
            notes.append(
                f"W-WEAR: {total / 1e12:,.1f} TB written to each node's drive in {steps:,} steps, "
                f"of the {ENDURANCE / 1e12:,.0f} TB a common drive is rated for"
            )
    return notes


def largest_model(
    strategy: str,
    machine: MachineSpec,
    work: WorkSpec,
    shape: Callable[[float], ModelSpec],
) -> float:
    """Return the parameters of the largest model of a family that fits.

    Args:
        strategy: One of STRATEGIES.
        machine: The machine.
        work: A step.
        shape: From a number of parameters to a model of about that size.
    """
    low, high = 1e6, 1e15
    while high / low > 1.005:
        middle = math.sqrt(low * high)
        if estimate(strategy, shape(middle), machine, work).fits:
            low = middle
        else:
            high = middle
    return low
