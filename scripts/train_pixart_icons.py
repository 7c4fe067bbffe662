"""Train the small PIXART-delta model of this repository, each part in a given time.

Example (one H100; the parts may be given in several runs, which go on where the last one stopped):
    python scripts/train_pixart_icons.py --pack icons/64 --out models/icons vae=110 base=300
    python scripts/train_pixart_icons.py --pack icons/64 --out models/icons lcm=90 controlnet=90
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from polyzoo.core.errors import Interrupted
from polyzoo.pixart_delta.presets import PRESETS, PixArtTrainConfig
from polyzoo.pixart_delta.train import main as train_part
from polyzoo.pixart_delta.train import render

PARTS = {
    "vae": "icons-vae",
    "base": "icons",
    "lcm": "icons-lcm",
    "controlnet": "icons-controlnet",
}
CALIBRATION_STEPS = 120


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", metavar="PART=SECONDS", help=", ".join(PARTS))
    parser.add_argument("--pack", type=Path, required=True, help="icon pack of 64 pixels")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument(
        "--go-on", action="store_true", help="start from the networks that the folder holds"
    )
    parser.add_argument("--batch-size", type=int, help="the preset's where not given")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--calibration-steps", type=int, default=CALIBRATION_STEPS)
    given = parser.parse_args()
    for part in given.parts:
        name, _, seconds = part.partition("=")
        status = train(name, float(seconds), given)
        if status:
            return status
    return 0


def train(name: str, seconds: float, given: argparse.Namespace) -> int:
    """Train one part; the number of steps is measured once and kept with the run."""
    begun = time.perf_counter()
    config = PRESETS[PARTS[name]]()
    config = replace(
        config,
        out=given.out,
        start=given.out if config.start or given.go_on else None,
        data=replace(config.data, icons=given.pack),
        compile=config.compile and not given.no_compile,
        train=replace(
            config.train,
            run_dir=given.runs / name,
            batch_size=given.batch_size or config.train.batch_size,
        ),
    )
    steps_file = given.runs / f"{name}-steps.json"
    if steps_file.is_file():
        steps = json.loads(steps_file.read_text())
    else:
        rate = calibrate(config, given.runs / f"{name}-calibration", given.calibration_steps)
        left = seconds - 1.4 * (time.perf_counter() - begun)  # the run itself starts once more
        steps = max(int(rate * left), 10)
        steps_file.write_text(json.dumps(steps))
        print(f"{name}: {rate:.1f} steps/s, {steps} steps", flush=True)
    status = run(replace(config, train=replace(config.train, steps=steps)), given.runs / name)
    print(f"{name}: {time.perf_counter() - begun:.0f} s in all", flush=True)
    return status


def calibrate(config: PixArtTrainConfig, run_dir: Path, steps: int) -> float:
    """Steps per second of a short run into a folder that is not kept."""
    recipe = replace(
        config.train,
        run_dir=run_dir,
        steps=steps,
        log=replace(config.train.log, every=max(steps // 6, 1), plots=False),
        checkpoint=replace(config.train.checkpoint, every=None),
        resume="never",
    )
    if run(replace(config, out=run_dir / "out", train=recipe), run_dir, copy_from=config.out):
        raise SystemExit(1)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return rows[-1]["samples_per_second"] / config.train.batch_size


def run(config: PixArtTrainConfig, run_dir: Path, *, copy_from: Path | None = None) -> int:
    """Run the `train` command in this process, so that compiled code is kept."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if copy_from is not None:  # parts that the calibration needs but must not change
        for part in ("vae", "text", "transformer"):
            if (copy_from / part).is_dir():
                (config.out / part).parent.mkdir(parents=True, exist_ok=True)
                (config.out / part).symlink_to((copy_from / part).resolve())
    try:
        report = train_part(config)
    except Interrupted as error:
        print(error, flush=True)
        return error.exit_code
    print(render(report), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
