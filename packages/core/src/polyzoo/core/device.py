"""From the names people type to torch devices and dtypes; never a silent second choice."""

from __future__ import annotations

import torch

from polyzoo.core.errors import ConfigError

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """Return the device a name stands for, checked to exist.

    Args:
        name: "auto" (the current CUDA device, else Apple's, else the CPU), "cpu", "cuda", "cuda:1",
            "mps".

    Raises:
        ConfigError: The machine has no such device.
    """
    if isinstance(name, str) and name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device={name!r}: use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available():
            raise ConfigError(
                f"device={str(name)!r}: this machine shows no CUDA device; use cpu or auto"
            )
        if device.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        if device.index >= count:
            raise ConfigError(
                f"device={str(name)!r}: there are {count} CUDA devices, 0 to {count - 1}"
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device={str(name)!r}: there is no MPS device; use cpu or auto")
    elif device.type not in ("cpu", "mps", "meta"):
        raise ConfigError(f"device={str(name)!r}: use auto, cpu, cuda, cuda:N or mps")
    return device


def resolve_dtype(
    name: str | torch.dtype | None = "auto", device: str | torch.device = "cpu"
) -> torch.dtype:
    """Return the dtype a name stands for, checked against the device.

    Args:
        name: "auto" or None (bfloat16 on a GPU that computes in it, float16 on an older one,
            float32 elsewhere), "float32", "float16", "bfloat16", their short forms,
            or a torch dtype.
        device: Where the numbers will live.
    """
    device = torch.device(device)
    if isinstance(name, torch.dtype):
        return name
    if name is None or name == "auto":
        if device.type != "cuda":
            return torch.float32
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float16
    if name not in DTYPES:
        raise ConfigError(f"dtype={name!r}: use auto, {', '.join(DTYPES)}")
    return DTYPES[name]
