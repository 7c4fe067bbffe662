"""Token shards: the codes of many pictures on disk, 16 bits a code, written so as to be resumed.

A folder holds `meta.json` (tokenizer and preprocessing), `codes.bin` (records of 2 bytes a code,
little-endian; 64 bytes for 32 codes), `keys.jsonl` (a line a record, in the same order) and
`failed.jsonl` (what could not be read, and why). No pickles. A record counts once its line in
keys.jsonl is whole: codes are flushed before it, and what is behind is cut off on resuming.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from polyzoo.core.errors import DataError
from polyzoo.core.io import FolderLock, atomic_write

META, CODES, KEYS, FAILED = "meta.json", "codes.bin", "keys.jsonl", "failed.jsonl"


class TokenWriter:
    """Appends records; opening a folder again goes on behind its last whole record.

    Example:
        >>> with TokenWriter("tokens", meta={"tokens_per_image": 32, "codes": 8192}) as writer:
        ...     writer.add(["a.png"], codes)
    """

    def __init__(self, folder: str | Path, *, meta: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.meta = meta
        self.width = int(meta["tokens_per_image"])
        self._lock = FolderLock(self.folder, purpose="tokenising")
        self.done: set[str] = set()
        """Keys that are written, or failed, already."""
        self.failed = 0
        """Failures so far, those of earlier runs included."""
        self.written = 0

    def __enter__(self) -> Self:
        self._lock.__enter__()
        try:
            self._open()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in (self._codes, self._keys, self._failed):
            file.close()
        self._lock.__exit__(kind, error, trace)

    def add(self, keys: Sequence[str], codes: NDArray[np.integer]) -> None:
        """Append records; they are on disk when this returns.

        Args:
            keys: Name of each picture.
            codes: (b, tokens_per_image).
        """
        if codes.shape != (len(keys), self.width):
            raise DataError(
                f"{len(keys)} keys and codes {codes.shape} do not fit: ({len(keys)}, {self.width})"
            )
        if codes.size and (codes.min() < 0 or codes.max() >= self.meta["codes"]):
            raise DataError(
                f"codes lie in {codes.min()} to {codes.max()}, and the codebook has 0 to "
                f"{self.meta['codes'] - 1}"
            )
        self._codes.write(codes.astype("<u2").tobytes())
        _flush(self._codes)
        lines = "".join(json.dumps({"key": key}, ensure_ascii=False) + "\n" for key in keys)
        self._keys.write(lines.encode())
        _flush(self._keys)
        self.done.update(keys)
        self.written += len(keys)

    def fail(self, key: str, why: str) -> None:
        """Note a picture that could not be read; it is not tried again."""
        line = json.dumps({"key": key, "error": why}, ensure_ascii=False) + "\n"
        self._failed.write(line.encode())
        _flush(self._failed)
        self.done.add(key)
        self.failed += 1

    def _open(self) -> None:
        path = self.folder / META
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            changed = [key for key in self.meta if stored.get(key) != self.meta[key]]
            if changed:
                key = changed[0]
                raise DataError(
                    f"{self.folder}: was begun with {key}={stored.get(key)!r}, now it is "
                    f"{self.meta[key]!r}; go on with the same settings, or choose another folder"
                )
        else:
            with atomic_write(path, "w") as file:
                file.write(json.dumps(self.meta, indent=2) + "\n")
        keys = _whole_lines(self.folder / KEYS)
        codes = self.folder / CODES
        size = codes.stat().st_size if codes.is_file() else 0
        if size < len(keys) * 2 * self.width:
            raise DataError(
                f"{codes}: {size} bytes do not hold the {len(keys)} records that {KEYS} names; "
                "the file was changed"
            )
        if size:
            os.truncate(codes, len(keys) * 2 * self.width)
        failures = _whole_lines(self.folder / FAILED)
        self.done = {row["key"] for row in (*keys, *failures)}
        self.written, self.failed = len(keys), len(failures)
        self._codes = codes.open("ab")
        self._keys = (self.folder / KEYS).open("ab")
        self._failed = (self.folder / FAILED).open("ab")


def read_meta(folder: str | Path) -> dict[str, Any]:
    """Return what a token folder says about its tokenizer."""
    path = Path(folder) / META
    if not path.is_file():
        raise DataError(f"{folder}: is no folder of tokens ({META} is missing)")
    return json.loads(path.read_text(encoding="utf-8"))


def read_tokens(folder: str | Path) -> dict[str, NDArray[np.uint16]]:
    """Return the codes of every record by its key.

    Raises:
        DataError: The folder is none of ours, or was changed.
    """
    folder = Path(folder)
    width = int(read_meta(folder)["tokens_per_image"])
    keys = [json.loads(line)["key"] for line in _lines(folder / KEYS)]
    values = np.fromfile(folder / CODES, dtype="<u2") if (folder / CODES).is_file() else []
    if len(values) < len(keys) * width:
        raise DataError(f"{folder / CODES}: holds fewer records than {KEYS} names")
    table = np.asarray(values)[: len(keys) * width].reshape(len(keys), width)
    return dict(zip(keys, table, strict=True))


def _lines(path: Path) -> list[bytes]:
    if not path.is_file():
        return []
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1].splitlines()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file's lines, cutting off one that was not finished."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(path, end)
    return [json.loads(line) for line in data[:end].splitlines()]


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
