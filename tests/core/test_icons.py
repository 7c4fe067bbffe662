"""Icon packs: what is read of each package, what is drawn, who may train on it."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pickle
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from polyzoo.core.errors import AssetError, DataError
from polyzoo.core.icons import IconPack, IconRecord, caption
from polyzoo.core.icons.backgrounds import build_backgrounds, read_backgrounds
from polyzoo.core.icons.build import BuiltPack, build_pack
from polyzoo.core.icons.captions import STYLE_WORDS, prompt
from polyzoo.core.icons.clipart import read_drawings
from polyzoo.core.icons.downloads import obtain, unpack
from polyzoo.core.icons.rasterise import clipart_image, with_pixels
from polyzoo.core.icons.sources import SOURCES, STYLES, Source
from polyzoo.core.icons.splits import split_of
from support.cli import run_cli
from support.icon_packages import (
    EMOJI,
    clipart_package,
    clipart_svg,
    debian_package,
    iconify_package,
    names_package,
    renders_package,
    wheel,
)

MAKERS = {
    "names": names_package,
    "fluent-3d": renders_package,
    "fluent-emoji-flat": iconify_package,
    "noto": iconify_package,
    "twemoji": iconify_package,
    "openmoji": iconify_package,
    "clipart": clipart_package,
}


PINNED: dict[str, Source] = {}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    for name, make in MAKERS.items():
        make(folder / SOURCES[name].file)
        PINNED[name] = pin(SOURCES[name], folder)
    return folder


@pytest.fixture
def packages(made: Path, tmp_path: Path) -> Path:
    """A folder of small packages, to damage at will."""
    folder = tmp_path / "packages"
    shutil.copytree(made, folder)
    return folder


def build(out: Path, packages: Path, *, size: int = 16, **choices: Any) -> BuiltPack:
    """Build from the small packages, each pinned to what it held when it was made."""
    return build_pack(out, size=size, offline_from=packages, sources=PINNED, **choices)


def pin(source: Source, folder: Path) -> Source:
    digest = hashlib.sha256((folder / source.file).read_bytes()).hexdigest()
    return dataclasses.replace(source, sha256=digest)


def test_a_pack_holds_what_the_packages_hold(packages: Path, tmp_path: Path) -> None:
    built = build(tmp_path / "pack", packages, size=32)
    assert built.images == {**dict.fromkeys(STYLES, 2), "clipart": 6}
    assert built.absent == {}
    pack = IconPack.open(tmp_path / "pack")
    assert len(pack) == 16
    apple = next(r for r in pack.records if r.id == "noto/1f34e")
    assert (apple.label, apple.tags, apple.group) == ("red apple", ("apple", "fruit", "red"), 4)
    assert apple.licence == "Apache-2.0"
    assert all(record.split == split_of(record.concept, record.style) for record in pack.records)
    assert {record.label for record in pack.records if record.style == "clipart"} == {
        "Cat & mouse",
        "old saw",
        "Pear",
    }
    assert pack.languages()["de"]["1f34e"] == "de red apple"
    assert pack.sources["twemoji"]["credit"].startswith("Twemoji")


def test_pictures_are_drawn_where_they_belong(packages: Path, tmp_path: Path) -> None:
    build(tmp_path / "pack", packages, size=32)
    pack = IconPack.open(tmp_path / "pack")
    at = {record.id: index for index, record in enumerate(pack.records)}
    left_half = pack.rgb(at["noto/1f34e"])
    assert left_half.shape == (32, 32, 3)
    assert left_half.dtype == np.uint8
    np.testing.assert_allclose(left_half[16, 4], [255, 0, 0], atol=12)
    np.testing.assert_array_equal(left_half[16, 28], [255, 255, 255])
    np.testing.assert_array_equal(
        pack.rgb(at["noto/1f34e"], background=(1, 2, 3))[16, 28], [1, 2, 3]
    )
    circle = np.asarray(pack.image(at["openmoji/2764-fe0f"]))
    assert circle[16, 16, 3] == 255  # 16 units a side of its own, scaled to the whole picture
    assert circle[0, 0, 3] == 0
    assert abs((circle[..., 3] > 127).mean() - np.pi / 4) < 0.02
    render = np.asarray(pack.image(at["fluent-3d/2764-fe0f"]))
    assert render[16, 16, 3] == 255
    assert render[1, 16, 3] <= 2  # lossy, so nearly
    cut = np.asarray(pack.image(at["clipart/animals/cat_01.svg"]))
    assert (cut[2:-2, 2:-2, 3] > 250).all()  # the small square fills the picture


def test_a_pack_is_the_same_every_time(packages: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        build(tmp_path / name, packages)
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_without_clip_art_the_rest_is_built_and_it_is_said(packages: Path, tmp_path: Path) -> None:
    (packages / SOURCES["clipart"].file).unlink()
    built = build(tmp_path / "pack", packages)
    assert "clipart" not in built.images
    assert "apt-get download -q openclipart-svg=1:0.18+dfsg-19" in built.absent["clipart"]
    (packages / SOURCES["noto"].file).unlink()
    with pytest.raises(AssetError, match=r"npm pack --silent @iconify-json/noto@1\.2\.9"):
        build(tmp_path / "other", packages)
    assert not (tmp_path / "other").exists()


def test_other_bytes_are_refused(packages: Path, tmp_path: Path) -> None:
    file = packages / SOURCES["noto"].file
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(AssetError, match=r"is not @iconify-json/noto@1\.2\.9 \(SHA-256"):
        build(tmp_path / "pack", packages)


def test_a_missing_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssetError, match=r"npm is not installed here; on another machine run"):
        obtain(SOURCES["noto"], tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 8}, "size=8 must be 16 to 512 pixels"),
        ({"size": 64, "styles": ("apple",)}, "no style 'apple'; there are fluent-3d"),
        ({"size": 64, "styles": ()}, "no style is asked for"),
    ],
)
def test_bad_values_are_named(arguments: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        build_pack(tmp_path / "pack", **arguments)


def test_splits_have_the_fixed_sizes() -> None:
    """The counts of the whole collections: 1,923 emoji, of which 1,032 of the core groups."""
    listed = (Path(__file__).parent / "icon_concepts.txt").read_text().splitlines()
    groups = {code: int(group) for code, group in (line.split() for line in listed)}
    assert len(groups) == 1923
    reserved = [code for code in groups if split_of(code, "noto") == "reserved-concept"]
    core = [code for code in groups if groups[code] in (0, 3, 4, 5, 6, 7)]
    assert len(reserved) == 169
    assert len(core) == 1032
    assert len(set(core) & set(reserved)) == 100
    for style in STYLES:
        splits = Counter(split_of(code, style) for code in groups)
        assert splits["reserved-concept"] == 169  # in every style alike
        share = splits["reserved-combination"] / (1923 - 169)
        assert share == 0 if style == "clipart" else 0.03 < share < 0.07
        assert 0.03 < splits["val"] / 1923 < 0.07


def test_splits_follow_the_hash_rule() -> None:
    def digest(text: str) -> int:
        return int(hashlib.sha1(text.encode()).hexdigest(), 16)

    rng = random.Random(0)
    for _ in range(500):
        code, style = f"{rng.randrange(2**20):x}", rng.choice(STYLES)
        if digest(code) % 10 == 7:
            expected = "reserved-concept"
        elif style != "clipart" and digest(code + "|" + style) % 20 == 3:
            expected = "reserved-combination"
        else:
            expected = "val" if digest("val" + code) % 20 == 0 else "train"
        assert split_of(code, style) == expected


def record(style: str, tags: tuple[str, ...]) -> IconRecord:
    return IconRecord(
        id="x",
        concept="x",
        style=style,
        label="red apple",
        tags=tags,
        group=4,
        split="train",
        licence="MIT",
    )


def test_captions() -> None:
    assert prompt("red apple", "fluent-3d") == "red apple, 3d render style"
    rng = random.Random(0)
    tags = ("a", "b", "c", "d", "e")
    drawn = [caption(record("noto", tags), rng) for _ in range(2000)]
    assert all(text.startswith("red apple, noto style") for text in drawn)
    counts = Counter(text.count(",") - 1 for text in drawn)
    assert set(counts) == {0, 1, 2, 3}
    assert 0.58 < counts[0] / 2000 < 0.67  # a half, and a quarter of the other half
    assert all(len(set(text.split(", "))) == len(text.split(", ")) for text in drawn)
    assert caption(record("clipart", ("b", "a")), rng) in (
        "red apple, clipart style, a, b",
        "red apple, clipart style, b, a",
    )
    assert caption(record("clipart", ()), rng) == "red apple, clipart style"
    assert set(STYLE_WORDS) == set(STYLES)


def test_subsets(packages: Path, tmp_path: Path) -> None:
    build(tmp_path / "pack", packages)
    pack = IconPack.open(tmp_path / "pack")
    everything = pack.subset()
    assert everything == list(range(len(pack)))
    by_split = [
        pack.subset(split=s) for s in ("train", "val", "reserved-concept", "reserved-combination")
    ]
    assert sorted(i for part in by_split for i in part) == everything
    assert pack.subset(split=["train", "val"]) == sorted(by_split[0] + by_split[1])
    assert {pack.records[i].style for i in pack.subset(styles=["noto"])} == {"noto"}
    assert {pack.records[i].style for i in pack.subset(groups=[None])} == {"clipart"}
    with pytest.raises(DataError, match="no style 'apple'; there are clipart"):
        pack.subset(styles=["apple"])
    with pytest.raises(DataError, match="no split 'test'"):
        pack.subset(split="test")  # type: ignore[arg-type]


def test_a_pack_can_be_sent_to_a_worker(packages: Path, tmp_path: Path) -> None:
    build(tmp_path / "pack", packages)
    pack = IconPack.open(tmp_path / "pack")
    expected = pack.rgb(3)
    other = pickle.loads(pickle.dumps(pack))
    np.testing.assert_array_equal(other.rgb(3), expected)
    assert other.records == pack.records


def test_damaged_packs_are_named(packages: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is no icon pack \(pack.json is missing\); run: polyzoo"):
        IconPack.open(tmp_path)
    build(tmp_path / "pack", packages, styles=("noto",))
    pack = IconPack.open(tmp_path / "pack")
    shard = tmp_path / "pack" / "images-000.zip"
    shard.write_bytes(shard.read_bytes()[:40])
    with pytest.raises(DataError, match=r"images-000.zip: 00000.webp cannot be read"):
        pack.rgb(0)
    records = tmp_path / "pack" / "records.jsonl"
    records.write_text('{"id": 1}\n')
    with pytest.raises(DataError, match=r"records.jsonl: is damaged"):
        IconPack.open(tmp_path / "pack")
    header = tmp_path / "pack" / "pack.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"format": 99}))
    with pytest.raises(DataError, match="has format 99, this version reads 1"):
        IconPack.open(tmp_path / "pack")


def test_which_clip_art_is_taken(tmp_path: Path) -> None:
    package = clipart_package(tmp_path / "a.deb")
    files = unpack(package, tmp_path / "out", wanted=lambda name: name.endswith(".svg"))
    assert not any(file.is_symlink() for file in files.values())
    drawings = {drawing.path: drawing for drawing in read_drawings(files)}
    assert sorted(drawings) == [
        "animals/cat_01.svg",
        "food/empty.svg",
        "food/no_size.svg",
        *(f"food/pear_{n}.svg" for n in range(4)),
        "tools/old_saw_nicu_bucul_01.svg",
    ]
    assert drawings["animals/cat_01.svg"].keywords == ("cat", "pet")
    assert clipart_image(drawings["food/empty.svg"].svg, 16) is None
    assert clipart_image(drawings["food/no_size.svg"].svg, 16) is None


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ('width="72pt" height="36pt"', 'width="96" height="48" viewBox="0 0 96 48"'),
        ('width="25.4mm" height="1in"', 'width="96" height="96" viewBox="0 0 96 96"'),
        ('viewBox="1 2 30 40"', 'width="30" height="40" viewBox="1 2 30 40"'),
        ('width="100%" height="100%" viewBox="0,0,8,8"', 'width="8" height="8" viewBox="0 0 8 8"'),
    ],
)
def test_sizes_become_pixels(size: str, expected: str) -> None:
    document = with_pixels(clipart_svg("x", size=size).decode())
    assert document is not None
    assert f"<svg {expected} xmlns" in document


@pytest.mark.parametrize("cut", [0, 5, 60, 100, 300])
def test_damaged_debian_packages(tmp_path: Path, cut: int) -> None:
    whole = clipart_package(tmp_path / "whole.deb").read_bytes()
    part = tmp_path / "part.deb"
    part.write_bytes(whole[:cut])
    with pytest.raises(DataError, match=r"part\.deb|data\.tar"):
        unpack(part, tmp_path / "out", wanted=lambda _: True)


def test_a_debian_package_that_climbs_out_is_refused(tmp_path: Path) -> None:
    package = debian_package(tmp_path / "a.deb", {"../../evil.svg": b"x"}, {})
    with pytest.raises(DataError, match="leads out of the folder"):
        unpack(package, tmp_path / "out", wanted=lambda _: True)


def test_backgrounds_are_photographs_scaled_down(tmp_path: Path) -> None:
    def picture(width: int, height: int, kind: str) -> bytes:
        data = io.BytesIO()
        Image.new("RGB", (width, height), (10, 200, 30)).save(data, kind)
        return data.getvalue()

    made = {
        "mvtbdata/images/road.png": picture(1000, 500, "PNG"),
        "mvtbdata/images/lena.png": picture(8, 8, "PNG"),
    }
    walls = "usr/share/wallpapers"
    papers = {
        f"{walls}/Path/contents/images/2560x1600.jpg": picture(256, 160, "JPEG"),
        f"{walls}/Path/contents/screenshot.jpg": picture(9, 9, "JPEG"),
    }
    wheel(tmp_path / SOURCES["photographs"].file, made)
    debian_package(tmp_path / SOURCES["wallpapers"].file, papers, {})
    pinned = {name: pin(SOURCES[name], tmp_path) for name in ("photographs", "wallpapers")}
    out = tmp_path / "out"
    built = build_backgrounds(out, side=320, offline_from=tmp_path, sources=pinned)
    files = {file.name: file for file in read_backgrounds(tmp_path / "out")}
    assert built.images == len(files)
    with Image.open(files["photographs-road.jpg"]) as image:
        assert image.size == (320, 160)
    with Image.open(files["wallpapers-path.jpg"]) as image:
        assert image.size == (256, 160)
    assert not any("lena" in name or "screenshot" in name for name in files)
    with pytest.raises(DataError, match=r"holds no records\.jsonl; run: polyzoo icons backg"):
        read_backgrounds(tmp_path)


def test_commands(packages: Path, tmp_path: Path) -> None:
    build(tmp_path / "pack", packages, styles=("noto",))
    done = run_cli("icons", "info", tmp_path / "pack", "--json")
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info["records"] == 2
    assert sum(info["counts"]["noto"].values()) == 2
    assert "Noto Emoji" in run_cli("icons", "info", tmp_path / "pack").stdout
    wrong = run_cli("icons", "build", "--out", tmp_path / "x", "--size", "4", "--json")
    assert wrong.returncode == 1
    assert "size=4 must be 16 to 512" in wrong.stderr


def test_all_emoji_of_the_sample_that_have_a_group_are_known(packages: Path) -> None:
    from polyzoo.core.icons import emoji_names

    files = unpack(packages / SOURCES["names"].file, packages / "names", wanted=emoji_names.wanted)
    names = emoji_names.read_names(files)
    assert [name.hexcode for name in names] == [c.lower() for _, c, _, g in EMOJI if g is not None]
