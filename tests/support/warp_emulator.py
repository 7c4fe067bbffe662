"""Compiles the CUDA kernels for the CPU, with a fiber per thread, and runs them on CPU tensors."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from polyzoo.attention.kernels.cuda_program import Variant, source

KERNELS = {
    "forward": ("forward_kernel",),
    "backward": ("delta_kernel", "keys_kernel", "queries_kernel"),
}


class Emulated:
    """A variant as a shared library."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        text = folder / "source.cu"
        text.write_text(source(variant.direction))
        built = folder / "kernels.so"
        macros = [*variant.macros(), f"-DBACKWARD={int(variant.direction == 'backward')}"]
        command = [
            "g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-w", *macros,
            f'-DSOURCE="{text}"', str(Path(__file__).with_suffix(".cpp")), "-o", str(built),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        self._library = ctypes.CDLL(str(built))
        self._run = self._library.run_kernel
        self._run.restype = ctypes.c_char_p

    @property
    def bank_ways(self) -> int:
        """Most different words of one bank that a pass of a read wanted so far; 1 is ideal."""
        return self._library.bank_ways()

    def start(
        self, name: str, *, blocks: int, threads: int, shared_bytes: int, call: ctypes.Structure
    ) -> None:
        """Run every block; raises where the emulator noticed a fault."""
        number = KERNELS[self.variant.direction].index(name)
        fault = self._run(number, blocks, threads, shared_bytes, ctypes.byref(call))
        if fault is not None:
            raise RuntimeError(f"{name}: {fault.decode()}")


@cache
def emulated(variant: Variant, device: torch.device) -> Emulated:
    """A variant, compiled once; takes the place of `cuda_program.load`."""
    assert device.type == "cpu"
    return Emulated(variant)
