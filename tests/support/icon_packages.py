"""Small packages in the real formats: npm, Python and Debian, as the icon builder reads them."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

from PIL import Image, ImageDraw

EMOJI = [
    # label, hexcode, tags, group
    ("red apple", "1F34E", ["apple", "fruit", "red"], 4),
    ("red heart", "2764-FE0F", ["love"], 0),
    ("dog face", "1F436", ["dog", "pet"], 3),
    ("regional indicator A", "1F1E6", [], None),
]


def npm_package(path: Path, files: dict[str, bytes]) -> Path:
    """A .tgz as `npm pack` gives it: everything under package/."""
    with tarfile.open(path, "w:gz") as archive:
        _add(archive, {f"package/{name}": data for name, data in files.items()})
    return path


def debian_package(path: Path, files: dict[str, bytes], links: dict[str, str]) -> Path:
    """A .deb: an `ar` archive of debian-binary, control.tar.xz and data.tar.xz."""

    def packed(content: dict[str, bytes], pointing: dict[str, str]) -> bytes:
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w:xz") as archive:
            folder = tarfile.TarInfo("./usr")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            _add(archive, {f"./{name}": value for name, value in content.items()})
            for name, target in pointing.items():
                link = tarfile.TarInfo(f"./{name}")
                link.type, link.linkname = tarfile.SYMTYPE, target
                archive.addfile(link)
        return data.getvalue()

    out = b"!<arch>\n"
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": packed({"control": b"Package: sample\n"}, {}),
        "data.tar.xz": packed(files, links),
    }
    for name, data in members.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
        out += data + b"\n" * (len(data) % 2)
    path.write_bytes(out)
    return path


def wheel(path: Path, files: dict[str, bytes]) -> Path:
    """A .whl."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def names_package(path: Path) -> Path:
    """Emojibase, English and German."""
    rows = [
        {"label": label, "hexcode": code, "tags": tags}
        | ({} if group is None else {"group": group})
        for label, code, tags, group in EMOJI
    ]
    german = [
        {"label": f"de {row['label']}", **{k: row[k] for k in row if k != "label"}} for row in rows
    ]
    return npm_package(
        path,
        {
            "en/data.json": json.dumps(rows).encode(),
            "de/data.json": json.dumps(german).encode(),
            "en/messages.json": b"{}",
        },
    )


def iconify_package(path: Path) -> Path:
    """A set of 32 units a side; the apple is off its centre, the heart goes by an alias."""
    icons = {
        "apple": {"body": '<rect width="16" height="32" fill="#ff0000"/>'},
        "love": {"body": '<circle cx="8" cy="8" r="8" fill="#00ff00"/>', "width": 16, "height": 16},
    }
    sets = {
        "icons": icons,
        "aliases": {"heart": {"parent": "love"}},
        "width": 32,
        "height": 32,
    }
    points = {"1f34e": "apple", "2764": "heart"}
    return npm_package(
        path,
        {"icons.json": json.dumps(sets).encode(), "chars.json": json.dumps(points).encode()},
    )


def renders_package(path: Path) -> Path:
    """WebP renders of apple and heart, 256 px, transparent round the outside."""
    image = Image.new("RGBA", (256, 256))
    ImageDraw.Draw(image).ellipse((32, 32, 224, 224), fill=(200, 30, 30, 255))
    data = io.BytesIO()
    image.save(data, "WEBP", lossless=True)
    return npm_package(
        path, {"assets/1f34e.webp": data.getvalue(), "assets/2764-fe0f.webp": data.getvalue()}
    )


_METADATA = (
    "<metadata><rdf:RDF><cc:Work><dc:title>{title}</dc:title>"
    "<dc:creator><cc:Agent><dc:title>Nicu Buculei</dc:title></cc:Agent></dc:creator>"
    "<dc:subject><rdf:Bag>{words}</rdf:Bag></dc:subject></cc:Work></rdf:RDF></metadata>"
)


def clipart_svg(title: str, *words: str, size: str = 'width="60pt" height="30pt"') -> bytes:
    """A drawing whose visible part is a small square at its right, as the library writes them."""
    listed = "".join(f"<rdf:li>{word}</rdf:li>" for word in words)
    spaces = (
        'xmlns="http://www.w3.org/2000/svg" xmlns:cc="http://web.resource.org/cc/" '
        'xmlns:dc="http://purl.org/dc/elements/1.1/" '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"'
    )
    metadata = _METADATA.format(title=title, words=listed)
    square = '<rect x="60" y="10" width="10" height="10" fill="#0000ff"/>'
    return f'<?xml version="1.0"?><svg {size} {spaces}>{metadata}{square}</svg>'.encode()


def clipart_package(path: Path) -> Path:
    """Two drawings to take, and one of each kind to leave."""
    root = "usr/share/openclipart/svg"
    files = {
        f"{root}/animals/cat_01.svg": clipart_svg("Cat &amp; mouse", "cat", "", "unsorted", "pet"),
        f"{root}/tools/old_saw_nicu_bucul_01.svg": clipart_svg("Clipart by Nicu Buculei - book_01"),
        f"{root}/shapes/round.svg": clipart_svg("Round"),
        f"{root}/recreation/games/cards/ace.svg": clipart_svg("Ace"),
        f"{root}/food/photo.svg": clipart_svg("Photo").replace(b"<rect", b"<image/><rect"),
        f"{root}/food/huge.svg": clipart_svg("Huge") + b" " * 200_000,
        f"{root}/food/no_size.svg": clipart_svg("No size", size=""),
        f"{root}/food/empty.svg": clipart_svg("Empty").replace(b"#0000ff", b"none"),
        "usr/share/doc/README": b"text",
    }
    for number in range(6):
        files[f"{root}/food/pear_{number}.svg"] = clipart_svg("Pear", "fruit")
    return debian_package(path, files, {f"{root}/animals/same.svg": "cat_01.svg"})


def _add(archive: tarfile.TarFile, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
