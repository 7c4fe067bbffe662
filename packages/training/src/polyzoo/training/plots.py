"""Pictures of a run, drawn from its metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from polyzoo.core.io import atomic_path
from polyzoo.training.events import read_events

PLOTS = "plots"
_COLUMNS = 2
_INK = "#1f4e79"
_PALE = "#a9c4de"
_EXACT = (  # nothing to smooth
    "learning rate", "memory (bytes)", "host memory (bytes)", "drive (bytes)",
)  # fmt: skip
_FEW = 40  # points that can still be told apart

Series = tuple[list[int], list[float]]


def draw_plots(run_dir: Path) -> list[Path]:
    """Draw training.png, and metrics.png and evaluation.png where the run has such numbers."""
    events = list(read_events(run_dir))
    pages = {
        "training": _training(events),
        "metrics": _named(events, "train"),
        "evaluation": _named(events, "eval"),
    }
    drawn: list[Path] = []
    for name, panels in pages.items():
        if panels:
            path = run_dir / PLOTS / f"{name}.png"
            _draw_page(path, f"{run_dir.name}: {name}", panels)
            drawn.append(path)
    return drawn


def _training(events: list[dict[str, Any]]) -> dict[str, Series]:
    wanted = {
        "loss": "loss",
        "learning rate": "lr",
        "gradient norm": "grad_norm",
        "tokens per second": "tokens_per_second",
        "samples per second": "samples_per_second",
        "forward pass (s)": "forward_seconds",
        "backward pass (s)": "backward_seconds",
        "optimizer step (s)": "optimizer_seconds",
        "waiting for data (s)": "data_seconds",
        "memory (bytes)": "memory_bytes",
        "host memory (bytes)": "host_bytes",
        "drive (bytes)": "drive_bytes",
    }
    panels: dict[str, Series] = {}
    for title, key in wanted.items():
        points = [(e["step"], e[key]) for e in events if e["event"] == "train" and key in e]
        _add(panels, title, points)
    return panels


def _named(events: list[dict[str, Any]], kind: str) -> dict[str, Series]:
    chosen = [event for event in events if event["event"] == kind]
    names = sorted({name for event in chosen for name in event["metrics"]})
    panels: dict[str, Series] = {}
    for name in names:
        points = [(e["step"], e["metrics"][name]) for e in chosen if name in e["metrics"]]
        _add(panels, name, points)
    return panels


def _add(panels: dict[str, Series], title: str, points: list[tuple[int, float | None]]) -> None:
    finite = [(step, value) for step, value in points if value is not None]
    if finite:
        panels[title] = ([step for step, _ in finite], [value for _, value in finite])


def running_mean(values: list[float], reach: int) -> list[float]:
    """Return the mean of each value and its neighbours, up to `reach` on either side."""
    sums = [0.0, *accumulate(values)]
    means: list[float] = []
    for index in range(len(values)):
        start, end = max(0, index - reach), min(len(values), index + reach + 1)
        means.append((sums[end] - sums[start]) / (end - start))
    return means


def _draw_page(path: Path, title: str, panels: Mapping[str, Series]) -> None:
    # The object interface: pyplot would keep global state and may open a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(5.5 * _COLUMNS, 2.8 * rows + 0.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for index, (name, (steps, values)) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, _COLUMNS, index + 1)
        if len(steps) <= _FEW:
            axes.plot(steps, values, color=_INK, linewidth=1.2, marker="o", markersize=3)
        elif name in _EXACT:
            axes.plot(steps, values, color=_INK, linewidth=1.4)
        else:
            axes.plot(steps, values, color=_PALE, linewidth=0.7)
            axes.plot(steps, running_mean(values, len(values) // _FEW), color=_INK, linewidth=1.4)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
