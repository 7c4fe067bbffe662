"""Whether this machine can run every strategy, and what to do where it cannot."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from polyzoo.training.drive import check_drive, file_system
from polyzoo.training.errors import TrainingError
from polyzoo.training.strategies import host_adamw

if TYPE_CHECKING:
    from polyzoo.training.cli import DoctorConfig

State = Literal["good", "warning", "missing"]
LIBAIO = (
    "Debian, Ubuntu: apt-get install libaio-dev; Fedora: dnf install libaio-devel. Without root: "
    "apt-get download libaio1 libaio-dev (libaio1t64 on newer systems), dpkg -x each to a "
    "folder D, then set CPATH=D/usr/include, and LIBRARY_PATH and LD_LIBRARY_PATH to "
    "D/usr/lib/x86_64-linux-gnu"
)
_SHARED = "/dev/shm"  # noqa: S108 - looked at, not written to
_OPS = ("PinMemoryBuilder", "AsyncIOBuilder")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing looked at."""

    what: str
    state: State
    seen: str
    needed_for: str = ""
    fix: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorReport:
    """What `polyzoo training doctor` prints."""

    findings: list[Finding]

    @property
    def exit_code(self) -> int:
        """1 where something is missing, else 0."""
        return int(any(finding.state == "missing" for finding in self.findings))


def examine(config: DoctorConfig) -> DoctorReport:
    """Look at compilers, libraries, limits and the drive; build what is asked for."""
    findings = [
        _gpu(), _compiler(), _python_headers(), _deepspeed(), _ninja(), _libaio(),
        _architectures(), _memlock(), _shared_memory(),
    ]  # fmt: skip
    if config.nvme_path is not None:
        findings.append(_drive(config.nvme_path))
    if config.build:
        findings.append(_host_step())
        findings += [_operator(name, config.timeout) for name in _OPS if _has("deepspeed")]
        if config.nvme_path is not None and _has("deepspeed"):
            findings.append(_round_trip(config.nvme_path, config.timeout))
    return DoctorReport(findings=findings)


def _has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _gpu() -> Finding:
    count = torch.cuda.device_count()
    seen = f"{count} x {torch.cuda.get_device_name(0)}" if count else "none"
    return Finding(
        what="GPU", state="good" if count else "warning", seen=seen,
        fix="" if count else "every strategy runs on the CPU, too, for tests",
    )  # fmt: skip


def _compiler() -> Finding:
    program = shutil.which(os.environ.get("CXX") or "g++")
    return Finding(
        what="C++ compiler", state="good" if program else "missing", seen=program or "none",
        needed_for="zero3-opt-cpu, zero3-cpu, zero3-opt-nvme, zero3-nvme",
        fix="" if program else "Debian, Ubuntu: apt-get install g++",
    )  # fmt: skip


def _python_headers() -> Finding:
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    there = header.is_file()
    return Finding(
        what="Python headers", state="good" if there else "warning", seen=str(header),
        needed_for="the nvme strategies", fix="" if there else "apt-get install python3-dev",
    )  # fmt: skip


def _deepspeed() -> Finding:
    if not _has("deepspeed"):
        return Finding(
            what="DeepSpeed", state="missing", seen="not installed",
            needed_for="the zero3 strategies",
            fix='pip install "polyzoo-training[deepspeed]"',
        )  # fmt: skip
    version = metadata.version("deepspeed")
    known = version.startswith("0.19.")
    return Finding(
        what="DeepSpeed", state="good" if known else "missing", seen=version,
        needed_for="the zero3 strategies",
        fix="" if known else 'pip install "deepspeed>=0.19,<0.20"',
    )  # fmt: skip


def _ninja() -> Finding:
    there = _has("ninja") or shutil.which("ninja") is not None
    return Finding(
        what="ninja", state="good" if there else "warning", seen="found" if there else "none",
        needed_for="the nvme strategies", fix="" if there else "pip install ninja",
    )  # fmt: skip


def find_libaio() -> tuple[bool, bool]:
    """Tell whether libaio's header and its library are found as a compiler would find them."""
    paths = [*os.environ.get("CPATH", "").split(":"), "/usr/include", "/usr/local/include"]
    header = any((Path(path) / "libaio.h").is_file() for path in paths if path)
    folders = os.environ.get("LIBRARY_PATH", "").split(":")
    own = any(list(Path(folder).glob("libaio.so*")) for folder in folders if folder)
    return header, own or ctypes.util.find_library("aio") is not None


def check_libaio() -> None:
    """Refuse to go on without libaio; DeepSpeed's own message gives no hint.

    Raises:
        TrainingError: E-AIO-LIB.
    """
    header, library = find_libaio()
    if not (header and library):
        raise TrainingError(
            "E-AIO-LIB",
            "the nvme strategies need libaio",
            f"header libaio.h {'found' if header else 'not found'}, "
            f"library {'found' if library else 'not found'}",
            LIBAIO,
        )


def _libaio() -> Finding:
    header, library = find_libaio()
    there = header and library
    return Finding(
        what="libaio", state="good" if there else "warning",
        seen=f"header {'yes' if header else 'no'}, library {'yes' if library else 'no'}",
        needed_for="the nvme strategies", fix="" if there else LIBAIO,
    )  # fmt: skip


