"""The `plan` command: from flags to a table."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from polyzoo.core.errors import ConfigError
from polyzoo.training.plan import (
    GIB,
    MachineSpec,
    ModelSpec,
    Plan,
    WorkSpec,
    recommend,
    transformer,
)

if TYPE_CHECKING:
    from polyzoo.training.cli import PlanConfig

PAPER_MODELS = {
    "0.1T": (80, 10_240, 128), "0.5T": (100, 20_480, 160), "1T": (128, 25_600, 256),
    "10T": (195, 65_536, 512), "100T": (315, 163_840, 1024),
}  # fmt: skip
"""Layers, width and heads of the models in the ZeRO-Infinity paper (table 1)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanReport:
    """What `polyzoo training plan` prints."""

    model: ModelSpec
    machine: MachineSpec
    work: WorkSpec
    plan: Plan

    @property
    def exit_code(self) -> int:
        """1 where nothing fits, else 0."""
        return int(self.plan.recommended is None)


def plan(config: PlanConfig) -> PlanReport:
    """Estimate every strategy.

    Raises:
        ConfigError: The model cannot be found or sized.
    """
    machine = _machine(config)
    work = WorkSpec(
        batch=config.batch_size, sequence=config.sequence, accumulation=config.grad_accum,
        recompute=config.activation_checkpointing, half=config.precision != "fp32",
        averaged=config.ema,
    )  # fmt: skip
    model = _model(config)
    made = recommend(
        model, machine, work,
        has_deepspeed=not config.without_deepspeed, steps=config.steps,
    )  # fmt: skip
    return PlanReport(model=model, machine=machine, work=work, plan=made)


def _machine(config: PlanConfig) -> MachineSpec:
    machine = MachineSpec()
    if config.this_machine:
        from polyzoo.training.probe import describe

        machine = describe(config.nvme_path)
    given = {
        "gpus": config.gpus, "nodes": config.nodes,
        "gpu_bytes": parse_size(config.gpu_mem), "host_bytes": parse_size(config.ram),
        "drive_bytes": parse_size(config.nvme),
    }  # fmt: skip
    return replace(machine, **{key: value for key, value in given.items() if value is not None})


def parse_size(text: str | None) -> float | None:
    """Return bytes from a text such as 80GiB, 1.5TB or 0.

    Raises:
        ConfigError: It is not a size.
    """
    if text is None:
        return None
    units = {"": 1, "B": 1}
    for power, letter in enumerate("KMGT", start=1):
        units |= {letter: 1024**power, f"{letter}iB": 1024**power, f"{letter}B": 1000**power}
    number = text.rstrip("BKMGTi")
    try:
        return float(number) * units[text[len(number) :]]
    except (KeyError, ValueError):
        raise ConfigError(f"{text!r} is not a size: write 80GiB, 1.5TB or 512MiB") from None


def _model(config: PlanConfig) -> ModelSpec:
    if config.model is not None:
        return _named(config)
    if config.layers is None or config.width is None:
        raise ConfigError(
            "say which model: --model NAME, or --layers and --width of a transformer "
            f"(names: {', '.join(PAPER_MODELS)}, or package.module:function)"
        )
    return transformer(
        config.layers, config.width, heads=config.heads, vocabulary=config.vocabulary
    )


def _named(config: PlanConfig) -> ModelSpec:
    name = config.model
    assert name is not None  # noqa: S101 - asked for by the caller
    if name in PAPER_MODELS:
        layers, width, heads = PAPER_MODELS[name]
        return transformer(layers, width, heads=heads, vocabulary=config.vocabulary)
    module, _, function = name.partition(":")
    if not function:
        raise ConfigError(
            f"model={name!r}: use one of {', '.join(PAPER_MODELS)}, or package.module:function "
            "that returns a torch module"
        )
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model={name!r} cannot be imported: {error}") from error
    from polyzoo.training.spec import spec_on_meta

    return spec_on_meta(build, width=config.width, vocabulary=config.vocabulary)


def render(report: PlanReport) -> str:
    """Return the plan as a table for people."""
    model, machine = report.model, report.machine
    where = f"{machine.nodes} x " if machine.nodes > 1 else ""
    lines = [
        f"{model.trainable / 1e9:,.3f} B trained"
        + (f", {model.frozen / 1e9:,.3f} B frozen" if model.frozen else "")
        + f"; {where}{machine.gpus} GPU x {machine.gpu_bytes / GIB:,.0f} GiB, "
        f"{machine.host_bytes / GIB:,.0f} GiB RAM, {machine.drive_bytes / GIB:,.0f} GiB drive",
        "",
        f"{'strategy':<15} {'GPU/rank':>12} {'RAM/node':>12} {'drive/node':>12} "
        f"{'step':>9}  {'bound by':<10} {'written':>9}  fits",
    ]
    for e in report.plan.estimates:
        verdict = e.reason or "yes"
        if e.reason is None and e.shortfalls:
            missing = ", ".join(f"{t} +{_gib(b)}" for t, b in e.shortfalls.items())
            verdict = f"no ({missing})"
        written = f"{e.written / 1e9:,.0f} GB" if e.written else "-"
        drive = _gib(e.drive) if e.drive else "-"
        lines.append(
            f"{e.strategy:<15} {_gib(e.gpu):>12} {_gib(e.host):>12} {drive:>12} "
            f"{e.step_seconds:>7.2f} s  {e.bound:<10} {written:>9}  {verdict}"
        )
    chosen = report.plan.recommended or "none"
    return "\n".join([*lines, "", f"recommended: {chosen}", *report.plan.notes])


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size < 1000 * GIB else f"{size / GIB / 1024:,.1f} TiB"
