"""Index, update and search times over an installed package, one JSON line each.

    python benchmarks/sea_search.py                      # installed transformers, embedded model
    python benchmarks/sea_search.py --repo FOLDER --model identifiers --jobs 2

Queries are first lines of the package's own documentation, drawn with a seed. Files are edited in a
copy of the package, never in the package. Copy and index are temporary unless --work keeps them; a
second run with the same folder continues from there. "cold" lines are whole processes of the
command line, from its start to its end.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from polyzoo.sea.search.config import IndexConfig, SearchRequest
from polyzoo.sea.search.embedder import load_embedder
from polyzoo.sea.search.searcher import Searcher
from polyzoo.sea.search.update import build_index


def main() -> None:
    arguments = _arguments()
    start = time.perf_counter()
    embedder = _embedder(arguments.model)
    _print("load", seconds=time.perf_counter() - start, model=embedder.model_id)
    work = arguments.work or Path(tempfile.mkdtemp(prefix="sea-search-"))
    try:
        repo, folder = work / arguments.repo.name, work / "index"
        if not repo.exists():
            shutil.copytree(
                arguments.repo, repo, ignore=shutil.ignore_patterns("__pycache__", "*.so")
            )
        config = IndexConfig(
            repo=repo,
            out=folder,
            model=arguments.model,
            keep_blocks=arguments.keep_blocks,
            jobs=arguments.jobs,
        )
        report = build_index(config, embedder=_embedder(arguments.model, bulk=True))
        _print(
            "index",
            seconds=report.seconds,
            units=report.units,
            encoded=report.encoded,
            copied=report.copied,
            units_per_second=report.encoded / report.seconds,
            disk_mb=report.disk_bytes / 1e6,
            peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        )
        _print("index again", seconds=build_index(config, embedder=embedder).seconds)
        for number in range(arguments.updates):
            _edit(repo, number)
            report = build_index(config, embedder=embedder)
            _print(
                "one edited file",
                seconds=report.seconds,
                changed=report.changed,
                encoded=report.encoded,
            )
        if arguments.model != "identifiers":
            _cold(repo, folder, arguments.updates)
        _latency(folder, embedder, arguments)
    finally:
        if arguments.work is None:
            shutil.rmtree(work)


def _cold(repo: Path, folder: Path, count: int) -> None:
    """Time whole processes: nothing to do, one edited file, one question."""
    index = ["index", str(repo), "--out", str(folder)]
    _process("cold, no change", index)
    for number in range(count):
        _edit(repo, count + number)
        _process("cold, one edited file", index)
    for _ in range(count):
        _process("cold, one search", ["search", "load a checkpoint", "--index", str(folder)])


def _process(what: str, arguments: list[str]) -> None:
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "polyzoo.core", "sea", *arguments], check=True, capture_output=True
    )
    _print(what, seconds=time.perf_counter() - start)


def _latency(folder: Path, embedder, arguments: argparse.Namespace) -> None:
    with Searcher(folder, embedder=embedder) as searcher:
        queries = _queries(searcher, arguments.queries, arguments.seed)
        for mode, blocks in (
            ("hybrid", False),
            ("hybrid", True),
            ("vector", False),
            ("lexical", False),
        ):
            for query in queries[:5]:  # warm
                searcher.search(SearchRequest(query=query, mode=mode, blocks=blocks))
            parts: dict[str, list[float]] = {}
            for query in queries:
                result = searcher.search(SearchRequest(query=query, mode=mode, blocks=blocks))
                for name, took in result.took_ms.items():
                    parts.setdefault(name, []).append(took)
            total = sorted(parts["total"])
            _print(
                "search",
                mode=mode,
                best_blocks=blocks,
                queries=len(queries),
                p50_ms=statistics.median(total),
                p95_ms=total[int(0.95 * (len(total) - 1))],
                max_ms=total[-1],
                medians={name: statistics.median(took) for name, took in parts.items()},
            )


def _queries(searcher: Searcher, count: int, seed: int) -> list[str]:
    rows = searcher.index.catalog.rows(
        "SELECT docstring FROM units WHERE live = 1 AND length(docstring) > 30 ORDER BY id"
    )
    lines = sorted({row[0].strip().split("\n")[0].strip() for row in rows})
    good = [line for line in lines if len(line.split()) >= 4]
    return random.Random(seed).sample(good, min(count, len(good)))


def _edit(repo: Path, number: int) -> None:
    """Add a function to some file."""
    files = sorted(repo.rglob("*.py"))
    path = files[(number * 997) % len(files)]
    addition = f"\n\ndef added_{time.time_ns()}(value):\n    return value + {number}\n"
    path.write_text(path.read_text(encoding="utf-8") + addition, encoding="utf-8")


def _embedder(model: str, *, bulk: bool = False):
    if model != "identifiers":
        return load_embedder(model, bulk=bulk)
    # The encoder of the tests: no weights, and next to no time, so what is measured is the rest.
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from support.identifier_encoder import IdentifierEncoder

    return IdentifierEncoder(dim=384)


def _print(what: str, **values: object) -> None:
    rounded = {key: round(v, 3) if isinstance(v, float) else v for key, v in values.items()}
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    load = round(os.getloadavg()[0], 1)  # above the cores, others were at work too
    print(json.dumps({"what": what, **rounded, "machine": machine, "load": load}), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--repo", type=Path, help="folder to index; installed transformers if not given"
    )
    parser.add_argument("--quick", action="store_true", help="this repository, without a model")
    parser.add_argument("--work", type=Path, help="keep the package's copy and its index here")
    parser.add_argument("--model", default="embedded", help="SEA model, or `identifiers`")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--updates", type=int, default=3, help="files to edit, one at a time")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--keep-blocks", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repo, arguments.model = Path(__file__).parents[1] / "packages", "identifiers"
        arguments.queries, arguments.updates = 20, 1
    if arguments.repo is None:
        spec = importlib.util.find_spec("transformers")
        if spec is None or spec.origin is None:
            parser.error("transformers is not installed; give --repo FOLDER")
        arguments.repo = Path(spec.origin).parent
    return arguments


if __name__ == "__main__":
    main()
