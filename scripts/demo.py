"""`make demo`: every finished model on real input, and a page of what came out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from polyzoo.core.demo import run_demos, write_page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of the page")
    parser.add_argument("models", nargs="*", help="only these models (default: all)")
    arguments = parser.parse_args()
    runs = run_demos(arguments.out, only=arguments.models)
    if not runs:
        print(f"no demo named {arguments.models}", file=sys.stderr)
        return 2
    page = arguments.out / "index.html"
    write_page(runs, page)
    failed = [text for run in runs for text, passed in run.section.checks if not passed]
    for run in runs:
        print(f"{run.name}: {len(run.section.checks)} checks, {run.seconds:.0f} s")
    for text in failed:
        print(f"not as expected: {text}", file=sys.stderr)
    print(f"Open {page}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
