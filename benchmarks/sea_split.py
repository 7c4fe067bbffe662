"""Splitting the functions of an installed package: seconds, apart from the tokenizer's.

    python benchmarks/sea_split.py --package torch
    python benchmarks/sea_split.py --quick

The tokenizer is a regular expression, so that what is timed is parsing, cutting and bookkeeping;
its own time is reported beside. CPU seconds of one thread. One JSON object is printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from importlib import metadata
from pathlib import Path

from polyzoo.core.errors import DataError
from polyzoo.sea.config import SplitConfig
from polyzoo.sea.search.units import extract_units
from polyzoo.sea.splitting import Pieces, split
from polyzoo.sea.splitting.languages import decode_source

PIECE = re.compile(r"\w{1,4}|[^\w\s]")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the splitting of an installed package")
    parser.add_argument("--package", default="transformers", help="an installed distribution")
    parser.add_argument("--quick", action="store_true", help="the first 1,000 functions")
    parser.add_argument("--budget", type=int, default=254)
    options = parser.parse_args()

    started = time.process_time()
    functions = read_functions(options.package, most=1_000 if options.quick else 10**9)
    reading = time.process_time() - started
    clock = Clock()
    config = SplitConfig(budget=options.budget)
    counts = {"functions": 0, "blocks": 0, "in more than one block": 0, "fallbacks": 0}
    started = time.process_time()
    for text in functions:
        try:
            found = split(text, language="python", config=config, tokenize=clock)
        except DataError:
            continue  # nothing but documentation
        counts["functions"] += 1
        counts["blocks"] += len(found.blocks)
        counts["in more than one block"] += len(found.blocks) > 1
        counts["fallbacks"] += found.fallback is not None
    total = time.process_time() - started
    result = {
        "package": f"{options.package} {metadata.version(options.package)}",
        **counts,
        "seconds": round(total - clock.seconds, 2),
        "seconds in the tokenizer": round(clock.seconds, 2),
        "seconds to read and find the functions": round(reading, 2),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    print(json.dumps(result))


class Clock:
    """The tokenizer, and the time spent in it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, text: str) -> Pieces:
        """Words in parts of at most four characters, other characters alone."""
        started = time.process_time()
        spans = [match.span() for match in PIECE.finditer(text)]
        pieces = Pieces(list(range(len(spans))), spans)
        self.seconds += time.process_time() - started
        return pieces


def read_functions(package: str, *, most: int) -> list[str]:
    """Texts of a package's functions and methods, in the order of its files."""
    functions: list[str] = []
    for file in sorted(metadata.files(package) or (), key=str):
        path = Path(str(file.locate()))
        if file.suffix != ".py" or not path.is_file() or len(functions) >= most:
            continue
        try:
            source = decode_source(path.read_bytes(), path=str(path))
        except DataError:
            continue
        units = extract_units(source, language="python", path=str(path))
        functions += [unit.text for unit in units if unit.kind in ("function", "method")]
    return functions[:most]


if __name__ == "__main__":
    main()
