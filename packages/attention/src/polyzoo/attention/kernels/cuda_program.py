"""Our CUDA C++ kernels: which variants there are, and how one is compiled, kept and loaded."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal, Protocol

import torch

from polyzoo.attention.kernels import nvrtc
from polyzoo.attention.kernels.cuda_driver import Module
from polyzoo.core.io import atomic_write
from polyzoo.core.log import get_logger

logger = get_logger(__name__)
HEAD_DIM_LIMIT = 128
_WARPS = 4
_VOLTA, _TURING = 70, 75
_SOURCES = {
    "forward": ("fragments.cu", "blocks.cu", "forward.cu"),
    "backward": ("fragments.cu", "blocks.cu", "backward.cu"),
}


@dataclass(frozen=True, slots=True)
class Variant:
    """What a kernel is specialised for."""

    direction: Literal["forward", "backward"]
    d: int
    """Channels of a head: a multiple of 8 up to 128."""
    volta: bool
    """m8n8k4 instead of m16n8k8."""
    has_left: bool = False
    has_right: bool = False
    kv_lens: bool = False
    packed: bool = False
    want_dk: bool = True
    want_dv: bool = True

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * _WARPS

    @property
    def block_rows(self) -> int:
        """Queries (or keys, in the pass over keys) of a block."""
        return _WARPS * (32 if self.volta else 16)

    # What follows keeps every variant within 255 registers without spills (the tests compile them).

    @property
    def stage(self) -> int:
        """Rows brought to shared memory at once."""
        if self.direction == "forward":
            return 64 if self.d <= 96 else 32
        return 64 if self.d <= 80 and not self.volta else 32

    @property
    def step(self) -> int:
        """Keys of a step of the forward pass."""
        return 64 if self.d <= 72 and not self.volta else 32

    @property
    def keep_rows(self) -> bool:
        """Whether a warp's own rows stay in shared memory instead of registers."""
        if self.volta:
            return self.direction == "backward" or self.d > 72
        return self.direction == "backward" and self.d > 72

    @property
    def prefetch(self) -> bool:
        """Whether the next stage is fetched while this one is used."""
        return not (self.volta and self.d > (96 if self.direction == "forward" else 72))

    @property
    def splits_keys(self) -> bool:
        """Whether dK and dV need a pass each: both sums at once exceed the registers."""
        return self.d > (48 if self.volta else 96)

    def shared_bytes(self, kernel: str) -> int:
        """Shared memory of a block."""
        row = (self.d // 8 | 1) * 16
        if kernel == "delta_kernel":
            return 0
        if kernel == "keys_kernel":
            return (2 * self.block_rows + 2 * self.stage) * row + 8 * self.stage
        own = 2 if self.direction == "backward" else 1
        if self.keep_rows:
            return (own * self.block_rows + 2 * self.stage) * row
        return max(2 * self.stage, self.block_rows) * row

    def macros(self) -> Iterator[str]:
        """The variant as the compiler's options."""
        values = {
            "D": self.d,
            "VOLTA": int(self.volta),
            "WARPS": _WARPS,
            "STAGE": self.stage,
            "STEP": self.step,
            "PREFETCH": int(self.prefetch),
            "KEEP_ROWS": int(self.keep_rows),
            "HAS_LEFT": int(self.has_left),
            "HAS_RIGHT": int(self.has_right),
            "KVLENS": int(self.kv_lens),
            "PACKED": int(self.packed),
            "WANT_DK": int(self.want_dk),
            "WANT_DV": int(self.want_dv),
        }
        return (f"-D{name}={value}" for name, value in values.items())


class Program(Protocol):
    """Something that runs a variant's kernels."""

    def start(
        self, name: str, *, blocks: int, threads: int, shared_bytes: int, call: ctypes.Structure
    ) -> None:
        """Start one of them with its one argument."""
        ...


@cache
def source(direction: str) -> str:
    """The translation unit of one direction."""
    folder = Path(__file__).parent
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in _SOURCES[direction])


def compile_variant(variant: Variant, *, target: str, path: str | None = None) -> bytes:
    """Compile, or take what was compiled before from the user's cache folder.

    Args:
        variant: What for.
        target: `sm_75` for machine code, `compute_75` for PTX.
        path: A certain compiler, see `nvrtc.library`.
    """
    options = (f"--gpu-architecture={target}", *variant.macros())
    text = source(variant.direction)
    key = repr((nvrtc.version(path), options, text))
    file = _folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin"
    try:
        return file.read_bytes()
    except OSError:
        pass
    image = nvrtc.compile_source(text, options, cubin=target.startswith("sm_"), path=path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file, "wb") as out:
            out.write(image)
    except OSError as error:
        logger.warning("compiled kernels cannot be kept in %s: %s", file.parent, error)
    return image


def is_volta(capability: tuple[int, int]) -> bool:
    """Tell whether a GPU has the first tensor cores, which only do m8n8k4."""
    return capability < (7, 5)


def target_for(capability: tuple[int, int], *, volta: bool) -> str:
    """What to compile for: machine code of these GPUs; PTX on newer ones.

    Volta's PTX needs a compiler that knows sm_70 (12.x); newer ones take the same products for
    sm_75 PTX, which is enough to run them on newer GPUs.
    """
    if (7, 0) <= capability <= (7, 5):
        return f"sm_{capability[0]}{capability[1]}"
    return f"compute_{_VOLTA if volta and _VOLTA in nvrtc.architectures() else _TURING}"


def unavailable_for(capability: tuple[int, int]) -> str | None:
    """Say why the kernels cannot be compiled for a GPU, or return None."""
    if is_volta(capability) and _VOLTA not in nvrtc.architectures():
        major, minor = nvrtc.version()
        return (
            f"the compiler of this torch (NVRTC {major}.{minor}) dropped sm_{capability[0]}"
            f"{capability[1]}; install torch from the cu126 index"
        )
    return None


@lru_cache(maxsize=512)
def load(variant: Variant, device: torch.device) -> Program:
    """Compile and load a variant on a GPU; once per process."""
    target = target_for(torch.cuda.get_device_capability(device), volta=variant.volta)
    return Module(compile_variant(variant, target=target), device)


def _folder() -> Path:
    home = os.environ.get("POLYZOO_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "polyzoo") / "attention-cuda"
