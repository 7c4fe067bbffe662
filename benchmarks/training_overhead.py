"""What the engine adds to a step: the same model, data and optimizer in a bare loop and in Trainer.

    python benchmarks/training_overhead.py --device cpu --steps 300 --width 512

Prints one JSON object. The difference per step is the engine's cost: data position, weighing,
clipping and norm, schedule, log window; both loops clip and both read the loss every 50 steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from polyzoo.training import CheckpointConfig, LogConfig, OptimConfig, TrainConfig, Trainer

READ_EVERY = 50


class Rows:
    """Random rows, made beforehand."""

    def __init__(self, width: int, length: int) -> None:
        self.values = torch.randn(length, width)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Tensor:
        return self.values[index]


def build(width: int, depth: int) -> nn.Module:
    layers = [nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth)]
    return nn.Sequential(*layers)


def bare(model: nn.Module, rows: Rows, batch: int, steps: int, device: torch.device) -> float:
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loader = DataLoader(rows, batch_size=batch, shuffle=True, pin_memory=device.type == "cuda")
    step, started = 0, time.perf_counter()
    while step < steps:
        for x in loader:
            moved = x.to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = (model(moved) - moved).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % READ_EVERY == 0:
                loss.item()
            if step == WARM:
                started = time.perf_counter()
            if step == steps:
                break
    return (time.perf_counter() - started) / (steps - WARM)


WARM = 10


def engine(model: nn.Module, rows: Rows, batch: int, steps: int, device: torch.device) -> float:
    marks: list[float] = []

    def step(wrapped: nn.Module, x: Tensor, _: object) -> Tensor:
        marks.append(time.perf_counter())
        return (wrapped(x) - x).square().mean()

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            run_dir=Path(folder),
            steps=steps + 1,
            batch_size=batch,
            device=str(device),
            optim=OptimConfig(lr=1e-4),
            checkpoint=CheckpointConfig(every=None),
            log=LogConfig(every=READ_EVERY, progress=False, plots=False),
        )
        Trainer(config).fit(model=model, step_fn=step, train_data=rows)
    return (marks[steps] - marks[WARM]) / (steps - WARM)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.width, options.steps, options.repeats = 128, 40, 1
    device = torch.device(options.device)
    rows = Rows(options.width, options.batch * 100)
    times: dict[str, list[float]] = {"bare": [], "engine": []}
    for _ in range(options.repeats):
        for name, run in (("bare", bare), ("engine", engine)):
            model = build(options.width, options.depth)
            times[name].append(run(model, rows, options.batch, options.steps, device))
    best = {name: min(values) for name, values in times.items()}
    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                "torch": torch.__version__,
                **vars(options),
                **{f"{name}_ms": round(value * 1e3, 4) for name, value in best.items()},
                **{
                    f"{name}_median_ms": round(statistics.median(values) * 1e3, 4)
                    for name, values in times.items()
                },
                "overhead_us": round((best["engine"] - best["bare"]) * 1e6, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
