"""The `convert` command: official checkpoints and the CoSQA files in this package's form."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyzoo.core.errors import DataError, UsageError, WeightsError
from polyzoo.core.io import atomic_write
from polyzoo.core.weights import convert_pickle, load_into
from polyzoo.sea.config import Aggregator, SeaConfig, SplitConfig
from polyzoo.sea.encoding.encoder import PackedEncoder
from polyzoo.sea.encoding.encoder_loading import empty_encoder
from polyzoo.sea.folders import save_folder
from polyzoo.sea.model import SeaModel
from polyzoo.sea.model_sources import encoder_folder
from polyzoo.sea.options import ConvertConfig

_WRAPPED = "module."  # what DataParallel puts before every name
_DROPPED = ("encoder.embeddings.position_ids",)  # a buffer of older transformers
_FUSION = "fusion_layer."
_NAMES = (
    ("encoder.", "encoder.model."),
    ("fusion_layer.embedding_common.", "aggregation.score."),
    ("fusion_layer.global_emb_weight_net.weight", "aggregation.raw_weight"),
)


@dataclass(frozen=True)
class ConvertReport:
    """What was written."""

    out: list[str]
    records: int
    """Tensors of a checkpoint, or records of the codebase."""
    queries: int


def main(config: ConvertConfig) -> ConvertReport:
    """Run the command."""
    if config.what == "checkpoint":
        if config.checkpoint is None or config.encoder is None:
            raise UsageError("convert checkpoint needs --checkpoint FILE and --encoder FOLDER")
        return convert_checkpoint(
            config.checkpoint, config.out, encoder=config.encoder, aggregator=config.aggregator
        )
    if config.codes is None or config.queries is None:
        raise UsageError("convert cosqa needs --codes code_idx_map.txt and --queries FILE.json")
    return convert_cosqa(config.codes, config.queries, config.out)


def convert_checkpoint(
    checkpoint: Path, out: Path, *, encoder: str, aggregator: Aggregator
) -> ConvertReport:
    """Write a model folder from an official model.best.bin.

    Args:
        checkpoint: State dict; read without running its code.
        out: Folder to write.
        encoder: Folder or hub id with the config and the tokenizer it was trained from.
        aggregator: How it was trained: one_layer is attn1, two_layer attn2, with averaging *_sum.
    """
    source = encoder_folder(encoder)
    config = SeaConfig(
        encoder=encoder,
        pooling="pooler",
        normalize=False,
        aggregator=aggregator,
        split=SplitConfig(profile="released"),
    )
    model = SeaModel(
        PackedEncoder(empty_encoder(source, pooling="pooler"), pooling="pooler"), config
    )
    tensors = rename(convert_pickle(checkpoint), aggregator=aggregator, source=str(checkpoint))
    load_into(model, tensors, source=str(checkpoint))
    save_folder(out, model, tokenizer_folder=source)
    return ConvertReport(out=[str(out)], records=len(tensors), queries=0)


def rename(
    tensors: Mapping[str, Tensor], *, aggregator: Aggregator, source: str
) -> dict[str, Tensor]:
    """Official names to ours."""
    plain = {name.removeprefix(_WRAPPED): tensor for name, tensor in tensors.items()}
    learned = aggregator.startswith("attn")
    if learned and not any(name.startswith(_FUSION + "embedding_common") for name in plain):
        raise WeightsError(
            f"{source}: holds no fusion_layer.*, so no trained aggregation, but aggregator "
            f"{aggregator!r} needs one: use first, mean or max, or train it"
        )
    result: dict[str, Tensor] = {}
    for name, tensor in plain.items():
        if name in _DROPPED:
            continue
        if name.startswith(_FUSION):
            unused = not learned or (
                "global_emb_weight_net" in name and not aggregator.endswith("_sum")
            )
            if unused:
                continue
        new = next((to + name[len(old) :] for old, to in _NAMES if name.startswith(old)), name)
        result[new] = tensor.to(torch.float32)
    return result


def convert_cosqa(codes: Path, queries: Path, out: Path) -> ConvertReport:
    """Write codebase.jsonl.gz and queries.jsonl.gz from CoSQA's public retrieval files.

    Docstrings stay in the functions, as in that benchmark: evaluate with --keep-docstrings.

    Args:
        codes: code_idx_map.txt, a JSON object from code to index.
        queries: cosqa-retrieval-{dev,test}-500.json, a list with `doc` and `retrieval_idx`.
        out: Folder to write.
    """
    pool = _json(codes, dict)
    asked = _json(queries, list)
    code_of = {int(index): code for code, index in pool.items()}
    if len(code_of) != len(pool):
        raise DataError(f"{codes}: {len(pool) - len(code_of)} indices occur twice")
    records = [_record(index, code, "") for index, code in sorted(code_of.items())]
    pairs: list[dict[str, Any]] = []
    for place, item in enumerate(asked):
        try:
            index, text = int(item["retrieval_idx"]), str(item["doc"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{queries}: entry {place} has no doc and retrieval_idx ({error!r})"
            ) from error
        if index not in code_of:
            raise DataError(f"{queries}: entry {place} points to code {index}, not in {codes}")
        pairs.append({**_record(index, code_of[index], text), "id": f"query-{place}"})
    paths = [out / "codebase.jsonl.gz", out / "queries.jsonl.gz"]
    for path, rows in zip(paths, (records, pairs), strict=True):
        with atomic_write(path) as file, gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as zipped:
            for row in rows:
                zipped.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    return ConvertReport(
        out=[str(path) for path in paths], records=len(records), queries=len(pairs)
    )


def _record(index: int, code: str, query: str) -> dict[str, Any]:
    return {
        "url": f"cosqa-{index}",
        "language": "python",
        "original_string": code,
        "code": code,
        "docstring": query,
        "docstring_tokens": query.split(),
    }


def _json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, kind):
        raise DataError(f"{path}: a JSON {kind.__name__} is wanted, not {type(content).__name__}")
    return content
