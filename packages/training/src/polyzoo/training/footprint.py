"""How much memory this process and its machine use."""

from __future__ import annotations

from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def process_bytes(*, peak: bool = True) -> int | None:
    """Return the process's resident memory, at its highest or now; None where the OS is mute."""
    return _field(_STATUS, "VmHWM" if peak else "VmRSS")


def total_bytes() -> int | None:
    """Return the memory this process may use: the machine's, or its container's if that is less."""
    total = _field(_MEMINFO, "MemTotal")
    limits = [limit for path in _CGROUP_LIMITS if (limit := _whole_number(path))]
    known = [size for size in (total, *limits) if size]
    return min(known) if known else None


def available_bytes() -> int | None:
    """Return the machine's memory that is free or can be freed at once."""
    return _field(_MEMINFO, "MemAvailable")


def memory_report(device: torch.device) -> dict[str, float]:
    """Return peak bytes on the GPU and in host memory, as far as they are known."""
    report: dict[str, float] = {}
    if device.type == "cuda":
        report["memory_bytes"] = torch.cuda.max_memory_allocated(device)
    host = process_bytes()
    if host is not None:
        report["host_bytes"] = host
    return report


def _field(path: Path, name: str) -> int | None:
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _whole_number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
