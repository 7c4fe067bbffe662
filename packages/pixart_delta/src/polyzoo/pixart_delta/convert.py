"""The `convert` command: official checkpoints to folders in diffusers' layout, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polyzoo.core.errors import UsageError, WeightsError
from polyzoo.core.weights import convert_pickle, load_into, read_weights, write_weights
from polyzoo.pixart_delta import layout
from polyzoo.pixart_delta.config import ControlConfig, PixArtConfig
from polyzoo.pixart_delta.folders import (
    build_control,
    build_transformer,
    finite,
    load_control,
    load_null,
    load_transformer,
    save_control,
    save_null,
    save_transformer,
)
from polyzoo.pixart_delta.hed import HedNetwork
from polyzoo.pixart_delta.loading import infer_shape
from polyzoo.pixart_delta.options import ConvertConfig

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class ConvertReport:
    """What was found, and what was written."""

    found: str
    out: str
    tensors: int
    parameters: int


def main(config: ConvertConfig) -> ConvertReport:
    """Run the command."""
    if config.source.is_dir():
        return _to_official(config)
    tensors = finite(_read(config), config.source)
    if "norm" in tensors and "block1.projection.weight" in tensors:
        return _hed(config, tensors)
    if any(name.startswith(("controlnet.", "base_model.")) for name in tensors):
        return _control(config, tensors)
    if layout.is_official(tensors):
        null = tensors.get(layout.NULL_CAPTION)
        weights = layout.to_diffusers(tensors, source=str(config.source))
    else:
        null, weights = None, dict(tensors)
    shape = _shape(config, weights, null)
    model = build_transformer(shape, weights, source=str(config.source))
    save_transformer(config.out, model, kind=config.kind, dtype=_dtype(config))
    if null is not None:
        save_null(config.out, null)
    return _report(f"PixArt transformer, {_described(shape)}", config, model.state_dict())


def _read(config: ConvertConfig) -> dict[str, Tensor]:
    path = config.source
    if path.suffix == ".safetensors":
        return read_weights(path)
    if config.use_ema:
        data = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(data, Mapping) or "state_dict_ema" not in data:
            raise WeightsError(f"{path}: holds no averaged weights (state_dict_ema)")
        return dict(data["state_dict_ema"])
    return convert_pickle(path)


def _shape(config: ConvertConfig, weights: dict[str, Tensor], null: Tensor | None) -> PixArtConfig:
    shape = infer_shape(
        weights,
        source=str(config.source),
        sample_size=config.sample_size,
        heads=config.heads,
    )
    if null is not None:
        if len(null) == 300:
            raise WeightsError(
                f"{config.source}: 300 caption tokens: this looks like PixArt-Sigma, which is "
                "another model"
            )
        shape = replace(shape, caption_length=len(null))
    return shape


def _control(config: ConvertConfig, tensors: dict[str, Tensor]) -> ConvertReport:
    base, branch = layout.split_control(tensors, source=str(config.source))
    if not base:
        raise WeightsError(
            f"{config.source}: holds the branch without its transformer; its shape cannot be read "
            "off: convert the full file"
        )
    null = tensors.get(f"base_model.{layout.NULL_CAPTION}")
    shape = _shape(config, base, null)
    count = 1 + max(int(name.split(".")[1]) for name in branch)
    built = build_control(shape, ControlConfig(num_blocks=count), branch, str(config.source))
    save_control(config.out, built, dtype=_dtype(config))
    written = dict(built.state_dict())
    if config.full:
        model = build_transformer(shape, base, source=str(config.source))
        save_transformer(config.out, model, kind=config.kind, dtype=_dtype(config))
        if null is not None:
            save_null(config.out, null)
        written |= model.state_dict()
    return _report(f"control branch of {count} blocks, {_described(shape)}", config, written)


def _hed(config: ConvertConfig, tensors: dict[str, Tensor]) -> ConvertReport:
    if config.out.suffix != ".safetensors":
        raise UsageError(f"--out {config.out}: the edge detector becomes one .safetensors file")
    network = HedNetwork()
    load_into(network, tensors, source=str(config.source))
    kind = _dtype(config)
    values = {n: t if kind is None else t.to(kind) for n, t in network.state_dict().items()}
    write_weights(config.out, values)
    return _report("HED edge detector", config, values)


def _to_official(config: ConvertConfig) -> ConvertReport:
    if config.out.suffix != ".safetensors":
        raise UsageError(
            f"--out {config.out}: a folder becomes an official file; the name must end in "
            ".safetensors"
        )
    folder = config.source
    inner = folder / "transformer"
    model, kind = load_transformer(inner if inner.is_dir() else folder)
    weights = dict(model.state_dict())
    if config.full:
        branch = load_control(folder / "controlnet", transformer=model.shape)
        official = layout.join_control(branch.state_dict(), weights)
    else:
        official = layout.to_official(weights, null_caption=load_null(folder), source=str(folder))
    wanted = _dtype(config)
    if wanted is not None:
        official = {name: tensor.to(wanted) for name, tensor in official.items()}
    write_weights(config.out, official, metadata={"polyzoo.kind": kind} if kind else None)
    return _report("transformer in diffusers' layout", config, official)


def _dtype(config: ConvertConfig) -> torch.dtype | None:
    return _DTYPES.get(config.dtype)


def _described(shape: PixArtConfig) -> str:
    kind = "with size conditions" if shape.multi_scale else "one size"
    return f"{shape.num_layers} blocks of {shape.width}, {kind}, latents of {shape.sample_size}"


def _report(found: str, config: ConvertConfig, tensors: Mapping[str, Tensor]) -> ConvertReport:
    return ConvertReport(
        found, str(config.out), len(tensors), sum(t.numel() for t in tensors.values())
    )
