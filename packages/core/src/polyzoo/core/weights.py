"""Weights on disk: safetensors only, read with suspicion, loaded strictly, written atomically."""

from __future__ import annotations

import errno
import json
import pickle
import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from polyzoo.core.errors import WeightsError
from polyzoo.core.io import atomic_path

FILE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
INT8_KEY = "polyzoo.int8_rows"
SCALE_SUFFIX = ".int8_scale"
MAX_HEADER = 100 * 2**20
MAX_INDEX = 64 * 2**20
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_weights(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, of a folder, or of a sharded index.

    Rows stored as int8 come back as floating point.

    Args:
        path: A .safetensors file, its .index.json, or a folder that holds one of them.
        device: Where the tensors go.
        dtype: What floating-point tensors become; as stored where not given (int8 rows: float32).

    Raises:
        WeightsError: The file is missing, unsafe, damaged, or not safetensors at all.
    """
    tensors: dict[str, Tensor] = {}
    for file, names in _files(Path(path)).items():
        stored, metadata = _read_file(file, device)
        missing = [name for name in names or () if name not in stored]
        if missing:
            raise WeightsError(f"{file}: the index promises {missing[0]!r}, which is not in it")
        found = _dequantise(file, stored, metadata)
        tensors.update({name: found[name] for name in names} if names else found)
    if dtype is not None:
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    return tensors


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the text entries in the header of one safetensors file."""
    file = Path(path)
    return _header(file).get("__metadata__", {})


def write_weights(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    int8_rows: Collection[str] = (),
) -> None:
    """Write tensors to one safetensors file, atomically.

    Args:
        path: The file. Tensors that share memory are written once each.
        tensors: Name to tensor, on any device.
        metadata: Text entries for the header.
        int8_rows: Names to store as int8 with one float16 scale per row (index along the first
            axis); the error of an entry is at most half its row's scale, 1/254 of the row's peak.
    """
    unknown = sorted(set(int8_rows) - set(tensors))
    if unknown:
        raise WeightsError(f"int8_rows names {unknown[0]!r}, which is not among the tensors")
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if name in int8_rows:
            plain[name], plain[name + SCALE_SUFFIX] = _quantise(name, tensor)
        else:
            # A copy only where tensors share memory: safetensors has no notion of sharing.
            shared = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
            plain[name] = tensor.cpu().contiguous().clone() if shared else tensor.cpu().contiguous()
    header = {"format": "pt", **(metadata or {})}
    if int8_rows:
        header[INT8_KEY] = json.dumps(sorted(int8_rows))
    with atomic_path(path) as temporary:
        try:
            save_file(_unshared(plain), temporary, metadata=header)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number:
                raise OSError(int(number[1]), str(error)) from error
            raise WeightsError(f"{path}: {error}") from error
        temporary.chmod(0o644)


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Copy tensors into a module whose names and shapes they must match exactly.

    A module on the meta device takes the tensors themselves.

    Args:
        module: The model.
        tensors: As `read_weights` gives them.
        source: Where they come from, for the error.

    Raises:
        WeightsError: One error with the first missing, unexpected and misshaped names, their
            counts, and what to do where the pattern is known.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in tensors]
    unexpected = [name for name in tensors if name not in own]
    misshaped = [
        f"{name} {tuple(tensors[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if missing or unexpected or misshaped:
        lists = (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped))
        raise WeightsError(
            f"{source}: does not fit {type(module).__name__}: "
            + "; ".join(_first(kind, names) for kind, names in lists if names)
            + _hint(missing, unexpected)
        )
    module.load_state_dict(dict(tensors), strict=True, assign=any(v.is_meta for v in own.values()))


