"""Kernels through NVIDIA's driver: load machine code or PTX, start a function on torch's stream."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

import torch

_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_STATIC_LIMIT = 48 * 1024
_NO_CONTEXT = 201
_ATTRIBUTES = {"registers": 4, "local_bytes": 3, "shared_bytes": 1}


class DriverError(RuntimeError):
    """A call of the driver failed."""


@cache
def driver() -> ctypes.CDLL:
    """The driver's library."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


class Module:
    """Loaded code of one GPU."""

    def __init__(self, image: bytes, device: torch.device) -> None:
        """Load a cubin, or PTX, which the driver then compiles.

        Raises:
            DriverError: The driver refuses it.
        """
        self._module = ctypes.c_void_p()
        self._functions: dict[str, ctypes.c_void_p] = {}
        with torch.cuda.device(device):
            _make_current(device)
            loaded = driver().cuModuleLoadData(ctypes.byref(self._module), image)
            _check(loaded, "loading a kernel")

    def function(self, name: str, shared_bytes: int) -> ctypes.c_void_p:
        """A kernel by name, allowed that much shared memory."""
        made = self._functions.get(name)
        if made is None:
            made = ctypes.c_void_p()
            found = driver().cuModuleGetFunction(ctypes.byref(made), self._module, name.encode())
            _check(found, f"looking for {name}")
            if shared_bytes > _STATIC_LIMIT:
                allowed = driver().cuFuncSetAttribute(made, _SHARED_BYTES, shared_bytes)
                _check(allowed, f"{shared_bytes:,} bytes of shared memory for {name}")
            self._functions[name] = made
        return made

    def resources(self, name: str) -> dict[str, int]:
        """Registers of a thread, bytes of local memory (spills) and static shared memory."""
        value, found = ctypes.c_int(), {}
        for label, number in _ATTRIBUTES.items():
            function = self.function(name, 0)
            _check(driver().cuFuncGetAttribute(ctypes.byref(value), number, function), label)
            found[label] = value.value
        return found

    def start(
        self, name: str, *, blocks: int, threads: int, shared_bytes: int, call: ctypes.Structure
    ) -> None:
        """Start a kernel that takes one structure, on torch's current stream.

        Raises:
            DriverError: The driver refuses the start.
        """
        function = self.function(name, shared_bytes)
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(call))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        where = (blocks, 1, 1, threads, 1, 1, shared_bytes, stream, parameters, None)
        started = driver().cuLaunchKernel(function, *where)
        if started == _NO_CONTEXT:  # a thread of autograd that has not touched the GPU yet
            _make_current(torch.device("cuda"))
            started = driver().cuLaunchKernel(function, *where)
        _check(started, f"starting {name}")


def _make_current(device: torch.device) -> None:
    """A thread that has not used the GPU yet has no context; torch's is the primary one."""
    context = ctypes.c_void_p()
    _check(driver().cuCtxGetCurrent(ctypes.byref(context)), "asking for the context")
    if context.value is None:
        index = torch.cuda.current_device() if device.index is None else device.index
        retained = driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), index)
        _check(retained, "taking the context")
        _check(driver().cuCtxSetCurrent(context), "setting the context")


def _check(status: int, doing: str) -> None:
    if status == 0:
        return
    text = ctypes.c_char_p()
    driver().cuGetErrorString(status, ctypes.byref(text))
    reason = text.value.decode() if text.value else f"error {status}"
    raise DriverError(f"{doing}: {reason}")
