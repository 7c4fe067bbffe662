"""A folder of pictures with their records: written once, read at random."""

from __future__ import annotations

import io
import json
import os
import threading
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from polyzoo.core.errors import DataError
from polyzoo.core.icons.records import SPLITS, IconRecord, Split
from polyzoo.core.io import atomic_folder

FORMAT = 1
_HEADER, _RECORDS, _LANGUAGES = "pack.json", "records.jsonl", "languages.json"
_SHARD_BYTES = 8 * 2**20
_WEBP_QUALITY = 85
_EPOCH = (1980, 1, 1, 0, 0, 0)


class IconPack:
    """Pictures of one size, and what is known about each.

    Example:
        >>> pack = IconPack.open("icons/64")
        >>> chosen = pack.subset(split="train", styles=["noto"])
        >>> pack.records[chosen[0]].label, pack.rgb(chosen[0]).shape
        ('grinning face', (64, 64, 3))
    """

    def __init__(
        self,
        folder: Path,
        *,
        header: Mapping[str, Any],
        records: tuple[IconRecord, ...],
        places: tuple[tuple[str, str], ...],
    ) -> None:
        self.folder = folder
        self.records = records
        self.size = int(header["size"])
        """Side of every picture in pixels."""
        self.sources: dict[str, dict[str, str]] = dict(header["sources"])
        """Style to package, licence and credit."""
        self._places = places
        self._local = threading.local()

    @classmethod
    def open(cls, folder: str | Path) -> IconPack:
        """Read a pack's records; pictures are read when asked for.

        Raises:
            DataError: The folder holds no pack, or one that this version does not read.
        """
        folder = Path(folder)
        try:
            header = json.loads((folder / _HEADER).read_bytes())
            lines = (folder / _RECORDS).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError as error:
            raise DataError(
                f"{folder}: is no icon pack ({Path(str(error.filename)).name} is missing); "
                f"run: polyzoo icons build --out {folder}"
            ) from None
        except ValueError as error:
            raise DataError(f"{folder}: is damaged: {error}") from error
        if header.get("format") != FORMAT:
            raise DataError(
                f"{folder}: has format {header.get('format')}, this version reads {FORMAT}; "
                "build it again"
            )
        try:
            rows = [json.loads(line) for line in lines]
            places = tuple((row.pop("shard"), row.pop("file")) for row in rows)
            records = tuple(IconRecord(**row | {"tags": tuple(row["tags"])}) for row in rows)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder / _RECORDS}: is damaged: {error!r}") from error
        return cls(folder, header=header, records=records, places=places)

    def __len__(self) -> int:
        return len(self.records)

    def subset(
        self,
        *,
        split: Split | Collection[Split] | None = None,
        styles: Collection[str] | None = None,
        groups: Collection[int | None] | None = None,
    ) -> list[int]:
        """Return the indices of the records that fit, in order.

        Args:
            split: One split or several; all where not given.
            styles: Styles wanted.
            groups: Emojibase groups wanted (see `records.CORE_GROUPS`); None stands for clip art.

        Raises:
            DataError: A split or style of that name does not exist.
        """
        splits = SPLITS if split is None else (split,) if isinstance(split, str) else tuple(split)
        known = {record.style for record in self.records}
        for name, value, allowed in (("split", splits, SPLITS), ("style", styles or (), known)):
            unknown = sorted(set(value) - set(allowed))
            if unknown:
                raise DataError(f"no {name} {unknown[0]!r}; there are {', '.join(sorted(allowed))}")
        return [
            index
            for index, record in enumerate(self.records)
            if record.split in splits
            and (styles is None or record.style in styles)
            and (groups is None or record.group in groups)
        ]

    def image(self, index: int) -> Image.Image:
        """Return a picture: RGBA, size x size."""
        shard, name = self._places[index]
        try:
            data = self._archive(shard).read(name)
            with Image.open(io.BytesIO(data), formats=("WEBP",)) as image:
                return image.convert("RGBA")
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{self.folder / shard}: {name} cannot be read: {error}") from error

    def rgb(
        self, index: int, *, background: tuple[int, int, int] = (255, 255, 255)
    ) -> NDArray[np.uint8]:
        """Return a picture over a colour: uint8 (size, size, 3)."""
        image = self.image(index)
        ground = Image.new("RGBA", image.size, (*background, 255))
        return np.asarray(Image.alpha_composite(ground, image).convert("RGB"))

    def languages(self) -> dict[str, dict[str, str]]:
        """Return language ("de", "ja", ...) to concept to its name in that language (emoji only).

        English is among them.
        """
        try:
            return json.loads((self.folder / _LANGUAGES).read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"{self.folder / _LANGUAGES}: cannot be read: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._local = threading.local()

    def _archive(self, shard: str) -> zipfile.ZipFile:
        """Return an open shard; each thread, and each process after a fork, has its own."""
        opened: dict[str, zipfile.ZipFile] = getattr(self._local, "opened", {})
        if getattr(self._local, "process", None) != os.getpid():
            opened, self._local.process = {}, os.getpid()
            self._local.opened = opened
        if shard not in opened:
            opened[shard] = zipfile.ZipFile(self.folder / shard)
        return opened[shard]


def write_pack(
    folder: Path,
    items: Iterable[tuple[IconRecord, Image.Image]],
    *,
    size: int,
    sources: Mapping[str, Mapping[str, str]],
    languages: Mapping[str, Mapping[str, str]],
) -> None:
    """Write a pack: all of it, or nothing.

    Args:
        folder: Where; an older pack there is replaced.
        items: Records with their pictures (RGBA, size x size).
        size: Side in pixels.
        sources: Style to package, licence and credit.
        languages: Language to concept to name.
    """
    with atomic_folder(folder, replace=True) as target:
        count = 0
        with _Shards(target) as shards, (target / _RECORDS).open("w", encoding="utf-8") as lines:
            for record, image in items:
                data = io.BytesIO()
                image.save(data, "WEBP", quality=_WEBP_QUALITY, method=4)
                name = f"{count:05d}.webp"
                shard = shards.add(name, data.getvalue())
                row = asdict(record) | {"shard": shard, "file": name}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        header = {"format": FORMAT, "size": size, "records": count, "sources": sources}
        (target / _HEADER).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
        text = json.dumps(languages, ensure_ascii=False, separators=(",", ":"))
        (target / _LANGUAGES).write_text(text, encoding="utf-8")


class _Shards:
    """Uncompressed archives of a few MiB each: thousands of small files would slow every copy."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: zipfile.ZipFile | None = None
        self._name = ""
        self._count = self._bytes = 0

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, *_: object) -> None:
        if self._opened is not None:
            self._opened.close()

    def add(self, name: str, data: bytes) -> str:
        """Store one file and return the name of its archive."""
        if self._opened is None or self._bytes + len(data) > _SHARD_BYTES:
            if self._opened is not None:
                self._opened.close()
            self._name = f"images-{self._count:03d}.zip"
            self._opened = zipfile.ZipFile(self._folder / self._name, "w", zipfile.ZIP_STORED)
            self._count, self._bytes = self._count + 1, 0
        self._opened.writestr(zipfile.ZipInfo(name, _EPOCH), data)
        self._bytes += len(data)
        return self._name
