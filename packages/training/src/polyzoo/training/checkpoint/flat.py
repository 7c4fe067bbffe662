"""Flat shards: tensors as ranges of their flattened values, so that any layout can read any other.

A whole parameter (one device, DDP), rows of it (FSDP2) and equal pieces of it (ZeRO-3) are all
contiguous ranges of the row-major flattened parameter. Each process writes the ranges it holds;
whoever loads reads the ranges it needs. `rank00000.safetensors` holds them under the keys
"<state>|<name>", 1-D; `rank00000.json` says where each range belongs.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from polyzoo.core.errors import ConfigError
from polyzoo.training.checkpoint.store import FileRecord
from polyzoo.training.errors import TrainingError

MASTER = "fp32"
BUFFER = "buffer"
EMA = "ema"

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shard:
    """A contiguous range of one flattened tensor."""

    state: str
    """fp32 (master weights), ema, buffer, or the optimizer's own name, such as exp_avg."""
    name: str
    """Parameter or buffer."""
    start: int
    """Index of its first value in the flattened tensor."""
    full_shape: tuple[int, ...]
    """Shape of the whole tensor."""
    values: Tensor
    """1-D, on any device; on the meta device where `read` gives them."""
    read: Callable[[], Tensor] | None = None
    """Brings values from a drive when their turn to be written comes."""

    @property
    def key(self) -> str:
        """The tensor's name in the file."""
        return f"{self.state}|{self.name}"


def whole(state: str, name: str, tensor: Tensor) -> Shard:
    """Return a shard that holds all of a tensor."""
    return Shard(state, name, 0, tuple(tensor.shape), tensor.detach().reshape(-1))


def write_rank(
    folder: Path, rank: int, shards: Iterable[Shard], state: Any
) -> dict[str, FileRecord]:
    """Write one process's shards and plain state into a checkpoint folder.

    Tensors pass through host memory one at a time, and are hashed on their way to the file.

    Args:
        folder: Of the checkpoint, still under its temporary name.
        rank: Of the process.
        shards: What it holds; no range twice.
        state: JSON values to go with them.

    Returns:
        The records of the files written.
    """
    held = list(shards)
    tensors, places = f"rank{rank:05d}.safetensors", f"rank{rank:05d}.json"
    with (folder / tensors).open("wb") as file:
        record = _write_safetensors(file, held)
    entries = [[s.key, s.start, s.values.numel(), list(s.full_shape)] for s in held]
    text = json.dumps({"entries": entries, "state": state}).encode()
    (folder / places).write_bytes(text)
    return {
        tensors: record,
        places: FileRecord(len(text), hashlib.blake2b(text).hexdigest()),
    }


def size_of(shards: Iterable[Shard]) -> int:
    """Return the bytes that shards take on disk, headers left out."""
    return sum(shard.values.numel() * shard.values.element_size() for shard in shards)


def _write_safetensors(file: BinaryIO, shards: list[Shard]) -> FileRecord:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for shard in shards:
        if shard.key in header:
            raise ValueError(f"{shard.key} is given twice")
        begin, end = end, end + size_of([shard])
        if shard.values.dtype not in _DTYPES:
            raise ConfigError(f"{shard.key}: {shard.values.dtype} cannot be stored in a checkpoint")
        dtype, length = _DTYPES[shard.values.dtype], shard.values.numel()
        header[shard.key] = {"dtype": dtype, "shape": [length], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.blake2b()
    size = 0
    for chunk in _chunks(text, shards):
        file.write(chunk)
        digest.update(chunk)
        size += len(chunk)
    return FileRecord(size, digest.hexdigest())


def _chunks(header: bytes, shards: list[Shard]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little") + header
    for shard in shards:
        if shard.values.numel():
            values = shard.read() if shard.read else shard.values
            on_host = values.detach().cpu().contiguous()
            yield on_host.view(torch.uint8).numpy().data


@dataclass(frozen=True, slots=True)
class _Piece:
    file: Path
    start: int
    length: int


class FlatReader:
    """Reads tensors, or ranges of them, from the shards of any number of processes.

    Example:
        >>> reader = FlatReader(Path("runs/a/checkpoints/step_00000100"))
        >>> reader.tensor("fp32", "head.weight").shape
        torch.Size([10, 64])
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        self._states: dict[str, list[str]] = {}
        self._open: dict[Path, Any] = {}
        for places in sorted(folder.glob("rank*.json")):
            file = places.with_suffix(".safetensors")
            for key, start, length, shape in json.loads(places.read_bytes())["entries"]:
                self.shapes[key] = tuple(shape)
                self._pieces.setdefault(key, []).append(_Piece(file, start, length))
        for key in self.shapes:
            state, _, name = key.partition("|")
            self._states.setdefault(name, []).append(state)

    def names(self, state: str) -> list[str]:
        """Return the names that a state holds values of."""
        prefix = f"{state}|"
        return [key.removeprefix(prefix) for key in self.shapes if key.startswith(prefix)]

    def states(self, name: str) -> list[str]:
        """Return the states in which a name appears."""
        return self._states.get(name, [])

    def tensor(self, state: str, name: str) -> Tensor:
        """Return a whole tensor in its full shape, on the CPU."""
        shape = self.shapes[f"{state}|{name}"]
        return self.values(state, name, 0, math.prod(shape)).reshape(shape)

    def values(self, state: str, name: str, start: int, length: int) -> Tensor:
        """Return the values [start, start + length) of a flattened tensor, 1-D, on the CPU."""
        key = f"{state}|{name}"
        parts: list[Tensor] = []
        reached = start
        for piece in sorted(self._pieces[key], key=lambda piece: piece.start):
            begin, end = max(reached, piece.start), min(start + length, piece.start + piece.length)
            if begin == reached and begin < end:
                stored = self._file(piece.file).get_slice(key)
                parts.append(stored[begin - piece.start : end - piece.start])
                reached = end
        if reached < start + length:
            raise TrainingError(
                "E-CKPT-CORRUPT",
                f"{self.folder}: values {reached} to {start + length} of {key} are in no file",
                f"the shards present hold {sum(p.length for p in self._pieces[key])} of them",
                "restore the missing rank files from a copy, or resume from an earlier step",
            )
        if not parts:
            return self._file(self._pieces[key][0].file).get_tensor(key)[:0]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path]

    def rank_state(self, rank: int) -> Any:
        """Return the plain state that a process wrote beside its shards.

        A process that was not there when the checkpoint was written gets that of process 0.
        """
        file = self.folder / f"rank{rank:05d}.json"
        file = file if file.is_file() else self.folder / "rank00000.json"
        return json.loads(file.read_bytes())["state"]

    @property
    def world_size(self) -> int:
        """Number of processes that wrote the checkpoint."""
        return len(list(self.folder.glob("rank*.json")))
