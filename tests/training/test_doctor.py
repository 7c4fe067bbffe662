"""What is looked at before a run, and how it is said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from polyzoo.training.cli import DoctorConfig, ProbeConfig
from polyzoo.training.doctor import check_libaio, examine, find_libaio, render
from polyzoo.training.drive import check_drive, file_system
from polyzoo.training.errors import TrainingError
from polyzoo.training.probe import describe, measure, probe, remembered
from polyzoo.training.probe import render as render_machine
from polyzoo.training.watchdog import ending_when_stuck
from support.forks import Fork
from support.ranks import together


def test_a_good_drive(tmp_path: Path) -> None:
    check_drive(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    assert file_system(tmp_path)


def test_too_small_a_drive(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"(?s)E-NVME-SPACE.*bytes are needed.*zero3-cpu"):
        check_drive(tmp_path, needed=10**18)


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/sys").is_dir(), reason="needs /proc")
def test_a_drive_that_cannot_be_written() -> None:
    with pytest.raises(TrainingError, match="E-NVME-PATH"):
        check_drive(Path("/proc/sys/kernel/offload"))


def test_libaio_is_found_where_the_compiler_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "libaio.h").touch()
    (tmp_path / "libaio.so.1").touch()
    monkeypatch.setenv("CPATH", str(tmp_path))
    monkeypatch.setenv("LIBRARY_PATH", str(tmp_path))
    assert find_libaio() == (True, True)
    check_libaio()


def test_without_libaio_the_message_says_how_to_get_it(tmp_path: Path) -> None:
    if Path("/usr/include/libaio.h").exists():
        pytest.skip("libaio is installed for everybody here")

    def look() -> None:
        for name in ("CPATH", "LIBRARY_PATH", "LD_LIBRARY_PATH"):
            os.environ.pop(name, None)
        check_libaio()

    fork = Fork(look, tmp_path / "stderr")
    assert fork.wait() == 1
    assert "E-AIO-LIB" in fork.errors()
    assert "apt-get install libaio-dev" in fork.errors()
    assert "dpkg -x" in fork.errors()


def test_the_doctors_table(tmp_path: Path) -> None:
    report = examine(DoctorConfig(nvme_path=tmp_path, build=False))
    text = render(report)
    for what in ("C++ compiler", "DeepSpeed", "libaio", "locked memory", f"drive {tmp_path}"):
        assert what in text
    missing = [finding for finding in report.findings if finding.state == "missing"]
    assert report.exit_code == int(bool(missing))
    assert all(finding.fix for finding in missing)


def test_the_machine_is_measured_and_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert remembered() is None
    spec = probe(ProbeConfig(nvme_path=tmp_path, drive_test_mib=16))
    assert remembered() == spec
    assert spec.drive_write > 1e6
    assert spec.drive_read > 1e6
    assert spec.host_memory > 1e8
    assert spec.host_bytes > 2**30
    assert "GB/s" in render_machine(spec)
    again = describe(tmp_path)
    assert (again.drive_write, again.host_memory) == (spec.drive_write, spec.host_memory)
    assert measure(drive=None, drive_test_bytes=0).drive_bytes == 0


def test_a_stuck_process_says_where_and_ends(tmp_path: Path) -> None:
    def wait_for_ever() -> None:
        import time

        with ending_when_stuck(0.5 / 60) as watchdog:
            watchdog.beat("reading of data")
            time.sleep(60)

    fork = Fork(wait_for_ever, tmp_path / "stderr")
    assert fork.wait(20) == 1


def test_work_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    def work(_: int) -> str:
        import time

        with ending_when_stuck(1.0 / 60) as watchdog:
            for _ in range(15):
                time.sleep(0.1)
                watchdog.beat("forward pass")
        return "done"

    assert together(work, 1, tmp_path) == ["done"]