def convert_pickle(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a PyTorch checkpoint (.pt, .pth, .bin, .ckpt) without running its code.

    A mapping under "state_dict" or "model" is taken where the file holds more than tensors.

    Raises:
        WeightsError: The file holds anything but tensors and plain values, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > 2 * path.stat().st_size + 2**20:
                raise WeightsError(f"{path}: is compressed; PyTorch never writes such files")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = str(error).strip().splitlines()[0]
        raise WeightsError(
            f"{path}: refused, because reading it would run code it brings along ({first}); "
            "ask its author for safetensors, or for a file of plain tensors"
        ) from None
    except Exception as error:
        raise WeightsError(f"{path}: is not a PyTorch checkpoint, or is damaged: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    if not isinstance(data, Mapping) or not data:
        raise WeightsError(f"{path}: holds {type(data).__name__}; expected names with tensors")
    for name, value in data.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise WeightsError(f"{path}: {name!r} holds {type(value).__name__}; expected a tensor")
    return dict(data)


def _files(path: Path) -> dict[Path, list[str] | None]:
    """Return the files to read, each with the names wanted from it (None: all)."""
    if path.is_dir():
        for name in (FILE_NAME, INDEX_NAME):
            if (path / name).exists():
                return _files(path / name)
        lone = sorted(path.glob("*.safetensors"))
        if len(lone) == 1:
            return {lone[0]: None}
        pickles = [file.name for file in path.iterdir() if file.suffix in PICKLES]
        hint = f"; {pickles[0]} is a pickle, which must be converted first" if pickles else ""
        raise WeightsError(f"{path}: holds neither {FILE_NAME} nor {INDEX_NAME}{hint}")
    if not path.exists():
        raise WeightsError(f"{path}: no such file")
    return _shards(path) if path.name.endswith(".json") else {path: None}


def _shards(index: Path) -> dict[Path, list[str] | None]:
    try:
        if index.stat().st_size > MAX_INDEX:
            raise WeightsError(f"{index}: larger than {MAX_INDEX:,} bytes")
        weight_map = json.loads(index.read_bytes())["weight_map"]
        items = [(str(name), str(file)) for name, file in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{index}: is not an index of safetensors shards ({error})") from None
    shards: dict[Path, list[str] | None] = {}
    for name, file in items:
        if not re.fullmatch(r"[\w][\w.\-]*\.safetensors", file):
            raise WeightsError(f"{index}: shard {file!r} must be a .safetensors name in the same folder")
        wanted = shards.setdefault(index.parent / file, [])
        if wanted is not None:
            wanted.append(name)
    for shard in shards:
        _check_inside(shard)
    if not shards:
        raise WeightsError(f"{index}: names no shards")
    return shards


def _check_inside(shard: Path) -> None:
    if not shard.exists():
        raise WeightsError(f"{shard}: no such file, though the index names it")
    folder, target = shard.parent.resolve(), shard.resolve()
    homes = [folder]
    if folder.parent.name == "snapshots":  # the hub's cache keeps each revision as links into blobs
        homes.append(folder.parent.parent / "blobs")
    if target.parent not in homes:
        raise WeightsError(f"{shard}: links to {target}, outside its folder; copy the file there instead")


def _header(file: Path) -> dict[str, Any]:
    """Check what the library leaves unsaid, and say what a wrong file really is."""
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            if start[:2] == b"PK" or start[:1] == b"\x80":
                raise WeightsError(
                    f"{file}: is a pickle (PyTorch checkpoint), not safetensors; renaming does not "
                    "make it safe to read, converting it does"
                )
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= min(MAX_HEADER, file.stat().st_size - 8):
                raise WeightsError(f"{file}: is not safetensors, or its start is damaged")
            header = json.loads(stream.read(length), object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{file}: its header is damaged ({error})") from None
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read: {error.strerror or error}") from None
    if not isinstance(header, dict):
        raise WeightsError(f"{file}: its header is damaged (not a mapping)")
    return header


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a name is given twice")
    return mapping


def _read_file(file: Path, device: str | torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
    metadata = _header(file).get("__metadata__", {})
    try:
        with safe_open(file, framework="pt", device=str(device)) as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, metadata  # noqa: SIM118
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise WeightsError(f"{file}: is damaged: {error}") from error


def _quantise(name: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
    if tensor.ndim < 2 or not tensor.is_floating_point():
        raise WeightsError(f"int8_rows: {name!r} must be floating point with two or more axes")
    rows = tensor.float().cpu().flatten(1)
    if not rows.isfinite().all():
        raise WeightsError(f"int8_rows: {name!r} holds values that are not finite")
    # Rounded up to float16, so that the row's peak still fits into 127 steps.
    scale = (rows.abs().amax(1) / 127 * (1 + 2**-10)).half()
    if not scale.isfinite().all():
        raise WeightsError(f"int8_rows: {name!r} has a row too large for a float16 scale")
    steps = rows / scale.float().clamp_min(torch.finfo(torch.float16).smallest_normal / 1024)[:, None]
    return steps.round().clamp(-127, 127).to(torch.int8).view(tensor.shape), scale


def _dequantise(
    file: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, Tensor]:
    if INT8_KEY not in metadata:
        return tensors
    try:
        for name in json.loads(metadata[INT8_KEY]):
            scale, steps = tensors.pop(name + SCALE_SUFFIX), tensors[name]
            if steps.dtype != torch.int8 or scale.shape != steps.shape[:1]:
                raise ValueError(f"{name!r} has {tuple(scale.shape)} scales for {tuple(steps.shape)}")
            tensors[name] = steps.float() * scale.float().view(-1, *[1] * (steps.ndim - 1))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightsError(f"{file}: its int8 rows are damaged: {error}") from None
    return tensors


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        if pointer in seen and tensor.numel():
            tensors[name] = tensor.clone()
        seen.add(pointer)
    return tensors


def _first(kind: str, names: list[str], shown: int = 3) -> str:
    more = ", ..." if len(names) > shown else ""
    return f"{len(names)} {kind} ({', '.join(names[:shown])}{more})"


def _hint(missing: list[str], unexpected: list[str]) -> str:
    for prefix in ("module.", "_orig_mod.", "model.", "base_model.model."):
        if unexpected and all(name.startswith(prefix) for name in unexpected):
            stripped = {name.removeprefix(prefix) for name in unexpected}
            if stripped & set(missing):
                return f". Every unexpected name starts with {prefix!r}: save the inner module, or strip it"
    return ""
