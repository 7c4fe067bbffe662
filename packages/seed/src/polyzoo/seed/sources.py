"""Where batch tokenisation finds pictures: folders, tar shards, icon packs."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyzoo.core.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
_LARGEST_MEMBER = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Item:
    """One picture: its key, and where its bytes are."""

    key: str
    """Unique in the source: path in the folder, shard/member, or record of a pack."""
    path: str
    offset: int = 0
    size: int = -1
    """Bytes from offset on; -1 is the whole file."""


class Source:
    """Pictures in a fixed order, read one by one; may be handed to loader processes."""

    def __init__(self, items: Sequence[Item], *, pack: Path | None = None) -> None:
        self.items = list(items)
        self._pack_folder = pack
        self._pack: Any = None

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> Any:
        """Return a picture's bytes, or the picture itself from an icon pack.

        Raises:
            DataError: The file is gone, empty or too large.
        """
        item = self.items[index]
        if self._pack_folder is not None:
            if self._pack is None:
                from polyzoo.core.icons import IconPack

                self._pack = IconPack.open(self._pack_folder)
            return self._pack.image(item.offset)
        try:
            with Path(item.path).open("rb") as file:
                file.seek(item.offset)
                data = file.read(item.size)
        except OSError as error:
            raise DataError(f"{item.key}: cannot be read: {error.strerror or error}") from None
        if not data:
            raise DataError(f"{item.key}: is empty")
        if item.size > 0 and len(data) < item.size:
            raise DataError(f"{item.key}: its shard ends in the middle of it")
        return data

    def without(self, keys: set[str]) -> Source:
        """Return the same source without some pictures."""
        return Source([i for i in self.items if i.key not in keys], pack=self._pack_folder)

    def part(self, number: int, parts: int) -> Source:
        """Return every `parts`-th picture, for several processes side by side."""
        return Source(self.items[number::parts], pack=self._pack_folder)


def open_source(path: str | Path) -> Source:
    """Find the pictures of a folder (of files, of tar shards, or a pack), a tar, or one file.

    Raises:
        DataError: There is nothing of the kind.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".tar":
        return Source(_tar_items(path, path.name))
    if path.is_file():
        return Source([Item(path.name, str(path))])
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    if (path / "pack.json").is_file():
        from polyzoo.core.icons import IconPack

        records = IconPack.open(path).records
        return Source([Item(r.id, str(path), i) for i, r in enumerate(records)], pack=path)
    shards = sorted(path.rglob("*.tar"))
    items = [i for shard in shards for i in _tar_items(shard, str(shard.relative_to(path)))]
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    items += [Item(str(file.relative_to(path)), str(file)) for file in files]
    if not items:
        raise DataError(f"{path}: holds no picture ({', '.join(SUFFIXES)}) and no .tar shard")
    return Source(items)


def _tar_items(path: Path, name: str) -> list[Item]:
    """List the pictures of an uncompressed tar; nothing is unpacked and no link followed."""
    items = []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                suffix = Path(member.name).suffix.lower()
                if not member.isfile() or suffix not in SUFFIXES:
                    continue
                if member.size > _LARGEST_MEMBER:
                    raise DataError(f"{path}: {member.name} has {member.size:,} bytes")
                key = f"{name}/{member.name}"
                items.append(Item(key, str(path), member.offset_data, member.size))
    except tarfile.TarError as error:
        raise DataError(f"{path}: is no tar, or damaged: {error}") from error
    keys = {item.key for item in items}
    if len(keys) < len(items):
        raise DataError(f"{path}: holds two pictures of one name; names are the records' keys")
    return items
