"""The front door: a config, a model and a step function in; a trained model out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyzoo.core.config import dump
from polyzoo.core.device import resolve_device
from polyzoo.core.errors import ConfigError, Interrupted, PolyzooError
from polyzoo.core.log import get_logger
from polyzoo.core.seeding import restore_random_state, seed_everything
from polyzoo.training import lora
from polyzoo.training.activation import recomputing
from polyzoo.training.checkpoint.snapshot import Snapshots, fingerprint
from polyzoo.training.checkpoint.state import Counters
from polyzoo.training.checkpoint.store import CheckpointStore, explaining_full_disk
from polyzoo.training.config import TrainConfig
from polyzoo.training.data import DataStream
from polyzoo.training.ema import Ema
from polyzoo.training.errors import TrainingError
from polyzoo.training.evaluation import Evaluator
from polyzoo.training.events import RunLog
from polyzoo.training.gathering import Replica
from polyzoo.training.launch import Launch, find_launch
from polyzoo.training.loader import Collate
from polyzoo.training.loop import Loop
from polyzoo.training.memory import explaining_out_of_memory
from polyzoo.training.metrics import Window
from polyzoo.training.optim import ParamGroups
from polyzoo.training.plots import draw_plots
from polyzoo.training.precision import build_frozen, compute_dtype
from polyzoo.training.runfolder import (
    choose_checkpoint,
    locked,
    open_store,
    write_provenance,
    write_status,
)
from polyzoo.training.signals import StopRequest
from polyzoo.training.step import EvalFn, StepFn
from polyzoo.training.strategies.base import Strategy
from polyzoo.training.strategies.blocks import full_size
from polyzoo.training.strategies.choose import (
    build_strategy,
    builder_of,
    check_launch,
    choose_for,
    needs_group,
)
from polyzoo.training.tiling import tile_linears
from polyzoo.training.watchdog import Watchdog, ending_when_stuck
from polyzoo.training.world import World, joined

logger = get_logger(__name__)

Build = nn.Module | Callable[[], nn.Module]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """A finished run."""

    step: int
    """Optimizer steps taken in all."""
    metrics: dict[str, float]
    """Of the last evaluation; empty without one."""
    best: dict[str, Any] | None
    """step, metric and value of the weights in run_dir/best."""
    run_dir: Path
    """Where everything is."""
    interrupted: bool
    """Whether a signal stopped the run on its way, and it was resumed."""
    model: nn.Module
    """With the final weights; the averaged ones where ema is on."""


class Trainer:
    """Trains a model as a TrainConfig says; call `fit` again with the same config to resume.

    Example:
        >>> def step(model, batch, ctx):
        ...     return StepOutput(loss=(model(batch["x"]) - batch["y"]).square().mean())
        >>> config = TrainConfig(run_dir=Path("runs/line"), steps=100)
        >>> result = Trainer(config).fit(model=nn.Linear(1, 1), step_fn=step, train_data=points)
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.run_dir = Path(config.run_dir)
        self._replica: Replica | None = None

    def fit(
        self,
        *,
        model: Build,
        step_fn: StepFn,
        train_data: Any,
        collate: Collate | None = None,
        eval_fn: EvalFn | None = None,
        frozen: Mapping[str, Build] | None = None,
        param_groups: ParamGroups | None = None,
        checkpoint_blocks: tuple[type[nn.Module], ...] = (),
        everywhere: bool = False,
        return_model: bool = True,
    ) -> TrainResult:
        """Train to the last step, from the newest checkpoint if the folder holds one.

        With several processes it returns in process 0 alone, so that what follows (saving, a
        report) happens once; the others exit with status 0.

        Args:
            model: The model, or a function that builds it; the function is called after seeding.
            step_fn: `step(model, batch, ctx)` returns a StepOutput or the loss alone.
            train_data: Map-style dataset, or an iterable.
            collate: From a list of samples to a batch; torch's default where not given.
            eval_fn: `evaluate(model, ctx)` returns scalars by name.
            frozen: Modules the step uses but does not train, or functions that build them, by
                name; found in `ctx.frozen`.
            param_groups: From the model to its parameter groups.
            checkpoint_blocks: Classes whose modules recompute their activations when the config
                asks for activation_checkpointing.
            everywhere: Return in all processes; the model is whole in process 0 only.
            return_model: Put a model that was spread together at the end; else it stays in pieces.

        Raises:
            Interrupted: A signal came; the run is saved and the same call resumes it.
            TrainingError: What went wrong, why, and what to do.
            LockedError: Another process is training in this folder.
        """
        if self.config.steps is None and self.config.epochs is None:
            raise ConfigError("steps and epochs are both None; set one of them")
        self._check_evaluation(eval_fn)
        launch = find_launch()
        check_launch(self.config.strategy, launch)
        with ExitStack() as stack:
            device = _device_of(self.config.device, launch)
            world = stack.enter_context(
                joined(
                    launch, device,
                    alone=needs_group(self.config.strategy), minutes=self.config.tier.timeout,
                )
            )  # fmt: skip
            if world.is_main:
                stack.enter_context(
                    explaining_full_disk(open_store(self.config), "a file of the run")
                )
            world.main_only(lambda: stack.enter_context(locked(self.run_dir)) and None)
            world.check_same("the recipe", json.dumps(_comparable(self.config), sort_keys=True))
            watchdog = stack.enter_context(ending_when_stuck(self.config.tier.timeout))
            stop = stack.enter_context(StopRequest())
            loop = self._prepare(
                stack, stop, watchdog, world, device, model, step_fn, train_data, collate, eval_fn,
                frozen or {}, param_groups, checkpoint_blocks,
            )  # fmt: skip
            with self._recording(loop):
                loop.run()
            result = self._result(loop, whole=return_model)
        if not everywhere and not world.is_main:
            raise SystemExit(0)
        return result

    def _prepare(
        self,
        stack: ExitStack,
        stop: StopRequest,
        watchdog: Watchdog,
        world: World,
        device: torch.device,
        model: Build,
        step_fn: StepFn,
        train_data: Any,
        collate: Collate | None,
        eval_fn: EvalFn | None,
        frozen: Mapping[str, Build],
        param_groups: ParamGroups | None,
        checkpoint_blocks: tuple[type[nn.Module], ...],
    ) -> Loop:
        """Build every part, and bring it to where the run stopped."""
        config = self.config
        store = open_store(config)
        resume_from = world.main_only(lambda: _find_checkpoint(config, store))
        seed_everything(config.seed, deterministic=config.deterministic)
        identity: dict[str, str] = {}
        build = self._builder(model, device, identity)
        with explaining_out_of_memory("setup", config, device):
            name, build = self._choose(build, world, device)
            others = build_frozen(frozen, device, compute_dtype(config.precision, device))
            strategy = build_strategy(name, build, config, device, world, param_groups)
        stack.callback(strategy.close)
        if config.activation_checkpointing:
            stack.enter_context(
                recomputing(strategy.model, checkpoint_blocks, reentrant=name == "zero3-nvme")
            )
        data = DataStream(
            train_data, config.data,
            batch_size=config.batch_size, collate=collate, seed=config.seed, device=device,
            rank=world.rank, world=world.size,
        )  # fmt: skip
        stack.callback(data.close)
        averaged = config.ema.decay is not None
        ema = Ema(strategy.master_groups, config.ema) if averaged else None
        snapshots = Snapshots(store, config, strategy, ema=ema)
        identity |= {name: fingerprint(part, frozen_only=False) for name, part in others.items()}
        counters, window = Counters(), Window()
        strategy.model.train()
        if world.rank > 0:  # its dropout must not be process 0's
            seed_everything((config.seed + 0x9E3779B1 * world.rank) % 2**32)
        if resume_from is not None:
            state = snapshots.load(resume_from, identity)
            counters = state.counters
            window.load(state.window)
            data.move_to(state.data)
            if world.is_main:
                store.drop_after(counters.step)
            if state.random:
                restore_random_state(state.random)
            logger.info("resuming from %s", resume_from)
        total_steps = self._total_steps(data)
        log: RunLog | None = None
        if world.is_main:
            log = RunLog(self.run_dir, config.log, step=counters.step, total_steps=total_steps)
            write_provenance(config, self._facts(strategy, total_steps))
            stack.enter_context(log)
        self._replica = None if strategy.is_whole else Replica(strategy, build)
        evaluator = None
        if eval_fn:
            evaluator = Evaluator(
                config, strategy, eval_fn, ema=ema, frozen=others, replica=self._replica
            )
        return Loop(
            config, strategy=strategy, step_fn=step_fn, data=data, total_steps=total_steps,
            counters=counters, window=window, ema=ema, evaluator=evaluator,
            snapshots=snapshots, world=world, frozen=others, identity=identity, log=log, stop=stop,
            watchdog=watchdog,
        )  # fmt: skip

    def _builder(
        self, model: Build, device: torch.device, identity: dict[str, str]
    ) -> Callable[[], nn.Module]:
        """Return what makes the model, adapters included; the first one gives its identity."""
        plain = builder_of(model, again=needs_group(self.config.strategy))

        def build() -> nn.Module:
            built = plain()
            tier = self.config.tier
            if tier.tile_linears > 1:
                tile_linears(built, tiles=tier.tile_linears, above=tier.tile_above)
            if self.config.lora is not None:
                dtype = compute_dtype(self.config.precision, device)
                built = lora.adapt(built, self.config.lora, dtype)
            name = "the model's own frozen parameters"
            if name not in identity:
                identity[name] = fingerprint(built, frozen_only=True)
            return built

        return build

    def _choose(
        self, build: Callable[[], nn.Module], world: World, device: torch.device
    ) -> tuple[str, Callable[[], nn.Module]]:
        """Return the strategy's name, and what makes the model."""
        name = self.config.strategy
        if name != "auto":
            return name, build
        built = build()
        chosen = choose_for(built, self.config, world, device)
        if needs_group(chosen) and not world.grouped:
            raise TrainingError(
                "E-GPU-PLAN",
                "the model does not fit one device as it is",
                f"the fastest strategy that fits is {chosen}",
                f"run the same command with strategy={chosen} (--strategy {chosen})",
            )
        if not needs_group(chosen):
            return chosen, lambda: built
        kept = copy.deepcopy(built)  # for whole weights later, once the first is in pieces
        first: list[nn.Module] = [built]
        return chosen, lambda: first.pop() if first else copy.deepcopy(kept)

    def _total_steps(self, data: DataStream) -> int:
        if self.config.steps is not None:
            return self.config.steps
        return (self.config.epochs or 0) * data.steps_per_epoch(self.config.grad_accum)

    def _check_evaluation(self, eval_fn: EvalFn | None) -> None:
        if eval_fn is None and (self.config.best_metric or self.config.eval_every):
            raise ConfigError(
                f"best_metric={self.config.best_metric!r} and eval_every={self.config.eval_every} "
                "need an eval_fn; give fit one, or set both to None"
            )

    @contextmanager
    def _recording(self, loop: Loop) -> Iterator[None]:
        """Keep status.json true and draw the plots, however the run ends."""
        self._write_status("running", loop)
        if not loop.world.is_main:
            yield
            return
        try:
            yield
        except Interrupted as error:
            self._leave_record("interrupted", loop, str(error))
            raise
        except Exception as error:
            self._leave_record("failed", loop, str(error))
            raise
        self._write_status("finished", loop)
        if self.config.log.plots:
            draw_plots(self.run_dir)

    def _leave_record(self, state: str, loop: Loop, note: str) -> None:
        """Say how the run ended early; a full disk must not hide why."""
        try:
            self._write_status(state, loop, note)
            if self.config.log.plots:
                draw_plots(self.run_dir)
        except PolyzooError as error:
            logger.warning("no record of the end could be written: %s", error)

    def _write_status(self, state: str, loop: Loop, note: str = "") -> None:
        if not loop.world.is_main:
            return
        write_status(
            self.run_dir, state,
            step=loop.counters.step, total_steps=loop.total_steps, note=note,
        )  # fmt: skip

    def _facts(self, strategy: Strategy, total_steps: int) -> dict[str, Any]:
        parameters = list(strategy.model.parameters())
        return {
            "strategy": strategy.name,
            "world_size": strategy.world.size,
            "launcher": strategy.world.launch.launcher,
            "device": str(strategy.device),
            "compute_dtype": str(strategy.dtype).removeprefix("torch."),
            "total_steps": total_steps,
            "parameters": sum(map(full_size, parameters)),
            "trainable_parameters": sum(full_size(p) for p in parameters if p.requires_grad),
        }

    def _result(self, loop: Loop, *, whole: bool) -> TrainResult:
        counters, best = loop.counters, loop.counters.best
        model = loop.strategy.model
        if loop.strategy.is_whole:
            if loop.ema:
                loop.ema.swap()
        elif whole and self._replica is not None:
            model = self._replica.filled(loop.ema) or model
        return TrainResult(
            step=counters.step,
            metrics=counters.evaluation,
            best={"step": best.step, "metric": self.config.best_metric, "value": best.value}
            if best else None,
            run_dir=self.run_dir,
            interrupted=counters.interruptions > 0,
            model=model,
        )  # fmt: skip


def _device_of(name: str, launch: Launch) -> torch.device:
    """Return this process's device: with several on a node, each its own GPU."""
    device = resolve_device(name)
    if device.type != "cuda" or launch.world_size == 1:
        return device
    count = torch.cuda.device_count()
    # Some launchers show each process a single GPU.
    if count > 1 and launch.local_world_size > count:
        raise TrainingError(
            "E-WORLD",
            f"{launch.local_world_size} processes share {count} GPUs",
            "each process needs its own",
            f"start {count} processes on this node",
        )
    own = torch.device("cuda", launch.local_rank if count > 1 else 0)
    torch.cuda.set_device(own)
    return own


def _find_checkpoint(config: TrainConfig, store: CheckpointStore) -> Path | None:
    store.sweep()
    return choose_checkpoint(config, store)


def _comparable(config: TrainConfig) -> dict[str, Any]:
    values = dump(config)
    values.pop("device", None)  # a launcher may give each process its own
    return values
