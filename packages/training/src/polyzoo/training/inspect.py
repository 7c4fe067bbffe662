"""How a run stands, from its folder alone; writes nothing, and needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyzoo.core.errors import DataError
from polyzoo.training.checkpoint.store import CheckpointStore, find_fault, read_manifest
from polyzoo.training.events import read_events
from polyzoo.training.runfolder import CHECKPOINTS, CONFIG, STATUS, holder_lives

if TYPE_CHECKING:
    from polyzoo.training.cli import InspectConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointReport:
    """One checkpoint."""

    step: int
    bytes: int
    strategy: str | None
    world_size: int | None
    fault: str | None
    """What is damaged; None if whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """What `polyzoo training inspect` prints."""

    run_dir: str
    state: str
    """running, finished, interrupted, failed, killed, or new."""
    step: int
    total_steps: int | None
    note: str
    checkpoints: list[CheckpointReport]
    best: dict[str, Any] | None
    """Step and value of the weights in best/, as of the newest whole checkpoint."""
    train: dict[str, Any] | None
    """Last training line of metrics.jsonl."""
    evaluation: dict[str, Any] | None
    """Last evaluation line of metrics.jsonl."""

    @property
    def exit_code(self) -> int:
        """1 where a checkpoint is damaged, else 0."""
        return int(any(checkpoint.fault for checkpoint in self.checkpoints))


def inspect(config: InspectConfig) -> RunReport:
    """Look at a run.

    Raises:
        DataError: The folder holds no run.
    """
    run_dir = Path(config.run_dir)
    if not any((run_dir / name).exists() for name in (CONFIG, STATUS, CHECKPOINTS)):
        raise DataError(f"{run_dir} holds no training run (no {CONFIG}, {STATUS}, {CHECKPOINTS}/)")
    store = CheckpointStore(run_dir / CHECKPOINTS)
    checkpoints = [_checkpoint(store.path(step), step, config.verify) for step in store.steps()]
    whole = [checkpoint.step for checkpoint in checkpoints if checkpoint.fault is None]
    last = {event["event"]: event for event in read_events(run_dir)}
    status = _status(run_dir)
    return RunReport(
        run_dir=str(run_dir),
        state=status["state"],
        step=max(status["step"], last.get("train", {}).get("step", 0)),
        total_steps=status["total_steps"],
        note=status["note"],
        checkpoints=checkpoints,
        best=_best(store.path(whole[-1])) if whole else None,
        train=last.get("train"),
        evaluation=last.get("eval"),
    )


def _checkpoint(path: Path, step: int, verify: bool) -> CheckpointReport:
    fault = find_fault(path, hashes=verify)
    manifest = read_manifest(path) if fault is None else {}
    return CheckpointReport(
        step=step,
        bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        strategy=manifest.get("strategy"),
        world_size=manifest.get("world_size"),
        fault=fault,
    )


def _status(run_dir: Path) -> dict[str, Any]:
    try:
        status = json.loads((run_dir / STATUS).read_bytes())
    except FileNotFoundError:
        return {"state": "new", "step": 0, "total_steps": None, "note": ""}
    if status["state"] == "running" and not holder_lives(run_dir):
        status = {
            **status,
            "state": "killed",
            "note": "its process is gone; the run can be resumed",
        }
    return status


def _best(path: Path) -> dict[str, Any] | None:
    state = json.loads((path / "rank00000.json").read_bytes())["state"]
    return state["counters"]["best"]


def render(report: RunReport) -> str:
    """Return the report as text for people."""
    of = f" of {report.total_steps}" if report.total_steps else ""
    lines = [f"{report.run_dir}: {report.state}, step {report.step}{of}"]
    if report.note:
        lines.append(f"  {report.note}")
    for checkpoint in report.checkpoints:
        verdict = f"DAMAGED: {checkpoint.fault}" if checkpoint.fault else "whole"
        lines.append(f"  checkpoint {checkpoint.step}: {checkpoint.bytes:,} bytes, {verdict}")
    if not report.checkpoints:
        lines.append("  no checkpoint")
    if report.train:
        known = ("loss", "lr", "grad_norm", "samples_per_second")
        numbers = {name: report.train[name] for name in known} | report.train["metrics"]
        lines.append(f"  step {report.train['step']}: {_numbers(numbers)}")
    if report.evaluation:
        lines.append(
            f"  evaluated at {report.evaluation['step']}: {_numbers(report.evaluation['metrics'])}"
        )
    if report.best:
        lines.append(f"  best: {report.best['value']:.6g} at step {report.best['step']}")
    return "\n".join(lines)


def _numbers(values: dict[str, float | None]) -> str:
    return ", ".join(
        f"{name} {'nan' if value is None else format(value, '.5g')}"
        for name, value in values.items()
    )
