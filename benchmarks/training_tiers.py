"""Every strategy beside the raw engines: speed, memory and loss of a GPT on this machine.

    python benchmarks/training_tiers.py --rows plain,zero3-cpu --size 2.56 --limit 300

--gpus 2 starts two processes itself. One JSON line a row goes to --out, each measured in processes
of its own; rows already in the file are passed over, and none begins at the end of the limit. A row
is ENGINE:STRATEGY[:KEY=VALUE...], ENGINE trainer or raw. The model: GELU blocks, sequence 1024,
vocabulary 8192, recomputed blocks, bf16, AdamW, clipping at 1.0.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEQUENCE, VOCABULARY = 1024, 8192
SHAPES = {  # billions of parameters: layers, width, heads
    "0.001": (2, 128, 4), "0.04": (2, 1024, 8), "1.24": (24, 2048, 16), "2.56": (32, 2560, 20),
    "4.1": (40, 2880, 24), "5.2": (40, 3264, 24), "6.6": (32, 4096, 32), "8.2": (40, 4096, 32),
    "9.8": (48, 4096, 32), "11.4": (56, 4096, 32), "13.0": (64, 4096, 32),
}  # fmt: skip
ROWS = {
    "plain": ["raw:single", "trainer:single"],
    "zero3-cpu": ["raw:zero3-cpu", "trainer:zero3-cpu"],
    "quick": ["raw:single", "trainer:single", "trainer:fsdp2-cpu"],
}


@dataclass(frozen=True)
class Row:
    """One measurement."""

    engine: str
    strategy: str
    options: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Row:
        """Read a row's name."""
        engine, strategy, *pairs = text.split(":")
        return cls(engine, strategy, dict(pair.split("=", 1) for pair in pairs))


def build_gpt(size: str, device: str | None) -> Any:
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy, scaled_dot_product_attention

    layers, width, heads = SHAPES[size]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            b, n, _ = x.shape
            q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
            y = scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(b, n, width))
            return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))

    class Gpt(nn.Module):
        block = Block

        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(VOCABULARY, width)
            self.places = nn.Embedding(SEQUENCE, width)
            self.blocks = nn.ModuleList(Block() for _ in range(layers))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, VOCABULARY, bias=False)
            self.recompute = False

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.tokens(tokens[:, :-1]) + self.places.weight[: tokens.shape[1] - 1]
            for block in self.blocks:
                if self.recompute:
                    x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
            logits = self.head(self.norm(x))
            return cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    # Built in pieces, the engine chooses the device.
    with nullcontext() if device is None else torch.device(device):
        return Gpt(), Block


class Texts:
    """Token sequences with something to learn: each token decides most of the next."""

    def __len__(self) -> int:
        return 1 << 16

    def __getitem__(self, index: int) -> Any:
        import torch

        generator = torch.Generator().manual_seed(index)
        start = torch.randint(VOCABULARY, (1,), generator=generator)
        steps = torch.randint(1, 4, (SEQUENCE + 1,), generator=generator)
        return (start + steps.cumsum(0)) % VOCABULARY


