"""Index, update and search times over an installed package, one JSON line each.

    python benchmarks/sea_search.py --repo .venv/lib/python3.11/site-packages/transformers

Queries are first lines of the package's own documentation, drawn with a seed. Without --index the
index is made in a temporary folder. --updates edits a copy of the package, never the package.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from polyzoo.sea.embedder import load_embedder
from polyzoo.sea.search import Searcher
from polyzoo.sea.search_config import IndexConfig, SearchRequest
from polyzoo.sea.update import build_index


def main() -> None:
    arguments = _arguments()
    start = time.perf_counter()
    embedder = _embedder(arguments.model)
    _print("load", seconds=time.perf_counter() - start, model=embedder.model_id)
    work = Path(tempfile.mkdtemp(prefix="sea-search-"))
    try:
        repo = arguments.repo.resolve()
        if arguments.updates:
            repo = work / repo.name
            shutil.copytree(arguments.repo, repo, ignore=shutil.ignore_patterns("__pycache__"))
        folder = arguments.index or work / "index"
        config = IndexConfig(
            repo=repo, out=folder, model=arguments.model, keep_blocks=arguments.keep_blocks
        )
        report = build_index(config, embedder=embedder)
        _print(
            "index",
            seconds=report.seconds,
            units=report.units,
            encoded=report.encoded,
            copied=report.copied,
            disk_mb=report.disk_bytes / 1e6,
            peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        )
        _print("index again", seconds=build_index(config, embedder=embedder).seconds)
        for number in range(arguments.updates):
            _update(repo, config, embedder, number)
        _latency(folder, embedder, arguments)
    finally:
        shutil.rmtree(work)


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


def _update(repo: Path, config: IndexConfig, embedder, number: int) -> None:
    files = sorted(repo.rglob("*.py"))
    path = files[(number * 997) % len(files)]
    addition = f"\n\ndef added_by_the_benchmark_{number}(value):\n    return value + {number}\n"
    path.write_text(path.read_text(encoding="utf-8") + addition, encoding="utf-8")
    report = build_index(config, embedder=embedder)
    _print(
        "one edited file",
        seconds=report.seconds,
        changed=report.changed,
        encoded=report.encoded,
    )


def _embedder(model: str):
    if model != "identifiers":
        return load_embedder(model)
    # The encoder of the tests: no weights, and next to no time, so what is measured is the rest.
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from support.identifier_encoder import IdentifierEncoder

    return IdentifierEncoder(dim=384)


def _print(what: str, **values: object) -> None:
    rounded = {key: round(v, 3) if isinstance(v, float) else v for key, v in values.items()}
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    print(json.dumps({"what": what, **rounded, "machine": machine}), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repo", type=Path, required=True, help="folder to index")
    parser.add_argument("--index", type=Path, help="keep the index here")
    parser.add_argument("--model", default="embedded", help="SEA model, or `identifiers`")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--updates", type=int, default=3, help="files to edit, one at a time")
    parser.add_argument("--keep-blocks", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
