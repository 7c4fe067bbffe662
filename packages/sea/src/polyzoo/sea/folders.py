"""Model folders: what `from_pretrained` reads and training writes.

A folder holds `config.json` (SeaConfig) and `model.safetensors`. Either the encoder is in it, with
its Hugging Face config and tokenizer under `encoder/` (config.encoder is "self"), or only a
low-rank change of a named encoder is (config.adapter is set), and the encoder is fetched apart.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from polyzoo.core import config as configs
from polyzoo.core.errors import ConfigError, WeightsError
from polyzoo.core.io import atomic_folder
from polyzoo.core.weights import FILE_NAME, load_into, read_weights, write_weights
from polyzoo.sea.config import AdapterConfig, SeaConfig
from polyzoo.sea.encoding.encoder import PackedEncoder
from polyzoo.sea.encoding.encoder_loading import empty_encoder
from polyzoo.sea.encoding.tokenizer import SeaTokenizer
from polyzoo.sea.identity import fingerprint
from polyzoo.sea.model import SeaModel
from polyzoo.sea.model_sources import CONFIG_NAME, encoder_folder

ENCODER_FOLDER = "encoder"
SELF = "self"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json",
    "merges.txt", "added_tokens.json",
)  # fmt: skip
_DOWN, _UP, _PROBE = ".adapter_down", ".adapter_up", "encoder_probe"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for use, in float32 on the CPU."""

    model: SeaModel
    tokenizer: SeaTokenizer
    config: SeaConfig
    tokenizer_folder: Path
    fingerprint: str
    """Hash of configuration and weights: tells whether two sets of vectors are comparable."""


@dataclass(frozen=True)
class LowRank:
    """Change of one matrix: scale * up @ down."""

    down: Tensor
    """(r, in)."""
    up: Tensor
    """(out, r)."""


def build_bare(config: SeaConfig, *, local_files_only: bool = False) -> LoadedModel:
    """An encoder as it comes, with a fresh aggregation."""
    folder = encoder_folder(config.encoder, local_files_only=local_files_only)
    encoder = PackedEncoder.from_folder(folder, pooling=config.pooling)
    encoder.probe()
    return _checked(SeaModel(encoder, config), config, folder, own=None)


def load_folder(folder: str | Path, *, local_files_only: bool = False) -> LoadedModel:
    """Read a model folder; strict about names and shapes."""
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise WeightsError(f"{folder}: no {CONFIG_NAME}; a folder written by training is wanted")
    config = configs.load(SeaConfig, folder / CONFIG_NAME)
    tensors = read_weights(folder / FILE_NAME, dtype=torch.float32)
    if config.adapter is not None:
        base = encoder_folder(config.encoder, beside=folder, local_files_only=local_files_only)
        encoder = PackedEncoder.from_folder(base, pooling=config.pooling)
        _check_base(encoder.model, tensors, name=config.encoder)
        model = SeaModel(encoder, config)
        rest = _merge(encoder.model, tensors, config.adapter.scale, source=str(folder))
        load_into(model.aggregation, rest, source=str(folder))
        return _checked(model, config, base, own=folder)
    base = encoder_folder(config.encoder, beside=folder, local_files_only=local_files_only)
    encoder = PackedEncoder(empty_encoder(base, pooling=config.pooling), pooling=config.pooling)
    model = SeaModel(encoder, config)
    load_into(model, tensors, source=str(folder / FILE_NAME))
    encoder.probe()
    return _checked(model, config, base, own=folder)