class HostWatch(threading.Thread):
    """Notes how far the machine's free memory falls."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.least = self.available()
        self.over = threading.Event()

    @staticmethod
    def available() -> int:
        """Bytes free, or free at once."""
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
        return 0

    def run(self) -> None:
        """Look ten times a second."""
        while not self.over.wait(0.1):
            self.least = min(self.least, self.available())


# --- one row, in its own process ------------------------------------------------------------------


def measure(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.backends.cuda.matmul.allow_tf32 = True
    watch = HostWatch()
    watch.start()
    started = time.perf_counter()
    run: Callable[..., dict[str, Any]] = {"trainer": by_trainer, "raw": by_hand}[row.engine]
    result = run(row, options)
    watch.over.set()
    if torch.cuda.is_available():
        result["gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        result["gpu_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    result["host_gib"] = round((watch.before - watch.least) / 2**30, 2)
    result["wall_seconds"] = round(time.perf_counter() - started, 1)
    return result


def summary(times: list[float], losses: list[float], options: argparse.Namespace) -> dict[str, Any]:
    """The first steps warm up: they allocate, trace and touch memory."""
    kept = times[options.warm :] or times[-1:]
    step = statistics.median(kept)
    tokens = options.batch * options.accum * options.gpus * SEQUENCE
    return {
        "step_seconds": round(step, 4),
        "tokens_per_second": round(tokens / step),
        "step_seconds_all": [round(t, 3) for t in times],
        "losses": [round(loss, 4) for loss in losses],
    }


def by_trainer(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from polyzoo.training import CheckpointConfig, LogConfig, OptimConfig, TrainConfig, Trainer
    from polyzoo.training.config import DataConfig, ScheduleConfig, TierConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    given: dict[str, Any] = {
        key: (Path(v) if key in ("extra", "nvme_path") else float(v) if "." in v else
              int(v) if v.isdigit() else v)
        for key, v in row.options.items()
    }  # fmt: skip
    for flag in ("sharded_init", "pin_memory", "overlap"):
        if flag in given:
            given[flag] = bool(given[flag])

    def build() -> Any:
        model, _ = build_gpt(options.size, None if given.get("sharded_init") else device)
        model.recompute = True
        return model

    def step(handle: Any, batch: Any, _: Any) -> Any:
        return handle(batch)

    config = TrainConfig(
        run_dir=Path(options.folder) / "run",
        steps=options.steps,
        batch_size=options.batch,
        grad_accum=options.accum,
        device=device,
        precision="bf16",
        strategy=row.strategy,  # pyright: ignore[reportArgumentType]
        optim=OptimConfig(lr=1e-4),
        schedule=ScheduleConfig(kind="constant"),
        data=DataConfig(shuffle=False),
        checkpoint=CheckpointConfig(every=None),
        log=LogConfig(every=1, progress=False, plots=False),
        tier=TierConfig(**given),
    )
    saved = skip_last_checkpoint()
    with saved:
        Trainer(config).fit(
            model=build, step_fn=step, train_data=Texts(), everywhere=True, return_model=False
        )
    lines = [
        json.loads(line)
        for line in (Path(options.folder) / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    result = summary(
        [line["step_seconds"] for line in lines], [line["loss"] for line in lines], options
    )
    last = lines[min(len(lines), options.warm + 1) :] or lines[-1:]
    for phase in ("forward", "backward", "optimizer"):
        values = [line[f"{phase}_seconds"] for line in last if f"{phase}_seconds" in line]
        if values:
            result[f"{phase}_seconds"] = round(statistics.median(values), 4)
    result["drive_gib"] = round(lines[-1].get("drive_bytes", 0) / 2**30, 2)
    result["norms"] = [round(line["grad_norm"], 4) for line in lines]
    return result


def skip_last_checkpoint() -> Any:
    """A run saves its last step; tens of GB would be written that nothing here measures."""
    from contextlib import contextmanager

    from polyzoo.training.checkpoint.snapshot import Snapshots

    @contextmanager
    def skipping() -> Any:
        former = Snapshots.save
        Snapshots.save = lambda self, state: self.store.path(state.counters.step)  # type: ignore[method-assign]
        try:
            yield
        finally:
            Snapshots.save = former  # type: ignore[method-assign]

    return skipping()


def by_hand(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """The same model and data in a bare loop; DeepSpeed with its defaults."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    texts = Texts()

    def batch(index: int) -> Any:
        first = (index * world + rank) * options.batch
        return torch.stack([texts[first + i] for i in range(options.batch)]).to(device)

    take = raw_single if row.strategy == "single" else raw_deepspeed
    step = take(row, options, device)
    times: list[float] = []
    losses: list[float] = []
    parts: list[list[float]] = []
    for number in range(options.steps):
        batches = [batch(number * options.accum + i) for i in range(options.accum)]
        wait(device)
        begun = time.perf_counter()
        loss, phases = step(batches)
        wait(device)
        times.append(time.perf_counter() - begun)
        losses.append(loss)
        parts.append(phases)
        print(f"raw step {number}: {times[-1]:.3f} s, loss {loss:.4f}", flush=True)
    result = summary(times, losses, options)
    kept = parts[options.warm :] or parts[-1:]
    for index, phase in enumerate(("forward", "backward", "optimizer")):
        result[f"{phase}_seconds"] = round(statistics.median(p[index] for p in kept), 4)
    return result


def wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def raw_single(_: Row, options: argparse.Namespace, device: Any) -> Callable[..., Any]:
    import torch

    model, _ = build_gpt(options.size, str(device))
    model.recompute = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(batches: list[Any]) -> Any:
        total = 0.0
        marks = [time.perf_counter()]
        for tokens in batches:
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(tokens) / len(batches)
            loss.backward()
            total += loss.detach()
        wait(device)
        marks.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = float(total)
        marks.append(time.perf_counter())
        return value, [0.0, marks[1] - marks[0], marks[2] - marks[1]]

    return step


