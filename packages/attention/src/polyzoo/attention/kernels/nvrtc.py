"""NVIDIA's run-time compiler, as torch's own wheels bring it: no toolkit is needed."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch


class CompileError(RuntimeError):
    """The compiler refused a kernel; the message holds its log."""


@cache
def library(path: str | None = None) -> ctypes.CDLL:
    """Load the compiler.

    Args:
        path: A certain `libnvrtc`; the one that belongs to this torch if left out.

    Raises:
        FileNotFoundError: There is none; the message says what to install.
    """
    found = Path(path) if path else _installed()
    if found is None:
        raise FileNotFoundError(
            "libnvrtc is not here; torch's CUDA builds bring it "
            "(pip install nvidia-cuda-nvrtc, or nvidia-cuda-nvrtc-cu12 for torch cu12x)"
        )
    return ctypes.CDLL(str(found))


def is_installed() -> bool:
    """Tell whether there is a compiler, without loading it."""
    return _installed() is not None


def version(path: str | None = None) -> tuple[int, int]:
    """Major and minor version of the compiler."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library(path), library(path).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


@cache
def architectures(path: str | None = None) -> tuple[int, ...]:
    """Compute capabilities it compiles for, as 75 for sm_75."""
    lib = library(path)
    count = ctypes.c_int()
    _check(lib, lib.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    values = (ctypes.c_int * count.value)()
    _check(lib, lib.nvrtcGetSupportedArchs(values))
    return tuple(values)


def compile_source(
    source: str, options: Sequence[str], *, cubin: bool, path: str | None = None
) -> bytes:
    """Compile CUDA C++ without any header.

    Args:
        source: One translation unit.
        options: `--gpu-architecture=compute_75` for PTX, `=sm_75` for a cubin, `-DNAME=1` ...
        cubin: Return machine code instead of PTX.
        path: As for `library`.

    Raises:
        CompileError: It does not compile.
    """
    lib = library(path)
    program = ctypes.c_void_p()
    created = lib.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"polyzoo.cu", 0, None, None
    )
    _check(lib, created)
    try:
        flags = [b"--std=c++17", *(option.encode() for option in options)]
        status = lib.nvrtcCompileProgram(
            program, len(flags), (ctypes.c_char_p * len(flags))(*flags)
        )
        if status != 0:
            log = _text(lib, program, "ProgramLog").decode(errors="replace").rstrip("\0\n")
            raise CompileError(f"NVRTC {version(path)} with {' '.join(options)}: {log}")
        return _text(lib, program, "CUBIN" if cubin else "PTX")
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def _text(lib: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(lib, lib[f"nvrtcGet{what}Size"](program, ctypes.byref(size)))
    data = ctypes.create_string_buffer(size.value)
    _check(lib, lib[f"nvrtcGet{what}"](program, data))
    return data.raw


def _check(lib: ctypes.CDLL, status: int) -> None:
    if status != 0:
        lib.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompileError(f"NVRTC: {lib.nvrtcGetErrorString(status).decode()}")


@cache
def _installed() -> Path | None:
    """The library of torch's CUDA version, from the wheels beside torch or from torch itself."""
    if torch.version.cuda is None:
        return None
    major = torch.version.cuda.split(".")[0]
    windows = sys.platform == "win32"
    pattern = f"nvrtc64_{major}*_0.dll" if windows else f"libnvrtc.so.{major}*"
    folders: list[Path] = []
    spec = importlib.util.find_spec("nvidia")
    for base in (spec.submodule_search_locations or []) if spec else []:
        for name in (f"cu{major}", "cuda_nvrtc"):
            folders += [Path(base) / name / "lib", Path(base) / name / "bin"]
    folders.append(Path(torch.__file__).parent / "lib")
    folders += [Path("/usr/local/cuda/lib64")]
    for folder in folders:
        for candidate in sorted(folder.glob(pattern)):
            if ".alt." not in candidate.name and "builtins" not in candidate.name:
                return candidate
    return None
