"""AdamW in host memory, in one pass: compiled at first use with g++, in about a second."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyzoo.core.io import atomic_path
from polyzoo.training.errors import TrainingError
from polyzoo.training.strategies.hostmemory import HostMemory

_SOURCE = Path(__file__).with_name("host_adamw.cpp")
# No -ffast-math: it would let sums be reordered and NaN be assumed away.
_FLAGS = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_COMPILER_LINES_SHOWN = 20


def cache_folder() -> Path:
    """Return where compiled code is kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "polyzoo" / "training"


def _machine_flags() -> tuple[str, ...]:
    if platform.machine() in ("x86_64", "AMD64"):
        return ("-march=native", "-mprefer-vector-width=512")
    return ("-mcpu=native",)


def build(folder: Path | None = None, compiler: str | None = None) -> Path:
    """Compile the update for this machine, once, and return the library.

    Raises:
        TrainingError: E-OP-BUILD with the compiler's last lines.
    """
    folder = cache_folder() if folder is None else folder
    program = compiler or os.environ.get("CXX") or "g++"
    found = shutil.which(program)
    if found is None:
        raise _build_error(f"{program} is not on the PATH")
    flags = (*_FLAGS, *_machine_flags())
    # Tuned for this processor: a cache on a shared home must not serve another one.
    text = _SOURCE.read_text(encoding="utf-8") + repr((found, flags, _processor()))
    path = folder / f"host_adamw-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.so"
    if path.is_file():
        return path
    with atomic_path(path) as temporary:
        done = subprocess.run(
            [found, *flags, "-x", "c++", str(_SOURCE), "-o", str(temporary)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            lines = done.stderr.strip().splitlines()[-_COMPILER_LINES_SHOWN:]
            raise _build_error("\n".join([f"{program} says:", *lines]))
    return path


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _build_error(why: str) -> TrainingError:
    return TrainingError(
        "E-OP-BUILD",
        "the host's optimizer step could not be compiled",
        f"{why}\n  cache: {cache_folder()}",
        "install a C++ compiler (Debian, Ubuntu: apt-get install g++), or use a strategy without "
        "offload",
    )


@cache
def _library(path: Path) -> Callable[..., None]:
    function = ctypes.CDLL(str(path)).polyzoo_adamw
    pointer, number = ctypes.c_void_p, ctypes.c_float
    function.argtypes = [
        pointer, pointer, pointer, pointer, ctypes.c_int, pointer, ctypes.c_int, ctypes.c_size_t,
        *[number] * 8, ctypes.c_int,
    ]  # fmt: skip
    function.restype = None
    return function


class HostAdamW(torch.optim.Optimizer):
    """AdamW of flat fp32 tensors in host memory.

    Example:
        >>> optimizer = HostAdamW([weights], lr=1e-3, threads=16)
        >>> optimizer.update(weights, gradients, group=optimizer.param_groups[0])
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        threads: int = 1,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.threads = threads
        self.memory = HostMemory()
        self._update = _library(build())

    def state_of(self, weights: Tensor) -> dict[str, Any]:
        """Return the moments and the step count of a tensor, made where they are missing."""
        state = self.state[weights]
        if "exp_avg" not in state:
            # Pages not touched yet read as zeros; the threads of the first step place them.
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = self.memory.empty(weights.numel(), weights.dtype, pinned=False)
        state.setdefault("step", 0)
        return state

    @torch.no_grad()
    def update(
        self,
        weights: Tensor,
        gradients: Tensor,
        *,
        group: dict[str, Any],
        scale: float = 1.0,
        copy: Tensor | None = None,
    ) -> None:
        """Take one step.

        Args:
            weights: Flat, fp32.
            gradients: Flat, fp32 or bf16.
            group: Its lr, betas, eps and weight_decay are used.
            scale: What the gradients are multiplied by first.
            copy: Takes the new weights in fp32 or bf16; may be `gradients` itself.
        """
        state = self.state_of(weights)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        held = [weights, mean, square, gradients, *([] if copy is None else [copy])]
        if not all(t.is_contiguous() and t.device.type == "cpu" for t in held):
            raise ValueError("the host's step takes contiguous tensors in host memory")
        if len({t.numel() for t in held}) > 1 or weights.dtype != torch.float32:
            raise ValueError("weights, moments and gradients must be of one length, weights fp32")
        self._update(
            weights.data_ptr(), mean.data_ptr(), square.data_ptr(),
            gradients.data_ptr(), _KINDS[gradients.dtype],
            None if copy is None else copy.data_ptr(), 0 if copy is None else _KINDS[copy.dtype],
            weights.numel(), group["lr"], beta1, beta2, group["eps"], group["weight_decay"],
            1 - beta1 ** state["step"], 1 - beta2 ** state["step"], scale, self.threads,
        )  # fmt: skip

    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step with every parameter's own gradient."""
        if closure is not None:
            raise ValueError("closure: gradients must be there already")
        for group in self.param_groups:
            for weights in group["params"]:
                if weights.grad is not None:
                    self.update(weights, weights.grad, group=group)
