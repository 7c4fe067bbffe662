"""What a model shows in `make demo`, and the page that shows it.

A model package names a function in the entry-point group "polyzoo.demos". It is called with an
empty folder for its pictures and returns a `DemoSection`.
"""

from __future__ import annotations

import html
import importlib.metadata
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from polyzoo.core.io import atomic_write

ENTRY_POINTS = "polyzoo.demos"


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSection:
    """One model's part of the page."""

    title: str
    """Name of the system and what it did, in a line."""
    summary: str
    """What was run and how long its steps took, in a sentence or two of plain text."""
    body: str
    """HTML fragment; links to pictures are relative to the folder of the page."""
    checks: Sequence[tuple[str, bool]]
    """What was expected, and whether it came."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoRun:
    """A section and the seconds it took, imports included."""

    name: str
    section: DemoSection
    seconds: float


def run_demos(out: Path, *, only: Sequence[str] = ()) -> list[DemoRun]:
    """Run the demo of every installed model, in the order of their names, into `out`/NAME."""
    runs = []
    for point in sorted(importlib.metadata.entry_points(group=ENTRY_POINTS), key=lambda p: p.name):
        if only and point.name not in only:
            continue
        start = time.perf_counter()
        run: Callable[[Path], DemoSection] = point.load()
        folder = out / point.name
        folder.mkdir(parents=True, exist_ok=True)
        section = run(folder)
        runs.append(DemoRun(name=point.name, section=section, seconds=time.perf_counter() - start))
    return runs


def write_page(runs: Sequence[DemoRun], path: Path) -> None:
    """Write the page of all sections to `path`: one file, no script, readable offline."""
    total = sum(run.seconds for run in runs)
    machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    body = "\n".join(_section(run) for run in runs)
    menu = " ".join(
        f'<a href="#{run.name}">{html.escape(run.section.title.partition(":")[0])}</a>'
        for run in runs
    )
    with atomic_write(path, "w", encoding="utf-8") as page:
        page.write(
            _PAGE.format(menu=menu, body=body, total=total, machine=html.escape(machine), css=_CSS)
        )


def _section(run: DemoRun) -> str:
    section = run.section
    checks = "".join(
        f'<li class="{"good" if passed else "bad"}">{html.escape(text)}</li>'
        for text, passed in section.checks
    )
    return (
        f'<section id="{run.name}"><h2>{html.escape(section.title)}</h2>'
        f'<p class="summary">{html.escape(section.summary)} '
        f"<em>{run.seconds:.0f}&nbsp;s in all.</em></p>"
        f'{section.body}<ul class="checks">{checks}</ul></section>'
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>polyzoo demo</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{css}</style></head>
<body><header><h1>polyzoo</h1>
<p>Every finished model of the zoo, run on this machine from the weights in the repository.
{total:.0f}&nbsp;seconds, no network. {machine}.</p><nav>{menu}</nav></header>
<main>{body}</main></body></html>
"""

_CSS = """
:root { --ink: #1c2330; --soft: #5d6778; --line: #e1e5ec; --paper: #fff; --back: #f5f6f9;
  --accent: #2f6f8f; --mark: #fff3c4; --edge: #e0a800; --good: #2e7d4f; --bad: #b3372f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ef; --soft: #9aa5b5; --line: #323a47;
  --paper: #1b2029; --back: #13171e; --accent: #7fc0df; --mark: #3b3314; --edge: #d0a020;
  --good: #7fcf9f; --bad: #ef8a80; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif }
header, main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1.25rem }
header { padding-bottom: 0 } h1 { margin: 0; letter-spacing: -.02em } h2 { margin: 0 0 .4rem }
header p, .summary { color: var(--soft); margin: .3rem 0 1rem } a { color: var(--accent) }
nav a { margin-right: 1rem }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 12px;
  padding: 1.5rem; margin-bottom: 1.5rem }
.checks { list-style: none; padding: 0; margin: 1rem 0 0; font-size: .92rem }
.checks li::before { display: inline-block; width: 1.4em; font-weight: 700 }
.good::before { content: "\\2713"; color: var(--good) }
.bad::before { content: "\\2717"; color: var(--bad) }
pre { overflow-x: auto; font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  background: var(--back); border-radius: 8px; padding: .75rem 0; margin: .5rem 0 }
pre .row { display: block; padding: 0 .9rem; white-space: pre; min-width: max-content }
pre .row.best { background: var(--mark); box-shadow: inset 3px 0 var(--edge) }
pre .number { display: inline-block; width: 3.2em; color: var(--soft); user-select: none }
summary { cursor: pointer } h3 { margin: 1.6rem 0 0; color: var(--soft) }
.hit { border-top: 1px solid var(--line); padding: .7rem 0 } .hit:first-of-type { border: 0 }
.where { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .88rem }
.score { color: var(--soft); font-size: .85rem; margin-left: .6rem }
.query { font-size: 1.15rem; font-weight: 600; margin: 1.4rem 0 .3rem }
"""
