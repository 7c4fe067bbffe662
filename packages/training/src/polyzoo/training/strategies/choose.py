"""From the name of a strategy, or `auto`, to the strategy."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from polyzoo.core.log import get_logger
from polyzoo.training.config import TrainConfig
from polyzoo.training.errors import TrainingError
from polyzoo.training.launch import Launch
from polyzoo.training.optim import ParamGroups
from polyzoo.training.plan import WorkSpec, recommend
from polyzoo.training.planning import PlanReport, render
from polyzoo.training.probe import describe
from polyzoo.training.spec import spec_of
from polyzoo.training.strategies.base import Strategy
from polyzoo.training.strategies.ddp import DataParallel
from polyzoo.training.strategies.single import SingleDevice
from polyzoo.training.world import World

logger = get_logger(__name__)


def needs_group(name: str) -> bool:
    """Tell whether a strategy needs torch's process group even for a single process."""
    return name not in ("auto", "single", "ddp")


def check_launch(name: str, launch: Launch) -> None:
    """Refuse several processes for a strategy of one.

    Raises:
        TrainingError: E-WORLD.
    """
    if name == "single" and launch.world_size > 1:
        raise TrainingError(
            "E-WORLD",
            f"strategy=single cannot use {launch.world_size} processes",
            f"the launcher ({launch.launcher}) has started that many",
            "use strategy=auto, ddp or one that shards, or start a single process",
        )


def choose_for(model: nn.Module, config: TrainConfig, world: World, device: torch.device) -> str:
    """Return the fastest strategy that fits the model on this machine.

    Without a GPU that is one process, or several with the whole model each.

    Raises:
        TrainingError: E-RAM-PLAN with the table, where nothing fits.
    """
    if device.type != "cuda":
        return "single" if world.size == 1 else "ddp"
    nodes = max(1, world.size // world.launch.local_world_size)
    machine = replace(
        describe(config.tier.nvme_path), gpus=world.launch.local_world_size, nodes=nodes
    )
    work = WorkSpec(
        batch=config.batch_size, sequence=1, accumulation=config.grad_accum,
        recompute=config.activation_checkpointing, half=config.precision != "fp32",
        averaged=config.ema.decay is not None,
    )  # fmt: skip
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    spec = spec_of(model)
    plan = recommend(spec, machine, work, has_deepspeed=has_deepspeed, steps=config.steps)
    for note in plan.notes:
        logger.info("%s", note)
    if plan.recommended is None:
        table = render(PlanReport(model=spec, machine=machine, work=work, plan=plan))
        raise TrainingError(
            "E-RAM-PLAN",
            "no strategy fits this model on this machine",
            table,
            "a smaller model, lora (trains adapters only), more GPUs or nodes, or tier.nvme_path "
            "on a larger drive",
        )
    return plan.recommended


def build_strategy(
    name: str,
    build: Callable[[], nn.Module],
    config: TrainConfig,
    device: torch.device,
    world: World,
    param_groups: ParamGroups | None,
) -> Strategy:
    """Return a strategy with the model in its hands.

    Args:
        name: Not auto.
        build: Makes the model, adapters included.
        config: Of the run.
        device: Of this process.
        world: All processes.
        param_groups: From the model to its parameter groups.
    """
    if name == "single" or (name == "ddp" and world.size == 1):
        return SingleDevice(build(), config, device, world, param_groups)
    if name == "ddp":
        return DataParallel(build(), config, device, world, param_groups)
    if name in ("fsdp2", "fsdp2-cpu"):
        from polyzoo.training.strategies.fsdp2 import FullySharded

        return FullySharded(
            build(), config, device, world, param_groups, offload=name == "fsdp2-cpu"
        )
    from polyzoo.training.strategies.zero3 import ZeroThree

    return ZeroThree(build, name, config, device, world, param_groups)


def builder_of(
    model: nn.Module | Callable[[], nn.Module], *, again: bool
) -> Callable[[], nn.Module]:
    """Return a function that makes the model.

    Args:
        model: The model, or a function that builds it.
        again: Whether it is asked for more than once: a model given as such is then copied, before
            a strategy takes it apart.
    """
    if not isinstance(model, nn.Module):
        return model
    if not again:
        return lambda: model
    kept = copy.deepcopy(model)
    return lambda: copy.deepcopy(kept)
