"""The `convert` command: published checkpoints, adapters and token tars in this package's form."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from polyzoo.core.errors import DataError, UsageError, WeightsError
from polyzoo.core.io import atomic_write
from polyzoo.core.weights import convert_pickle, load_into, read_weights
from polyzoo.seed import adapters
from polyzoo.seed.config import SeedConfig
from polyzoo.seed.folders import save_parts
from polyzoo.seed.language import Language, load_language, save_language
from polyzoo.seed.model import SeedModel
from polyzoo.seed.options import ConvertConfig
from polyzoo.seed.published import eva_file, infer_config, rename, to_float32, without_text

_LARGEST_PICKLE = 2**20


@dataclass(frozen=True)
class ConvertReport:
    """What was written."""

    out: str
    records: int
    """Tensors, or records."""
    note: str


def main(config: ConvertConfig) -> ConvertReport:
    """Run the command."""
    if config.what == "tokenizer":
        if not config.checkpoint:
            raise UsageError(
                "convert tokenizer needs --checkpoint: seed_quantizer.pt with --vision "
                "eva_vit_g.pth (v2), or causal_qformer.pth seed_tokenizer.pth (v1)"
            )
        return convert_tokenizer(config.checkpoint, config.out, vision=config.vision)
    if config.what == "adapters":
        if config.adapters is None:
            raise UsageError("convert adapters needs --adapters, the folder of train-lm")
        return merge_adapters(config.adapters, config.out, base=config.base)
    if config.tars is None:
        raise UsageError("convert tokens needs --tars, a .tar or a folder of them")
    return convert_tars(config.tars, config.out)


def convert_tokenizer(
    checkpoints: Sequence[Path], out: Path, *, vision: Path | None = None
) -> ConvertReport:
    """Write a tokenizer folder from SEED's own files.

    Args:
        checkpoints: One after the other; later ones win. Pickles are read without running code.
        out: Folder to write.
        vision: The ViT, where it is a file of its own.

    Raises:
        WeightsError: A group of tensors is missing, or something does not fit.
    """
    tensors: dict[str, Tensor] = {}
    for path in checkpoints:
        tensors.update(_read(path))
    if vision is not None:
        tensors.update(eva_file(_read(vision)))
    model = build(tensors)
    save_parts(out, model)
    head = model.config.head
    version = "v1" if head.target == "text" else "v2"
    return ConvertReport(str(out), len(model.state_dict()), f"{version}, {head.kind} head")


def build(tensors: Mapping[str, Tensor], **heads: int) -> SeedModel:
    """Return the model that published tensors make up, loaded strictly.

    Args:
        tensors: With their published names.
        heads: Head counts where they are not the published ones (see `infer_config`).
    """
    renamed = to_float32(rename(tensors))
    config: SeedConfig = without_text(infer_config(renamed, **heads), renamed)
    if not config.qformer.vocabulary:
        drop = ("qformer.words.", "qformer.positions.")
        renamed = {
            name: value
            for name, value in renamed.items()
            if not name.startswith(drop) and ".text_ffn." not in name
        }
    if config.contrast_dim and "contrast.temperature" not in renamed:
        config = replace(config, contrast_dim=0)
        renamed = {k: v for k, v in renamed.items() if not k.startswith("contrast.")}
    model = SeedModel(config)
    load_into(model, renamed, source="the checkpoint")
    return model


def merge_adapters(folder: Path, out: Path, *, base: str | None = None) -> ConvertReport:
    """Write a plain model out of adapters and their base, grown as it was for training."""
    language = load_language(folder, base=base)
    merged = Language(adapters.merge(language.model), language.tokenizer, language.vocabulary)
    save_language(out, merged)
    return ConvertReport(str(out), len(merged.model.state_dict()), "merged")


def convert_tars(tars: Path, out: Path) -> ConvertReport:
    """Write one .jsonl of records out of the reference's tars of pickles.

    The pickles are read by an unpickler that knows lists, numbers and texts only.
    """
    paths = sorted(tars.glob("*.tar")) if tars.is_dir() else [tars]
    if not paths or not all(path.is_file() for path in paths):
        raise DataError(f"{tars}: no .tar there")
    count = 0
    with atomic_write(out / "records.jsonl", "w") as file:
        for path in paths:
            for record in _records(path):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                count += 1
    return ConvertReport(str(out), count, f"from {len(paths)} tars; for train-lm --data.records")


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if not member.isfile() or not member.name.endswith(".pkl"):
                continue
            if member.size > _LARGEST_PICKLE:
                raise DataError(f"{path}: {member.name} has {member.size:,} bytes; a record?")
            stream = archive.extractfile(member)
            assert stream is not None  # noqa: S101 - a regular file
            record = _Plain(io.BytesIO(stream.read()), f"{path}: {member.name}").load()
            if not isinstance(record, dict):
                raise DataError(f"{path}: {member.name} holds {type(record).__name__}, no record")
            yield {str(key): _listed(value) for key, value in record.items()}


class _Plain(pickle.Unpickler):
    """Refuses everything that is not built in: reading a pickle could run its author's code."""

    def __init__(self, stream: io.BytesIO, where: str) -> None:
        super().__init__(stream)
        self.where = where

    def find_class(self, module: str, name: str) -> NoReturn:
        raise DataError(
            f"{self.where}: refused, since reading it would call {module}.{name}; records may hold "
            "lists, numbers and texts only"
        )

    def load(self) -> Any:
        try:
            return super().load()
        except DataError:
            raise
        except Exception as error:  # damaged pickles raise whatever they stumble over
            raise DataError(f"{self.where}: is damaged: {error}") from error


def _listed(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_listed(item) for item in value]
    return value


def _read(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise WeightsError(f"{path}: no such file")
    pickled = path.is_file() and path.suffix in (".pt", ".pth", ".bin", ".ckpt")
    return convert_pickle(path) if pickled else read_weights(path)