def raw_deepspeed(row: Row, options: argparse.Namespace, device: Any) -> Callable[..., Any]:
    import torch

    world = int(os.environ.get("WORLD_SIZE", "1"))
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**alone, "MASTER_PORT": str(free_port())}.items():
        os.environ.setdefault(name, value)
    os.environ.pop("TORCH_CUDA_ARCH_LIST", None)
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    zero: dict[str, Any] = {"stage": 3}
    if row.strategy != "zero3":
        zero["offload_optimizer"] = {"device": "cpu"}
    if row.strategy == "zero3-cpu":
        zero["offload_param"] = {"device": "cpu"}
    settings = {
        "train_micro_batch_size_per_gpu": options.batch,
        "gradient_accumulation_steps": options.accum,
        "train_batch_size": options.batch * options.accum * world,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    deepspeed.init_distributed()
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model, _ = build_gpt(options.size, None)
    model.recompute = True
    if row.strategy == "zero3":
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    else:
        optimizer = DeepSpeedCPUAdam(model.parameters(), lr=1e-4, weight_decay=0.01)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def step(batches: list[Any]) -> Any:
        total = 0.0
        spent = [0.0, 0.0, 0.0]
        for tokens in batches:
            marks = [time.perf_counter()]
            loss = engine(tokens)
            wait(device)
            marks.append(time.perf_counter())
            engine.backward(loss)
            wait(device)
            marks.append(time.perf_counter())
            engine.step()
            wait(device)
            marks.append(time.perf_counter())
            total += float(loss.detach()) / len(batches)
            spent = [old + b - a for old, a, b in zip(spent, marks, marks[1:], strict=False)]
        return total, spent

    return step


# --- all rows, from the outside -------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_row(text: str, options: argparse.Namespace, limit: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        result_file = Path(folder) / "result.json"
        command = [
            sys.executable, __file__, "--one", text, "--size", options.size, "--steps",
            str(options.steps), "--warm", str(options.warm), "--batch", str(options.batch),
            "--accum", str(options.accum), "--gpus", str(options.gpus), "--folder", folder,
        ]  # fmt: skip
        port = str(free_port())
        children = []
        for rank in range(options.gpus):
            env = dict(os.environ)
            if options.gpus > 1:
                env |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(options.gpus),
                    "LOCAL_WORLD_SIZE": str(options.gpus), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }  # fmt: skip
            log = Path(options.logs) / f"{text.replace(':', '_').replace('/', '-')}.{rank}.log"
            stream = log.open("w")
            children.append(
                subprocess.Popen(
                    command, env=env, stdout=stream, stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )  # fmt: skip
        deadline = time.monotonic() + limit
        codes: list[int | None] = [None] * len(children)
        while any(code is None for code in codes) and time.monotonic() < deadline:
            codes = [child.poll() for child in children]
            if any(code not in (None, 0) for code in codes):
                break
            time.sleep(0.1)
        for child in children:
            if child.poll() is None and codes.count(0) < len(codes):
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if result_file.is_file():
            return json.loads(result_file.read_text())
        tail = log.read_text(errors="replace").strip().splitlines()[-12:]
        over = time.monotonic() >= deadline
        return {"failed": "time" if over else str(codes), "log": tail}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default="plain,zero3-cpu")
    parser.add_argument("--size", default="2.56", choices=sorted(SHAPES))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--accum", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for everything")
    parser.add_argument("--row-limit", type=float, default=120.0, help="seconds for one row")
    parser.add_argument("--out", default="tiers.jsonl")
    parser.add_argument("--logs", default=".")
    parser.add_argument("--scratch", default=None, help="folder on the drive to offload to")
    parser.add_argument("--quick", action="store_true", help="a toy size, to see that it runs")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.rows, options.size, options.batch = "quick", "0.001", 1
        options.steps, options.warm = 3, 1
        folder = tempfile.mkdtemp(prefix="tiers-")
        options.out, options.logs = f"{folder}/tiers.jsonl", folder
    return options


def main() -> None:
    options = parse()
    if options.one:
        result = measure(Row.parse(options.one), options)
        if int(os.environ.get("RANK", "0")) == 0:
            (Path(options.folder) / "result.json").write_text(json.dumps(result))
        return
    began = time.monotonic()
    out = Path(options.out)
    Path(options.logs).mkdir(parents=True, exist_ok=True)
    named = [row for name in options.rows.split(",") for row in ROWS.get(name, [name])]
    done = set()
    if out.is_file():
        for line in out.read_text().splitlines():
            known = json.loads(line)
            done.add((known["row"], known["size"], known["gpus"], known["batch"], known["accum"]))
    for text in named:
        key = (text, options.size, options.gpus, options.batch, options.accum)
        left = options.limit - (time.monotonic() - began)
        if key in done or left < 15:
            print(f"passed over: {text} ({left:.0f} s left)", flush=True)
            continue
        begun = time.monotonic()
        result = run_row(text, options, min(left - 2, options.row_limit))
        record = dict(zip(("row", "size", "gpus", "batch", "accum"), key, strict=True))
        record |= {**result, "total_seconds": round(time.monotonic() - begun, 1)}
        with out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
