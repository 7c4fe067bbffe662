"""Batch tokenisation of many small pictures, killed and resumed: nothing lost or doubled.

python benchmarks/seed_shards.py --pictures 10000 --workers 16 [--kills 2]

Writes the pictures (WebP, 64 pixels) to a temporary folder, runs `polyzoo seed tokenize` on it in a
process of its own, kills that `--kills` times and runs it to the end; prints a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from polyzoo.seed.shards import read_tokens

RUN = """
import sys
from pathlib import Path
from polyzoo.seed.options import TokenizeConfig
from polyzoo.seed.tokenizing import main
report = main(TokenizeConfig(images=Path(sys.argv[1]), out=Path(sys.argv[2]), model=sys.argv[3],
                             batch_size=int(sys.argv[4]), workers=int(sys.argv[5])))
print(report.new, report.seconds)
"""


def write_pictures(folder: Path, count: int) -> None:
    draws = np.random.default_rng(0)
    for number in range(count):
        coarse = draws.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC)
        shard = folder / f"{number // 1000:03d}"
        shard.mkdir(exist_ok=True)
        picture.save(shard / f"{number:06d}.webp", quality=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=10000)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--kills", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        images, out = Path(place, "images"), Path(place, "tokens")
        images.mkdir()
        write_pictures(images, arguments.pictures)
        command = [sys.executable, "-c", RUN, str(images), str(out), arguments.model,
                   str(arguments.batch), str(arguments.workers)]  # fmt: skip
        kept = []
        for kill in range(arguments.kills):
            goal = arguments.pictures * (kill + 1) // (arguments.kills + 1)
            child = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
            codes = out / "codes.bin"
            while child.poll() is None and _records(codes) < goal:
                time.sleep(0.02)
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            kept.append(_records(codes))
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        new, seconds = done.stdout.split()[-2:]
        found = read_tokens(out)
        names = {str(path.relative_to(images)) for path in images.rglob("*.webp")}
        lines = (out / "keys.jsonl").read_text(encoding="utf-8").splitlines()
        rate = int(new) / float(seconds)
        print(
            json.dumps(
                {
                    "pictures": arguments.pictures,
                    "killed_at": kept,
                    "records": len(lines),
                    "lost": len(names - set(found)),
                    "doubled": len(lines) - len(found),
                    "images_per_second_of_last_run": round(rate, 1),
                    "seconds_for_100000": round(100_000 / rate, 1),
                    "bytes": (out / "codes.bin").stat().st_size,
                    "workers": arguments.workers,
                }
            )
        )


def _records(codes: Path) -> int:
    return codes.stat().st_size // 32 if codes.is_file() else 0


if __name__ == "__main__":
    main()
