"""The front door: a config, a model and a step function in; a trained model out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyzoo.core.device import resolve_device
from polyzoo.core.errors import ConfigError, Interrupted, PolyzooError
from polyzoo.core.log import get_logger
from polyzoo.core.seeding import restore_random_state, seed_everything
from polyzoo.training import lora
from polyzoo.training.activation import recomputing
from polyzoo.training.checkpoint.snapshot import Snapshots, fingerprint
from polyzoo.training.checkpoint.state import Counters
from polyzoo.training.checkpoint.store import explaining_full_disk
from polyzoo.training.config import TrainConfig
from polyzoo.training.data import DataStream
from polyzoo.training.ema import Ema
from polyzoo.training.evaluation import Evaluator
from polyzoo.training.events import RunLog
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
from polyzoo.training.strategies.single import SingleDevice

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
    ) -> TrainResult:
        """Train to the last step, from the newest checkpoint if the folder holds one.

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

        Raises:
            Interrupted: A signal came; the run is saved and the same call resumes it.
            TrainingError: What went wrong, why, and what to do.
            LockedError: Another process is training in this folder.
        """
        if self.config.steps is None and self.config.epochs is None:
            raise ConfigError("steps and epochs are both None; set one of them")
        self._check_evaluation(eval_fn)
        with ExitStack() as stack:
            stack.enter_context(explaining_full_disk(open_store(self.config), "a file of the run"))
            stack.enter_context(locked(self.run_dir))
            stop = stack.enter_context(StopRequest())
            loop = self._prepare(
                stack, stop, model, step_fn, train_data, collate, eval_fn,
                frozen or {}, param_groups, checkpoint_blocks,
            )  # fmt: skip
            with self._recording(loop):
                loop.run()
            if loop.ema:
                loop.ema.swap()
            return self._result(loop)

    def _prepare(
        self,
        stack: ExitStack,
        stop: StopRequest,
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
        device = resolve_device(config.device)
        store = open_store(config)
        store.sweep()
        resume_from = choose_checkpoint(config, store)
        seed_everything(config.seed, deterministic=config.deterministic)
        with explaining_out_of_memory("setup", config, device):
            built = self._build(model, device)
            others = build_frozen(frozen, device, compute_dtype(config.precision, device))
            strategy = SingleDevice(built, config, device, param_groups)
        if config.activation_checkpointing:
            stack.enter_context(recomputing(built, checkpoint_blocks))
        data = DataStream(
            train_data, config.data,
            batch_size=config.batch_size, collate=collate, seed=config.seed, device=device,
        )  # fmt: skip
        stack.callback(data.close)
        ema = Ema(strategy.masters(), config.ema) if config.ema.decay is not None else None
        snapshots = Snapshots(store, config, strategy, ema=ema)
        identity = {name: fingerprint(part, frozen_only=False) for name, part in others.items()}
        identity["the model's own frozen parameters"] = fingerprint(built, frozen_only=True)
        counters, window = Counters(), Window()
        strategy.module.train()
        if resume_from is not None:
            state = snapshots.load(resume_from, identity)
            counters = state.counters
            window.load(state.window)
            data.move_to(state.data)
            store.drop_after(counters.step)
            restore_random_state(state.random)
            logger.info("resuming from %s", resume_from)
        total_steps = self._total_steps(data)
        log = RunLog(self.run_dir, config.log, step=counters.step, total_steps=total_steps)
        write_provenance(config, self._facts(built, strategy, total_steps))
        return Loop(
            config, strategy=strategy, step_fn=step_fn, data=data, total_steps=total_steps,
            counters=counters, window=window, ema=ema,
            evaluator=Evaluator(config, strategy, eval_fn, ema=ema, frozen=others)
            if eval_fn else None,
            snapshots=snapshots, frozen=others, identity=identity,
            log=stack.enter_context(log), stop=stop,
        )  # fmt: skip

    def _build(self, model: Build, device: torch.device) -> nn.Module:
        built = model if isinstance(model, nn.Module) else model()
        if self.config.lora is not None:
            dtype = compute_dtype(self.config.precision, device)
            return lora.adapt(built, self.config.lora, dtype)
        return built

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
        write_status(
            self.run_dir, state,
            step=loop.counters.step, total_steps=loop.total_steps, note=note,
        )  # fmt: skip

    def _facts(self, model: nn.Module, strategy: SingleDevice, total_steps: int) -> dict[str, Any]:
        parameters = list(model.parameters())
        return {
            "device": str(strategy.device),
            "compute_dtype": str(strategy.dtype).removeprefix("torch."),
            "total_steps": total_steps,
            "parameters": sum(p.numel() for p in parameters),
            "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        }

    def _result(self, loop: Loop) -> TrainResult:
        counters, best = loop.counters, loop.counters.best
        return TrainResult(
            step=counters.step,
            metrics=counters.evaluation,
            best={"step": best.step, "metric": self.config.best_metric, "value": best.value}
            if best else None,
            run_dir=self.run_dir,
            interrupted=counters.interruptions > 0,
            model=loop.strategy.module,
        )  # fmt: skip
