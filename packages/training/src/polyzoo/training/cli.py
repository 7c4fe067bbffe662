"""The `polyzoo training` commands. Torch-free: what a command runs is named, and imported then."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from polyzoo.core.cli import Command, CommandGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectConfig:
    """Which run to look at."""

    run_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_DIR")]
    """Folder of the run."""
    verify: bool = True
    """Read every byte of every checkpoint and compare its hash; else only sizes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """A model, a machine and a step; flags go over what is known of the machine."""

    model: str | None = None
    """0.1T, 0.5T, 1T, 10T, 100T (the paper's), or package.module:function that builds a module."""
    layers: int | None = None
    """Blocks of a transformer, where no model is named."""
    width: int | None = None
    """Its channels."""
    heads: int = 16
    """Its attention heads."""
    vocabulary: int = 0
    """Its tokens, embedding and output counted; 0 without them."""
    gpus: int | None = None
    """GPUs per node."""
    nodes: int | None = None
    """Nodes."""
    gpu_mem: str | None = None
    """Memory of a GPU, such as 80GiB."""
    ram: str | None = None
    """Memory of a node, such as 128GiB."""
    nvme: str | None = None
    """Free space on a node's local drive, such as 1TB."""
    this_machine: bool = False
    """Start from this machine's sizes, and from its speeds if `probe` has measured them."""
    nvme_path: Path | None = None
    """Folder on this machine's drive, with this_machine."""
    batch_size: int = 8
    """Samples of a micro-batch, per process."""
    sequence: int = 1024
    """Tokens of a sample."""
    grad_accum: int = 1
    """Micro-batches in an optimizer step."""
    activation_checkpointing: bool = True
    """Recompute blocks in the backward pass."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Of the forward pass."""
    ema: bool = False
    """Keep a moving average of the weights."""
    steps: int | None = None
    """Of the run, to say what it writes to a drive."""
    without_deepspeed: bool = False
    """Recommend only what needs torch alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeConfig:
    """What to measure."""

    nvme_path: Path | None = None
    """Folder on the drive to measure; None leaves the drive out."""
    drive_test_mib: int = 1024
    """MiB written to it and read back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig:
    """What to look at."""

    nvme_path: Path | None = None
    """Folder for the nvme strategies."""
    build: bool = False
    """Compile what the offloaded strategies need, once, so that runs start at once."""
    timeout: float = 20.0
    """Minutes that one compilation may take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """Which checkpoint goes where."""

    run_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_DIR")]
    """Folder of the run."""
    out: Path
    """The safetensors file."""
    step: int | None = None
    """Checkpoint; the newest where not given."""
    average: bool = False
    """Take the averaged weights."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the weights in the file."""


GROUP = CommandGroup(
    summary="Look after training runs",
    commands={
        "inspect": Command(
            summary="Show how a run stands, and verify its checkpoints",
            config=InspectConfig,
            run="polyzoo.training.inspect:inspect",
            render="polyzoo.training.inspect:render",
        ),
        "plan": Command(
            summary="Say what fits where, how fast, and which strategy to take",
            config=PlanConfig,
            run="polyzoo.training.planning:plan",
            render="polyzoo.training.planning:render",
        ),
        "probe": Command(
            summary="Measure this machine's bandwidths for the plan",
            config=ProbeConfig,
            run="polyzoo.training.probe:probe",
            render="polyzoo.training.probe:render",
        ),
        "doctor": Command(
            summary="Check compilers, libraries and limits; build what is compiled",
            config=DoctorConfig,
            run="polyzoo.training.doctor:examine",
            render="polyzoo.training.doctor:render",
        ),
        "convert": Command(
            summary="Put a checkpoint's weights together in one safetensors file",
            config=ConvertConfig,
            run="polyzoo.training.convert:convert",
        ),
    },
)
