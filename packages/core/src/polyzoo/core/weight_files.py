"""Which safetensors files a path stands for, and whether their bytes are what they claim to be."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from polyzoo.core.errors import WeightsError

FILE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_HEADER = 100 * 2**20
MAX_INDEX = 64 * 2**20

Wanted = dict[Path, list[str] | None]
"""Files to read, each with the names wanted from it; None stands for all."""


def find_files(path: Path) -> Wanted:
    """Return what to read for a .safetensors file, an index, or a folder with either.

    Raises:
        WeightsError: There is none, or the index leads out of its folder.
    """
    if path.is_dir():
        for name in (FILE_NAME, INDEX_NAME):
            if (path / name).exists():
                return find_files(path / name)
        lone = sorted(path.glob("*.safetensors"))
        if len(lone) == 1:
            return {lone[0]: None}
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
        hint = f"; {pickles[0]} is a pickle, which must be converted first" if pickles else ""
        raise WeightsError(f"{path}: holds neither {FILE_NAME} nor {INDEX_NAME}{hint}")
    if not path.exists():
        raise WeightsError(f"{path}: no such file")
    return _shards(path) if path.suffix == ".json" else {path: None}


def read_header(file: Path) -> dict[str, Any]:
    """Return a safetensors file's header; say what a file really is that only has the name."""
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            limit = min(MAX_HEADER, file.stat().st_size - 8)
            fits = len(start) == 8 and 2 <= length <= limit
            # One header in 32 has a length that begins with a pickle's first byte.
            if start[:4] == b"PK\3\4" or (start[:1] == b"\x80" and not fits):
                raise WeightsError(
                    f"{file}: is a pickle (PyTorch checkpoint), not safetensors; renaming does not "
                    "make it safe to read, converting it does"
                )
            if not fits:
                raise WeightsError(f"{file}: is not safetensors, or its start is damaged")
            header = json.loads(stream.read(length), object_pairs_hook=_without_twins)
    except WeightsError:
        raise
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{file}: its header is damaged ({error})") from None
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read: {error.strerror or error}") from None
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise WeightsError(f"{file}: its header is damaged (not a mapping)")
    return header


def _shards(index: Path) -> Wanted:
    try:
        if index.stat().st_size > MAX_INDEX:
            raise ValueError(f"larger than {MAX_INDEX:,} bytes")
        places = json.loads(index.read_bytes())["weight_map"]
        items = [(str(name), str(file)) for name, file in places.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise WeightsError(f"{index}: is not an index of safetensors files ({error})") from None
    names: dict[Path, list[str]] = {}
    for name, file in items:
        if not re.fullmatch(r"\w[\w.\-]{,200}\.safetensors", file):
            raise WeightsError(f"{index}: {file!r} is not a .safetensors file of the same folder")
        names.setdefault(index.parent / file, []).append(name)
    if not names:
        raise WeightsError(f"{index}: names no files")
    for shard in names:
        _check_inside(shard)
    return dict(names)


def _check_inside(shard: Path) -> None:
    if not shard.exists():
        raise WeightsError(f"{shard}: no such file, though the index names it")
    folder, target = shard.parent.resolve(), shard.resolve()
    homes = [folder]
    if folder.parent.name == "snapshots":  # the hub's cache: each revision is links into blobs
        homes.append(folder.parent.parent / "blobs")
    if target.parent not in homes:
        raise WeightsError(f"{shard}: links to {target}, outside its folder; copy the file there")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a name is given twice")
    return mapping
