"""A long context whose keys and values exceed the GPU memory they may use.

    python benchmarks/attention_cooperative.py [--tokens 262144] [--layers 4] [--share 0.5]

A stack of attention layers (random queries, keys and values; no projections) is filled chunk by
chunk and then decodes. `--share` is the part of all keys and values that fits the GPU memory they
may use. One JSON line per way to do it, in turn in one process:

- cooperative: `CooperativeCache`, the host's keys divided between the CPU and the bus as measured;
- cooperative, CPU only / bus only: the same with all of the host's keys on one of them (the latter
  is offloading that keeps what fits);
- offloading: every layer's keys and values lie in pinned host memory and are copied in for each
  token, the next layer's while one computes, as transformers' offloaded cache does;
- CPU, torch: `scaled_dot_product_attention` over all keys on the host;
- CPU, ours: the compiled kernel of `polyzoo.attention` over all keys on the host.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyzoo.attention import CooperativeCache, attention
from polyzoo.attention.host_decode import HostDecoder, KeyBlock

H, HK, D = 32, 8, 128
DTYPE = torch.bfloat16


def drawn(n: int, *, heads: int, seed: int, device: str) -> Tensor:
    chance = torch.Generator(device).manual_seed(seed)
    return torch.randn(1, heads, n, D, generator=chance, device=device, dtype=DTYPE)


def chunk(layer: int, start: int, n: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of some positions of a layer; the same whenever asked."""
    seed = 1_000_003 * layer + start
    return (
        drawn(n, heads=H, seed=3 * seed, device=device),
        drawn(n, heads=HK, seed=3 * seed + 1, device=device),
        drawn(n, heads=HK, seed=3 * seed + 2, device=device),
    )