def save_folder(
    folder: str | Path,
    model: SeaModel,
    *,
    tokenizer_folder: str | Path,
    int8: bool = False,
    adapter: Mapping[str, LowRank] | None = None,
    scale: float = 1.0,
) -> Path:
    """Write a model folder, replacing one that is there.

    Args:
        folder: Where it goes.
        model: What is written.
        tokenizer_folder: Folder of the encoder's config and tokenizer.
        int8: Store every large matrix as int8 with one float16 scale per row, the rest as
            float16: a quarter of the size.
        adapter: Write only this change of the encoder, by module name inside the encoder, as
            float16; the config keeps naming the encoder it belongs to.
        scale: Of the adapter.
    """
    folder, source = Path(folder), Path(tokenizer_folder)
    tokenizer = SeaTokenizer.from_folder(source, split_identifiers=model.config.split_identifiers)
    config = replace(model.config, tokenizer_sha256=tokenizer.sha256)
    if adapter is not None:
        rank = next(iter(adapter.values())).down.shape[0] if adapter else 0
        config = replace(config, adapter=AdapterConfig(rank=rank, scale=scale))
        tensors = {f"aggregation.{k}": v for k, v in model.aggregation.state_dict().items()}
        for name, change in adapter.items():
            tensors |= {name + _DOWN: change.down, name + _UP: change.up}
        tensors[_PROBE] = _probe(model.encoder.model)
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
    else:
        config = replace(config, encoder=SELF, adapter=None)
        tensors = dict(model.state_dict())
    large = {name for name, x in tensors.items() if x.dim() == 2 and x.numel() >= 4096}
    rows = large if int8 and adapter is None else set()
    if int8:
        tensors = {
            name: x if name in rows or not x.is_floating_point() else x.half()
            for name, x in tensors.items()
        }
    with atomic_folder(folder, replace=True) as temporary:
        configs.save(config, temporary / CONFIG_NAME)
        write_weights(temporary / FILE_NAME, tensors, int8_rows=sorted(rows))
        if adapter is None:
            target = temporary / ENCODER_FOLDER
            target.mkdir()
            model.encoder.model.config.save_pretrained(target)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
            for name in _TOKENIZER_FILES:
                if (source / name).is_file() and (name == "tokenizer.json" or not _fast(source)):
                    shutil.copyfile(source / name, target / name)
    return folder


def _checked(model: SeaModel, config: SeaConfig, folder: Path, *, own: Path | None) -> LoadedModel:
    tokenizer = SeaTokenizer.from_folder(folder, split_identifiers=config.split_identifiers)
    if config.tokenizer_sha256 and config.tokenizer_sha256 != tokenizer.sha256:
        raise ConfigError(
            f"{folder}: its tokenizer is not the one the model was trained with "
            f"({tokenizer.sha256[:12]} instead of {config.tokenizer_sha256[:12]})"
        )
    model.encoder.check(
        budget=config.split.longest,
        special=tokenizer.special.count,
        pad_id=tokenizer.special.pad_id,
        vocab_size=tokenizer.vocab_size,
    )
    model.encoder.check(
        budget=config.max_query_tokens - tokenizer.special.count,
        special=tokenizer.special.count,
        pad_id=tokenizer.special.pad_id,
        vocab_size=tokenizer.vocab_size,
    )
    model.eval()
    elsewhere = own is None or config.encoder != SELF
    probe = _probe(model.encoder.model).numpy().tobytes() if elsewhere else b""
    return LoadedModel(model, tokenizer, config, folder, fingerprint(config, own, probe=probe))


def _probe(model: nn.Module) -> Tensor:
    """A few weights from all over an encoder, to recognise it by; rounding does not matter."""
    flat = [
        tensor.detach().float().flatten()[:8].cpu()
        for name, tensor in sorted(model.state_dict().items())
        if tensor.is_floating_point() and "pooler" not in name
    ]
    return torch.cat(flat)


def _check_base(model: nn.Module, tensors: dict[str, Tensor], *, name: str) -> None:
    wanted, found = tensors.pop(_PROBE, None), _probe(model)
    if wanted is None:
        return
    if wanted.shape != found.shape or (wanted - found).abs().max() > 2e-3 * found.abs().max():
        raise WeightsError(
            f"encoder {name!r} is not the one this adapter was trained on: fetch the original "
            f"(`polyzoo assets fetch {name}`, or the hub id or folder it came from)"
        )


@torch.no_grad()
def _merge(
    model: nn.Module, tensors: Mapping[str, Tensor], scale: float, *, source: str
) -> dict[str, Tensor]:
    """Add the low-rank changes to the encoder; return what belongs to the aggregation."""
    rest = {
        name.removeprefix("aggregation."): tensor
        for name, tensor in tensors.items()
        if name.startswith("aggregation.")
    }
    for name in [key for key in tensors if key.endswith(_DOWN)]:
        module = name.removesuffix(_DOWN)
        try:
            weight = model.get_submodule(module).weight
            change = tensors[module + _UP] @ tensors[name]
        except (AttributeError, KeyError, RuntimeError) as error:
            raise WeightsError(
                f"{source}: the change of {module!r} does not fit: {error}"
            ) from error
        if not isinstance(weight, Tensor) or weight.shape != change.shape:
            raise WeightsError(
                f"{source}: the change of {module!r} is {tuple(change.shape)}, "
                "the encoder's weight has another shape"
            )
        weight += scale * change
    return rest


def _fast(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file()
