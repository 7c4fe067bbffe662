"""Build an icon pack: download, unpack, draw, caption, split, write."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from polyzoo.core.errors import AssetError, DataError
from polyzoo.core.icons import clipart, emoji_names, iconify
from polyzoo.core.icons.downloads import obtain, unpack
from polyzoo.core.icons.emoji_names import EmojiName, spellings
from polyzoo.core.icons.pack import write_pack
from polyzoo.core.icons.rasterise import clipart_image, emoji_image, render_image
from polyzoo.core.icons.records import IconRecord
from polyzoo.core.icons.sources import CLIP_ART, SOURCES, STYLES, Source
from polyzoo.core.icons.splits import split_of
from polyzoo.core.lazy import import_extra
from polyzoo.core.log import get_logger, progress

_log = get_logger(__name__)
_RENDERS = "fluent-3d"
MIN_SIZE, MAX_SIZE = 16, 512


@dataclass(frozen=True, kw_only=True)
class BuiltPack:
    """What was built."""

    folder: str
    size: int
    images: dict[str, int]
    """Style to number of pictures."""
    absent: dict[str, str]
    """Style to why it is not in the pack."""


def build_pack(
    out: Path,
    *,
    size: int,
    styles: tuple[str, ...] = STYLES,
    offline_from: Path | None = None,
    sources: Mapping[str, Source] = SOURCES,
) -> BuiltPack:
    """Build a pack of one size.

    Args:
        out: The pack's folder.
        size: Side of the pictures in pixels, 16 to 512.
        styles: Which styles.
        offline_from: A folder of downloaded packages; no network is used then.
        sources: Name to package: "names", and one a style.

    Raises:
        AssetError: A package cannot be had (clip art may be absent) or is not the pinned one.
        DataError: A value is out of its range.
        MissingExtraError: The rasteriser is not installed.
    """
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise DataError(f"size={size} must be {MIN_SIZE} to {MAX_SIZE} pixels")
    unknown = sorted(set(styles) - set(STYLES))
    if unknown or not styles:
        what = f"no style {unknown[0]!r}" if unknown else "no style is asked for"
        raise DataError(f"{what}; there are {', '.join(STYLES)}")
    import_extra("resvg_py", install="polyzoo-core[icons]")  # before the long download
    counts = dict.fromkeys((style for style in STYLES if style in styles), 0)
    absent: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="polyzoo-") as scratch_name:
        scratch = Path(scratch_name)
        packages: dict[str, Path] = {}
        for name in ("names", *counts):
            try:
                packages[name] = obtain(sources[name], scratch, offline_from=offline_from)
            except AssetError as error:
                if not sources[name].optional:
                    raise
                absent[name] = str(error)
                _log.warning("%s is left out: %s", name, error)
        files = unpack(packages["names"], scratch / "names", wanted=emoji_names.wanted)
        names = emoji_names.read_names(files)
        languages = emoji_names.read_languages(files)

        def items() -> Iterator[tuple[IconRecord, Image.Image]]:
            for style in counts:
                if style not in packages:
                    continue
                read = _clipart if style == CLIP_ART else _emoji
                drawn = read(sources[style], packages[style], scratch / style, names, size)
                for record, image in drawn:
                    counts[style] += 1
                    yield record, image

        described = {
            style: {
                "package": sources[style].requirement,
                "licence": sources[style].licence,
                "credit": sources[style].credit,
            }
            for style in counts
            if style in packages
        }
        write_pack(out, items(), size=size, sources=described, languages=languages)
    for style in absent:
        del counts[style]
    return BuiltPack(folder=str(out), size=size, images=counts, absent=absent)


def _emoji(
    source: Source, package: Path, scratch: Path, names: list[EmojiName], size: int
) -> Iterator[tuple[IconRecord, Image.Image]]:
    style = source.name
    renders: dict[str, Path] = {}
    drawings: iconify.IconifySet | None = None
    if style == _RENDERS:
        found = unpack(package, scratch, wanted=lambda name: name.endswith(".webp"))
        renders = {Path(name).stem: file for name, file in found.items()}
    else:
        drawings = iconify.IconifySet(unpack(package, scratch, wanted=iconify.wanted))
    for name in progress(names, description=style, unit="image"):
        if drawings is None:
            file = next((renders[c] for c in spellings(name.hexcode) if c in renders), None)
            image = None if file is None else render_image(file.read_bytes(), size)
        else:
            svg = drawings.svg(name.hexcode)
            image = None if svg is None else emoji_image(svg, size)
        if image is None:
            continue
        yield (
            IconRecord(
                id=f"{style}/{name.hexcode}",
                concept=name.hexcode,
                style=style,
                label=name.label,
                tags=name.tags,
                group=name.group,
                split=split_of(name.hexcode, style),
                licence=source.licence,
            ),
            image,
        )


def _clipart(
    source: Source,
    package: Path,
    scratch: Path,
    names: list[EmojiName],  # noqa: ARG001 - the same signature as the emoji's
    size: int,
) -> Iterator[tuple[IconRecord, Image.Image]]:
    style = source.name
    files = unpack(package, scratch, wanted=clipart.wanted)
    unreadable = 0
    for drawing in progress(list(clipart.read_drawings(files)), description=style, unit="image"):
        image = clipart_image(drawing.svg, size)
        if image is None:
            unreadable += 1
            continue
        yield (
            IconRecord(
                id=f"{style}/{drawing.path}",
                concept=drawing.path,
                style=style,
                label=drawing.title,
                tags=drawing.keywords,
                group=None,
                split=split_of(drawing.path, style),
                licence=source.licence,
            ),
            image,
        )
    if unreadable:
        _log.info("%d drawings show nothing or cannot be read; left out", unreadable)
