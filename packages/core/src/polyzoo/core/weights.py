"""Weights on disk: safetensors only, read with suspicion, loaded strictly, written atomically."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from polyzoo.core import int8_rows as int8
from polyzoo.core.errors import WeightsError
from polyzoo.core.io import atomic_path
from polyzoo.core.weight_files import FILE_NAME as FILE_NAME
from polyzoo.core.weight_files import find_files, read_header


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

    Example:
        >>> load_into(model, read_weights("model.safetensors"), source="model.safetensors")
    """
    tensors: dict[str, Tensor] = {}
    for file, names in find_files(Path(path)).items():
        found = _read_file(file, device)
        missing = [name for name in names or () if name not in found]
        if missing:
            raise WeightsError(f"{file}: the index promises {missing[0]!r}, which is not in it")
        tensors.update(found if names is None else {name: found[name] for name in names})
    if dtype is not None:
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    return tensors


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the text entries in the header of one safetensors file."""
    return read_header(Path(path)).get("__metadata__", {})


def write_weights(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    int8_rows: Collection[str] = (),
) -> None:
    """Write tensors to one safetensors file, atomically.

    Args:
        path: The file.
        tensors: Name to tensor, on any device. Those that share memory are written once each.
        metadata: Text entries for the header.
        int8_rows: Names to store as int8 with one float16 scale per row (index along the first
            axis): a quarter of the size, each entry off by at most 1/253 of its row's peak.
    """
    unknown = sorted(set(int8_rows) - set(tensors))
    if unknown:
        raise WeightsError(f"int8_rows names {unknown[0]!r}, which is not among the tensors")
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain |= int8.quantise(name, tensor) if name in int8_rows else {name: tensor}
    header = {"format": "pt", **(metadata or {}), **int8.header_entry(int8_rows)}
    with atomic_path(path) as temporary:
        temporary.touch()
        usual = temporary.stat().st_mode  # some writers below keep it, some make the file private
        try:
            save_file(_unshared(plain), temporary, metadata=header)
            temporary.chmod(usual)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number:  # such as a full disk; atomic_path knows what to say
                raise OSError(int(number[1]), str(error)) from error
            raise WeightsError(f"{path}: {error}") from error


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
    lists = {"missing": missing, "unexpected": unexpected, "misshaped": misshaped}
    if any(lists.values()):
        report = "; ".join(_first(kind, names) for kind, names in lists.items() if names)
        hint = _hint(missing, unexpected)
        raise WeightsError(f"{source}: does not fit {type(module).__name__}: {report}{hint}")
    on_meta = any(value.is_meta for value in own.values())
    module.load_state_dict(dict(tensors), strict=True, assign=on_meta)


def convert_pickle(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a PyTorch checkpoint (.pt, .pth, .bin, .ckpt) without running its code.

    Where the file holds more, the mapping under "state_dict" or "model" is taken.

    Raises:
        WeightsError: The file would run code, is damaged, or holds no mapping of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > 2 * path.stat().st_size + 2**20:
                raise WeightsError(f"{path}: is compressed, as PyTorch never writes them; a bomb?")
        data = torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it calls {culprit[1]}" if culprit else "it holds more than tensors"
        raise WeightsError(
            f"{path}: refused, since reading it could run code of its author ({what}); ask for "
            "safetensors, or for a checkpoint of plain tensors"
        ) from None
    except Exception as error:  # torch raises whatever a damaged file makes it stumble over
        problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{path}: is damaged, or no PyTorch checkpoint: {problem}") from error
    for key in ("state_dict", "model"):
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    if not isinstance(data, Mapping) or not data:
        raise WeightsError(f"{path}: holds {type(data).__name__}; expected names with tensors")
    for name, value in data.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise WeightsError(f"{path}: {name!r} holds {type(value).__name__}; expected a tensor")
    return dict(data)


def _read_file(file: Path, device: str | torch.device) -> dict[str, Tensor]:
    metadata = read_header(file).get("__metadata__", {})
    try:
        with safe_open(file, framework="pt", device=str(device)) as opened:
            names = list(opened.keys())
            return int8.restore({name: opened.get_tensor(name) for name in names}, metadata)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the reader raises several kinds on damaged files
        raise WeightsError(f"{file}: is damaged: {error}") from error


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU tensors, each with memory of its own: the format knows no sharing."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.nbytes:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        out[name] = plain
    return out


def _first(kind: str, names: list[str], shown: int = 3) -> str:
    more = ", ..." if len(names) > shown else ""
    return f"{len(names)} {kind} ({', '.join(names[:shown])}{more})"


def _hint(missing: list[str], unexpected: list[str]) -> str:
    for prefix in ("module.", "_orig_mod.", "model.", "base_model.model."):
        inner = {name.removeprefix(prefix) for name in unexpected if name.startswith(prefix)}
        if len(inner) == len(unexpected) and inner & set(missing):
            return f". Every unexpected name starts with {prefix!r}: strip it"
    return ""