class Bench:
    """The ways, timed in turn."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.a = arguments
        self.device: str = arguments.device
        self.threads = len(os.sched_getaffinity(0))
        self.per_key = 2 * HK * D * DTYPE.itemsize
        self.whole = arguments.tokens * arguments.layers * self.per_key
        self.cap = int(arguments.share * self.whole)
        self.deadline = time.monotonic() + arguments.limit

    def wait(self) -> None:
        """Wait for the GPU."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def say(self, way: str, phase: str, seconds: float, tokens: int, **more: Any) -> None:
        """Keep the line of one measurement."""
        line = {
            "way": way,
            "phase": phase,
            "tokens_per_s": round(tokens / seconds, 3),
            "ms_per_token": round(1e3 * seconds / tokens, 4),
            "context": self.a.tokens,
            "layers": self.a.layers,
            "heads": f"{H}/{HK} x {D} bf16",
            "kv_gb": round(self.whole / 1e9, 3),
            "gpu_cap_gb": round(self.cap / 1e9, 3),
            "threads": self.threads,
            **more,
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "torch": torch.__version__,
        }
        self.keep(line)

    def keep(self, line: dict[str, Any]) -> None:
        """Print a line and append it to the file, if there is one."""
        print(json.dumps(line), flush=True)
        if self.a.out:
            with Path(self.a.out).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def prefill(self, cache: CooperativeCache) -> None:
        """Fill the cache; check some rows of the last chunk."""
        a, rows = self.a, 16
        small = self.per_key * (4 * a.block_keys + a.layers * a.chunk)
        for warm in (True, False):  # compile on some chunks of a cache that soon spills
            target = self.new_cache(small) if warm else cache
            if not warm:
                before = time.perf_counter()
                target.reserve(*chunk(0, 0, 1, self.device)[1:])
                reserving = time.perf_counter() - before
                if self.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
            stop = a.tokens if not warm else 4 * a.chunk
            kept: list[Tensor] = []
            seconds = 0.0
            for start in range(0, stop, a.chunk):
                n = min(a.chunk, stop - start)
                for layer in range(a.layers):
                    q, k, v = chunk(layer, start, n, self.device)
                    self.wait()
                    before = time.perf_counter()
                    out = target.attend(layer, q, k, v)
                    self.wait()
                    seconds += time.perf_counter() - before
                    if start + n == stop:
                        kept.append(out[:, :, -rows:].clone())
            del target
        peak, worst = self.peak(), 0.0
        for layer in range(a.layers):
            q = chunk(layer, stop - n, n, self.device)[0][:, :, -rows:]
            k, v = (self.stored(layer, which) for which in (1, 2))
            expected = attention(q.float(), k.float(), v.float(), causal=True)
            worst = max(worst, float((kept[layer].float() - expected).abs().max()))
        self.say(
            "cooperative",
            "prefill",
            seconds,
            a.tokens,
            chunk=a.chunk,
            largest_difference=worst,
            peak_gb=peak,
            reserving_s=round(reserving, 3),
        )

    def new_cache(self, gpu_bytes: int | None = None) -> CooperativeCache:
        """An empty cache, under the cap if nothing else is said."""
        return CooperativeCache(
            self.a.layers,
            gpu_bytes=gpu_bytes or self.cap,
            device=self.device,
            block_keys=self.a.block_keys,
            staging_blocks=4,
            expected_keys=self.a.tokens + 256,
        )

    def peak(self) -> float:
        """Most GPU memory since the last reset."""
        return round(torch.cuda.max_memory_allocated() / 1e9, 3) if self.device == "cuda" else 0.0

    def stored(self, layer: int, which: int) -> Tensor:
        """All keys (1) or values (2) of a layer, made again."""
        parts = [
            chunk(layer, start, min(self.a.chunk, self.a.tokens - start), self.device)[which]
            for start in range(0, self.a.tokens, self.a.chunk)
        ]
        return torch.cat(parts, dim=2)

    def steps(self, count: int, first: int = 0) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
        """New positions, one a step, of every layer."""
        for number in range(first, first + count):
            position = self.a.tokens + number
            yield [chunk(layer, position, 1, self.device) for layer in range(self.a.layers)]

    def decode(
        self,
        way: str,
        run: Callable[[int, Tensor, Tensor, Tensor], Tensor],
        count: int,
        **more: Any,
    ) -> list[float]:
        """Time tokens one by one."""
        times: list[float] = []
        for step in self.steps(count + 2):
            self.wait()
            before = time.perf_counter()
            for layer, (q, k, v) in enumerate(step):
                run(layer, q, k, v)
            self.wait()
            times.append(time.perf_counter() - before)
        times = times[2:]
        self.say(
            way,
            "decode",
            statistics.median(times),
            1,
            best_ms=round(1e3 * min(times), 4),
            worst_ms=round(1e3 * max(times), 4),
            timed=len(times),
            **more,
        )
        return times

    def run(self) -> None:
        """Fill, check, and time every way."""
        a = self.a
        cache = self.new_cache()
        self.prefill(cache)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.check_decode(cache)
        for turn in range(a.turns):
            for way, stream in (
                ("cooperative", "auto" if turn == 0 else None),
                ("cooperative, CPU only", 0.0),
                ("cooperative, bus only", 1.0),
            ):
                if stream is None:
                    stream = self.measured
                cache.divide(stream)
                self.decode(way, cache.attend, a.steps, turn=turn)
                if stream == "auto":
                    shares = cache.shares
                    assert shares is not None
                    self.measured = shares.streamed
                    self.keep(
                        {
                            "way": way,
                            "phase": "division",
                            "streamed_share": round(shares.streamed, 3),
                            "bus_gb_s": round(shares.bus / 1e9, 2),
                            "host_gb_s": round(shares.host / 1e9, 2),
                            "decode_peak_gb": self.peak(),
                        }
                    )
        del cache
        self.others()

    def check_decode(self, cache: CooperativeCache) -> None:
        """Compare one token of every layer with fp32 attention over all keys."""
        worst = 0.0
        for layer, (q, k, v) in enumerate(next(self.steps(1, first=10_000))):
            out = cache.attend(layer, q, k, v)
            whole = (
                torch.cat([self.stored(layer, which), new], dim=2).float()
                for which, new in ((1, k), (2, v))
            )
            expected = attention(q.float(), *whole)
            worst = max(worst, float((out.float() - expected).abs().max()))
        self.keep({"phase": "decode against fp32", "largest_difference": worst})
        if worst > 2e-3:
            raise SystemExit(f"decoding differs by {worst}")

    def others(self) -> None:
        """The ways without our cache: all keys on the host, in one tensor a layer."""
        a = self.a
        host: list[tuple[Tensor, Tensor]] = []
        for layer in range(a.layers):
            pair = []
            for which in (1, 2):
                made = self.stored(layer, which)
                kept = torch.empty(made.shape, dtype=DTYPE, pin_memory=self.device == "cuda")
                pair.append(kept.copy_(made))
            host.append((pair[0], pair[1]))
        if self.device == "cuda":
            copies = torch.cuda.Stream()
            buffers = [[torch.empty_like(t, device="cuda") for t in host[0]] for _ in range(2)]
            filled, used = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))
            for event in used:
                event.record()

            def bring(layer: int) -> None:
                place = layer % 2
                with torch.cuda.stream(copies):
                    copies.wait_event(used[place])
                    for mine, theirs in zip(buffers[place], host[layer], strict=True):
                        mine.copy_(theirs, non_blocking=True)
                    filled[place].record(copies)

            def offloaded(layer: int, q: Tensor, _k: Tensor, _v: Tensor) -> Tensor:
                bring((layer + 1) % a.layers)
                place = layer % 2
                filled[place].wait()
                out = attention(q, *buffers[place])
                used[place].record()
                return out

            bring(0)
            if a.layers % 2:
                raise SystemExit("--layers must be even: two buffers take turns")
            self.decode("offloading", offloaded, a.steps)
            del buffers
        torch.set_num_threads(self.threads)
        decoder = HostDecoder()
        blocks = [
            [
                KeyBlock(
                    k[:, :, start : start + a.block_keys], v[:, :, start : start + a.block_keys]
                )
                for start in range(0, a.tokens, a.block_keys)
            ]
            for k, v in host
        ]

        def ours(layer: int, q: Tensor, _k: Tensor, _v: Tensor) -> Tensor:
            return decoder.start(q.cpu(), blocks[layer]).result()[0].to(self.device)

        def torchs(layer: int, q: Tensor, _k: Tensor, _v: Tensor) -> Tensor:
            out = F.scaled_dot_product_attention(q.cpu(), *host[layer], enable_gqa=True)
            return out.to(self.device)

        self.decode("CPU, ours", ours, a.steps)
        if time.monotonic() < self.deadline:
            self.decode("CPU, torch", torchs, max(1, a.steps // 4))
        if time.monotonic() < self.deadline:
            q = chunk(0, a.tokens, a.cpu_rows, self.device)[0].cpu()
            before = time.perf_counter()
            F.scaled_dot_product_attention(q, *host[0], enable_gqa=True)
            seconds = (time.perf_counter() - before) * a.layers
            self.say(
                "CPU, torch", "prefill, the last rows only", seconds, a.cpu_rows, rows=a.cpu_rows
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=262144)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--block-keys", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--cpu-rows", type=int, default=32)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds; then less is tried")
    parser.add_argument("--out", help="append the lines to this file")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    print(json.dumps({"cpu": platform.processor(), "threads": bench.threads}), flush=True)
    with torch.no_grad():
        bench.run()


if __name__ == "__main__":
    main()
