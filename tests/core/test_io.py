"""Files and folders appear whole or not at all; locks name their holder; errors say what to do."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from polyzoo.core.errors import LockedError, PolyzooError
from polyzoo.core.io import (
    FolderLock,
    atomic_folder,
    atomic_path,
    atomic_write,
    fsync_folder,
    remove_stale,
    sha256_file,
)
from support.cli import child_environment, run_python


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(".tmp"))


def test_write_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.txt"
    for text in ("one", "zwölf"):
        with atomic_write(path, "w") as file:
            file.write(text)
            assert not path.exists() or path.read_text("utf-8") == "one"
        assert path.read_text("utf-8") == text
    assert leftovers(path.parent) == []


def test_an_error_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="half way"), atomic_write(path) as file:
        file.write(b"new")
        raise RuntimeError("half way")
    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_a_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    blob, link = tmp_path / "blob", tmp_path / "link"
    blob.write_text("shared")
    link.symlink_to(blob)
    with atomic_write(link, "w") as file:
        file.write("mine")
    assert blob.read_text() == "shared"
    assert not link.is_symlink()


def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    plain, atomic = tmp_path / "plain", tmp_path / "atomic"
    plain.write_text("")
    with atomic_write(atomic, "w"):
        pass
    assert atomic.stat().st_mode == plain.stat().st_mode


def test_only_fresh_writing_is_offered(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'ab' must be 'w' or 'wb'"), atomic_write(tmp_path, "ab"):
        pass


def test_errors_about_the_target_name_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(PolyzooError, match=r"file/a\.txt cannot be written: "),
        atomic_write(tmp_path / "file" / "a.txt"),
    ):
        pass


def test_errors_of_the_body_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"), atomic_write(tmp_path / "out") as file:
        file.write((tmp_path / "absent").read_bytes())


LIMITED = """
import resource, sys
from pathlib import Path
from polyzoo.core.errors import PolyzooError
from polyzoo.core.io import atomic_folder, atomic_write
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
path = Path(sys.argv[1])
try:
    if sys.argv[2] == "file":
        with atomic_write(path) as file:
            file.write(bytes(1_000_000))
    elif sys.argv[2] == "folder":
        with atomic_folder(path, replace=True) as folder:
            (folder / "big").write_bytes(bytes(1_000_000))
    else:
        import torch
        from polyzoo.core.weights import write_weights
        write_weights(path, {"a": torch.zeros(250_000)})
except PolyzooError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["file", "folder", "weights"])
def test_a_full_disk_keeps_the_old_and_says_so(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    old = target / "old" if kind == "folder" else target
    old.parent.mkdir(exist_ok=True)
    old.write_text("old")
    done = run_python(LIMITED, str(target), kind)
    assert done.returncode == 0, done.stderr
    assert "the file size limit was reached after" in done.stdout
    assert str(target) in done.stdout
    assert "bytes are free" in done.stdout
    assert old.read_text() == "old"
    assert leftovers(tmp_path) == []


def test_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "folder"
    with atomic_folder(target) as folder:
        (folder / "x").write_text("x")
        assert not target.exists()
    assert (target / "x").read_text() == "x"
    with pytest.raises(PolyzooError, match="already exists"), atomic_folder(target):
        pass


def test_folder_replaces_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(target, replace=True) as folder:
        (folder / "new").write_text("new")
        raise KeyboardInterrupt
    assert [path.name for path in target.iterdir()] == ["old"]
    with atomic_folder(target, replace=True) as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


def test_a_reader_always_finds_a_whole_folder(tmp_path: Path) -> None:
    """Replace in a child process as fast as it can; the folder is never missing."""
    target = tmp_path / "folder"
    code = (
        "import sys\nfrom pathlib import Path\nfrom polyzoo.core.io import atomic_folder\n"
        "for i in range(10**9):\n"
        "    with atomic_folder(Path(sys.argv[1]), replace=True) as folder:\n"
        "        for name in 'ab':\n            (folder / name).write_text(str(i))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(target)], env=child_environment())
    try:
        deadline = time.monotonic() + 20
        while not target.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        seen = set()
        while len(seen) < 20:
            assert time.monotonic() < deadline
            assert target.is_dir()
            with suppress(FileNotFoundError):  # the folder just opened may be removed meanwhile
                seen.add((target / "a").read_text())
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()


def test_lock_names_its_holder_and_is_freed_by_death(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom polyzoo.core.io import FolderLock\n"
        "with FolderLock(sys.argv[1], purpose='indexing'):\n"
        "    print('held', flush=True)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env=child_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    with holder.stdout:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(LockedError, match=rf"process {holder.pid} \(indexing\)"),
            FolderLock(tmp_path, purpose="reading"),
        ):
            pass
        holder.kill()
        holder.wait()
    with FolderLock(tmp_path, purpose="reading"):
        pass


def test_lock_excludes_within_a_process_and_opens_again(tmp_path: Path) -> None:
    with (
        FolderLock(tmp_path / "new", purpose="one"),
        pytest.raises(LockedError, match=r"one"),
        FolderLock(tmp_path / "new", purpose="two"),
    ):
        pass
    with FolderLock(tmp_path / "new", purpose="two"):
        pass


def test_lock_is_freed_though_a_forked_child_lives_on(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\nfrom polyzoo.core.io import FolderLock\n"
        "with FolderLock(sys.argv[1], purpose='parent'):\n"
        "    child = os.fork()\n"
        "    if not child:\n        time.sleep(30); os._exit(0)\n"
        "with FolderLock(sys.argv[1], purpose='again'):\n    print('again')\n"
        "os.kill(child, 9)\n"
    )
    done = run_python(code, str(tmp_path))
    assert done.stdout == "again\n", done.stderr


def test_stale_temporaries_are_removed_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "x") as temporary:
        stale_name = temporary.name
        _ = 1 / 0
    (tmp_path / stale_name).write_text("killed")
    (tmp_path / ".x.123-ab.tmp").mkdir()
    (tmp_path / ".x.123-ab.tmp" / "part").write_text("killed")
    (tmp_path / "x").write_text("whole")
    (tmp_path / ".y.123-ab.tmp").write_text("another's")
    remove_stale(tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".y.123-ab.tmp", "x"]


def test_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9999
    (tmp_path / "a").write_bytes(data)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()
    fsync_folder(tmp_path)
