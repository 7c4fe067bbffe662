"""What the compiler makes of the CUDA C++ kernels: no GPU of these generations is at hand to time.

    python benchmarks/attention_cuda_static.py [--volta-nvrtc PATH/libnvrtc.so.12] > static.jsonl

One JSON line per kernel: registers and spilled bytes of a thread, shared memory of a block, blocks
that a multiprocessor holds, and the instructions of the hot loop by kind. The loop holds its step
twice, with and without mask code. `product_phase` is the share that matrix products and the loads
of their operands have of all instructions but the softmax's arithmetic. Needs torch's NVRTC and the
cuobjdump of triton's wheel (which does not disassemble sm_70: no instructions there); sm_70 needs
an NVRTC 12.x, as torch's cu126 builds bring it (`pip install nvidia-cuda-nvrtc-cu12==12.9.86`).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import triton.backends.nvidia

from polyzoo.attention.kernels import nvrtc
from polyzoo.attention.kernels.cuda_program import Variant, source

HEADS = (64, 72, 80, 88, 96, 128)
SHARED = {"sm_75": 64 * 1024, "sm_70": 96 * 1024}
REGISTERS = 64 * 1024
SOFTMAX = {
    "FADD",
    "FMUL",
    "FFMA",
    "FMNMX",
    "MUFU",
    "F2F",
    "F2FP",
    "HADD2",
    "HMUL2",
    "PRMT",
    "SHFL",
    "FSEL",
    "FSETP",
    "ISETP",
    "SEL",
    "PLOP3",
}
"""Scaling, masks, exponentials, row sums, rounding to halves."""


def dump(image: bytes, option: str) -> str:
    """What cuobjdump prints of a cubin."""
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        done = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def hot_loop(body: str) -> Counter[str]:
    """Instructions of the smallest loop that holds the most matrix products."""
    found = re.findall(
        r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)(.*?);", body, re.MULTILINE
    )
    code = [(int(at, 16), name, rest) for at, name, rest in found]
    loops = []
    for at, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if name == "BRA" else None
        if target and int(target[1], 16) < at:
            inside = Counter(n for a, n, _ in code if int(target[1], 16) <= a <= at)
            loops.append((-inside["HMMA"], at - int(target[1], 16), inside))
    return min(loops, key=lambda loop: loop[:2])[2] if loops else Counter()


def mix(body: str) -> dict[str, float]:
    """Instructions of the hot loop by kind."""
    loop = hot_loop(body)
    total = sum(loop.values())
    if not total:
        return {}
    loads = loop["LDSM"] + loop["LDS"]
    softmax = sum(count for name, count in loop.items() if name in SOFTMAX)
    return {
        "loop_instructions": total,
        "products": loop["HMMA"],
        "shared_loads": loads,
        "softmax": softmax,
        "others": total - loop["HMMA"] - loads - softmax,
        "product_phase": round((loop["HMMA"] + loads) / (total - softmax), 3),
    }


def rows(variant: Variant, target: str, path: str | None):
    """One row per kernel of a variant."""
    options = (f"--gpu-architecture={target}", *variant.macros())
    image = nvrtc.compile_source(source(variant.direction), options, cubin=True, path=path)
    usage = dump(image, "-res-usage")
    bodies = {}
    if not variant.volta:
        text = dump(image, "-sass")
        bodies = dict(
            re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", text, re.DOTALL)
        )
    for found in re.finditer(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage):
        name = found[1]
        wanted = {"forward_kernel", "keys_kernel"} | (
            {"queries_kernel"} if variant.want_dk else set()
        )
        if name not in wanted:
            continue
        registers, shared = int(found[2]), variant.shared_bytes(name)
        part = (
            ""
            if name != "keys_kernel" or not variant.splits_keys
            else (" (dK)" if variant.want_dk else " (dV)")
        )
        yield {
            "target": target,
            "d": variant.d,
            "kernel": name + part,
            "registers": registers,
            "spilled_bytes": int(found[3]),
            "shared_bytes": shared,
            "blocks_per_multiprocessor": min(
                REGISTERS // (-(-registers // 8) * 8 * variant.threads), SHARED[target] // shared
            ),
            **mix(bodies.get(name, "")),
        }


def main() -> None:
    """Print every row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--volta-nvrtc", help="a libnvrtc.so.12 for sm_70")
    parser.add_argument("--heads", default=",".join(map(str, HEADS)))
    options = parser.parse_args()
    targets: list[tuple[str, bool, str | None]] = [("sm_75", False, None)]
    if options.volta_nvrtc or 70 in nvrtc.architectures():
        targets.append(("sm_70", True, options.volta_nvrtc))
    for target, volta, path in targets:
        for d in map(int, options.heads.split(",")):
            backward = Variant("backward", d, volta)
            parts = [backward]
            if backward.splits_keys:
                parts = [replace(backward, want_dk=False), replace(backward, want_dv=False)]
            for variant in (Variant("forward", d, volta), *parts):
                for row in rows(variant, target, path):
                    print(json.dumps({**row, "nvrtc": ".".join(map(str, nvrtc.version(path)))}))


if __name__ == "__main__":
    main()
