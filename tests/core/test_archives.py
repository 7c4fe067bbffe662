"""Archives unpack whole or not at all, and nothing gets out of the folder."""

from __future__ import annotations

import io
import random
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from polyzoo.core.archives import Limits, extract
from polyzoo.core.errors import DataError, PolyzooError

FILES = {"a.txt": b"a", "deep/er/b.bin": bytes(1000), "deep/c.txt": "zwölf".encode()}


def zipped(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.mkdir("deep")
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tarred(path: Path, files: dict[str, bytes], *extra: tarfile.TarInfo) -> Path:
    kind = {".tar": "", ".gz": "gz", ".bz2": "bz2", ".xz": "xz"}[path.suffix]
    with tarfile.open(path, f"w:{kind}") as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o777
            archive.addfile(info, io.BytesIO(data))
        for info in extra:
            archive.addfile(info)
    return path


def unpacked(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("name", ["a.zip", "a.whl", "a.tar", "a.tar.gz", "a.tar.bz2", "a.tar.xz"])
def test_every_format_comes_out_as_it_went_in(tmp_path: Path, name: str) -> None:
    make = zipped if name.endswith((".zip", ".whl")) else tarred
    folder = extract(make(tmp_path / name, FILES), tmp_path / "new" / "out")
    assert unpacked(folder) == FILES
    assert not any(p.stat().st_mode & stat.S_IXUSR for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_only_what_is_wanted_comes_out(tmp_path: Path, name: str) -> None:
    make = zipped if name.endswith(".zip") else tarred
    archive = make(tmp_path / name, FILES)
    assert unpacked(extract(archive, tmp_path / "o", only=["deep/c.txt"])).keys() == {"deep/c.txt"}
    with pytest.raises(DataError, match=r"holds no file 'x\.txt'"):
        extract(archive, tmp_path / "p", only=["x.txt", "a.txt"])
    assert not (tmp_path / "p").exists()


def test_the_target_must_be_new(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", FILES)
    (tmp_path / "out").mkdir()
    with pytest.raises(PolyzooError, match="out already exists"):
        extract(archive, tmp_path / "out")


BAD_NAMES = ["../x", "/etc/x", "a/../../x", "..", "a\\..\\x", "C:/x", "a" * 2000, "."]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("kind", ["a.zip", "a.tar"])
def test_paths_out_of_the_folder_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    make = zipped if kind == "a.zip" else tarred
    archive = make(tmp_path / kind, {"fine": b"", name: b"x"})
    with pytest.raises(DataError, match=r"leads out of the folder|is not a portable file name"):
        extract(archive, tmp_path / "out" / "in")
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [kind]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("odd")
    info.type, info.linkname = kind, "/etc/passwd"
    with pytest.raises(DataError, match="'odd' is a link or a device"):
        extract(tarred(tmp_path / "a.tar", {"fine": b"x"}, info), tmp_path / "out")


def test_links_in_zips_are_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("odd")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match="'odd' is a link or a device"):
        extract(tmp_path / "a.zip", tmp_path / "out")


@pytest.mark.filterwarnings("ignore:Duplicate name")  # that is what we make here
@pytest.mark.parametrize("kind", ["a.zip", "a.tar"])
def test_twins_are_refused(tmp_path: Path, kind: str) -> None:
    if kind == "a.zip":
        with zipfile.ZipFile(tmp_path / kind, "w") as archive:
            archive.writestr("a", "1")
            archive.writestr("a", "2")
    else:
        tarred(tmp_path / kind, {"a": b"1", "./a": b"2"})
    with pytest.raises(DataError, match="is there twice"):
        extract(tmp_path / kind, tmp_path / "out")


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.tar.xz"])
def test_bombs_do_not_go_off(tmp_path: Path, name: str) -> None:
    make = zipped if name.endswith(".zip") else tarred
    archive = make(tmp_path / name, {"zeros": bytes(20_000_000)})
    with pytest.raises(DataError, match="unpacks to more than"):
        extract(archive, tmp_path / "out", limits=Limits(ratio=10))
    with pytest.raises(DataError, match="unpacks to more than 1,500,000 bytes"):
        extract(archive, tmp_path / "out", limits=Limits(total_bytes=1_500_000, ratio=1e9))
    assert not (tmp_path / "out").exists()


def test_bombs_that_are_only_skipped_do_not_go_off(tmp_path: Path) -> None:
    archive = tarred(tmp_path / "a.tar.xz", {"zeros": bytes(20_000_000), "wanted": b"x"})
    with pytest.raises(DataError, match="unpacks to more than"):
        extract(archive, tmp_path / "out", limits=Limits(ratio=10), only=["wanted"])


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
def test_entries_are_counted(tmp_path: Path, name: str) -> None:
    make = zipped if name.endswith(".zip") else tarred
    archive = make(tmp_path / name, {str(i): b"" for i in range(12)})
    with pytest.raises(DataError, match="more than 10 entries"):
        extract(archive, tmp_path / "out", limits=Limits(files=10))


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.tar.bz2", "a.tar.xz", "a.tar"])
def test_damaged_archives_raise_only_our_error(tmp_path: Path, name: str) -> None:
    make = zipped if name.endswith(".zip") else tarred
    whole = make(tmp_path / name, {**FILES, "noise": random.Random(0).randbytes(3000)}).read_bytes()
    refused = 0
    for seed in range(150):
        draw, data = random.Random(seed), bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        if draw.random() < 0.3:
            data = data[: draw.randrange(len(data))]
        path = tmp_path / f"{seed}-{name}"
        path.write_bytes(data)
        try:
            extract(path, tmp_path / f"{seed}-out")
        except PolyzooError as error:
            assert str(tmp_path) in str(error)
            refused += 1
            assert not (tmp_path / f"{seed}-out").exists()
    assert refused > 10


def test_missing_and_locked_archives(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.zip: no such file"):
        extract(tmp_path / "none.zip", tmp_path / "out")
    (tmp_path / "a.rar").write_bytes(b"Rar!\x1a\x07\x00 and so on")
    with pytest.raises(DataError, match="is damaged or of an unknown kind"):
        extract(tmp_path / "a.rar", tmp_path / "out")