def _architectures() -> Finding:
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    letters = any(part.rstrip("+PTX")[-1:].isalpha() for part in given.replace(" ", ";").split(";"))
    return Finding(
        what="TORCH_CUDA_ARCH_LIST", state="warning" if letters else "good",
        seen=given or "not set", needed_for="DeepSpeed's operators",
        fix="its letters are taken away for DeepSpeed, which cannot read them" if letters else "",
    )  # fmt: skip


def _memlock() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    free = soft == resource.RLIM_INFINITY
    seen = "unlimited" if free else f"{soft / 2**20:,.0f} MiB"
    # Registration through the CUDA driver is not bound by it; DeepSpeed's drive buffers are.
    return Finding(
        what="locked memory (ulimit -l)", state="good" if free or soft >= 2**33 else "warning",
        seen=seen, needed_for="page-locked buffers of the nvme strategies",
        fix="" if free or soft >= 2**33 else
        "raise memlock in /etc/security/limits.conf, or set tier.pin_memory to false",
    )  # fmt: skip


def _shared_memory() -> Finding:
    try:
        size = shutil.disk_usage(_SHARED).total
    except OSError:
        size = 0
    good = size >= 2**29
    return Finding(
        what=_SHARED, state="good" if good else "warning", seen=f"{size / 2**20:,.0f} MiB",
        needed_for="loader processes and NCCL",
        fix="" if good else "start the container with --shm-size=8g",
    )  # fmt: skip


def _drive(folder: Path) -> Finding:
    try:
        check_drive(folder)
    except TrainingError as error:
        return Finding(
            what=f"drive {folder}", state="missing", seen=error.why,
            needed_for="the nvme strategies", fix=error.fix,
        )  # fmt: skip
    kind = file_system(folder)
    free = shutil.disk_usage(folder).free
    slow = kind in ("overlay", "tmpfs")
    return Finding(
        what=f"drive {folder}", state="warning" if slow else "good",
        seen=f"{kind}, {free / 2**30:,.0f} GiB free", needed_for="the nvme strategies",
        fix=f"{kind} is not a drive of its own" if slow else "",
    )  # fmt: skip


def _host_step() -> Finding:
    begun = time.perf_counter()
    try:
        path = host_adamw.build()
    except TrainingError as error:
        return Finding(what="host optimizer", state="missing", seen=error.why, fix=error.fix)
    spent = time.perf_counter() - begun
    return Finding(what="host optimizer", state="good", seen=f"{path} ({spent:.1f} s)")


def _operator(name: str, minutes: float) -> Finding:
    """Compile one of DeepSpeed's operators once, so that a run's processes find it there."""
    code = (
        "from polyzoo.training.strategies.zero3 import import_deepspeed; import torch; "
        "import_deepspeed(torch.device('cuda' if torch.cuda.is_available() else 'cpu')); "
        "from deepspeed.accelerator import get_accelerator; "
        f"get_accelerator().create_op_builder({name!r}).load()"
    )
    return _child(f"operator {name.removesuffix('Builder')}", code, minutes)


def _round_trip(folder: Path, minutes: float) -> Finding:
    """Write and read back through DeepSpeed's drive operator."""
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        code = (
            "import torch; from polyzoo.training.strategies.zero3 import import_deepspeed; "
            "import_deepspeed(torch.device('cuda' if torch.cuda.is_available() else 'cpu')); "
            "from deepspeed.accelerator import get_accelerator; "
            "aio = get_accelerator().create_op_builder('AsyncIOBuilder').load(); "
            "handle = aio.aio_handle(1 << 20, 8, False, True, 1); "
            "a = torch.arange(1 << 20, dtype=torch.int32); b = torch.zeros_like(a); "
            f"f = {str(Path(inside) / 'probe')!r}; "
            "handle.sync_pwrite(a, f, 0); handle.sync_pread(b, f, 0); assert torch.equal(a, b)"
        )
        return _child(f"round trip on {folder}", code, minutes)


def _child(what: str, code: str, minutes: float) -> Finding:
    begun = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True, text=True, timeout=minutes * 60, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Finding(
            what=what, state="missing", seen=f"no end after {minutes:g} minutes",
            fix="another process may be compiling: remove stale locks in TORCH_EXTENSIONS_DIR",
        )  # fmt: skip
    spent = time.perf_counter() - begun
    if done.returncode:
        tail = " | ".join(done.stderr.strip().splitlines()[-5:])
        return Finding(what=what, state="missing", seen=tail[-600:], fix="see the lines above")
    return Finding(what=what, state="good", seen=f"works ({spent:.1f} s)")


def render(report: DoctorReport) -> str:
    """Return the findings as text for people."""
    lines: list[str] = []
    for finding in report.findings:
        purpose = f" (for {finding.needed_for})" if finding.needed_for else ""
        lines.append(f"{finding.state:<8} {finding.what}: {finding.seen}{purpose}")
        if finding.fix:
            lines.append(f"         {finding.fix}")
    return "\n".join(lines)
