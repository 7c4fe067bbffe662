"""Names of weights: the official layout and diffusers', one into the other and back (section 3)."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from polyzoo.core.errors import WeightsError

NULL_CAPTION = "y_embedder.y_embedding"
"""The official name of the learned-null caption, which diffusers' layout has no place for."""
POSITIONS = "pos_embed"
"""The official buffer of positions, which loaders work out again."""

_TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.scale_shift_table": "scale_shift_table",
}
_BLOCK = {
    "scale_shift_table": ("scale_shift_table",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
_TOP_BACK = {value: key for key, value in _TOP.items()}
_BLOCK_BACK = {part: (key, parts) for key, parts in _BLOCK.items() for part in parts}


def is_official(names: Mapping[str, object]) -> bool:
    """Whether the names are of the official layout."""
    return any(name.startswith(("x_embedder.", "t_block.", "blocks.")) for name in names)


def to_diffusers(official: Mapping[str, Tensor], *, source: str = "weights") -> dict[str, Tensor]:
    """Rename and split official weights; positions and the null caption are left out.

    Raises:
        WeightsError: Names that are no part of a PixArt transformer, and what the file may be.
    """
    out: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in official.items():
        if name in (POSITIONS, NULL_CAPTION):
            continue
        found = _split(name, tensor)
        if found is None:
            unknown.append(name)
        else:
            out.update(found)
    if unknown:
        raise WeightsError(
            f"{source}: {len(unknown)} names are no part of an official PixArt transformer "
            f"({', '.join(unknown[:3])}){guess(official)}"
        )
    return out


def to_official(
    weights: Mapping[str, Tensor], *, null_caption: Tensor | None = None, source: str = "weights"
) -> dict[str, Tensor]:
    """Rename and join weights of diffusers' layout.

    Args:
        weights: As `PixArtTransformer.state_dict()` has them.
        null_caption: `(n, c)`, stored under its official name.
        source: For the error.

    Raises:
        WeightsError: A name or a part of a joint matrix is missing or unknown.
    """
    out: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in weights.items():
        joined = _join(name, tensor, weights, source)
        if joined is None:
            unknown.append(name)
        else:
            out.update(joined)
    if unknown:
        raise WeightsError(
            f"{source}: {len(unknown)} names are no part of a PixArt transformer in diffusers' "
            f"layout ({', '.join(unknown[:3])}){guess(weights)}"
        )
    if null_caption is not None:
        out[NULL_CAPTION] = null_caption
    return out


def split_control(
    weights: Mapping[str, Tensor], *, source: str = "weights"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Part an official ControlNet file into transformer and branch, both in diffusers' layout.

    Raises:
        WeightsError: The file holds something else.
    """
    base = {
        name.removeprefix("base_model."): tensor
        for name, tensor in weights.items()
        if name.startswith("base_model.")
    }
    branch: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in weights.items():
        if name.startswith("base_model."):
            continue
        match = re.fullmatch(
            r"controlnet\.(\d+)\.(copied_block|before_proj|after_proj)\.(.+)", name
        )
        parts = None
        if match and match[2] != "copied_block":
            parts = {f"{match[2]}.{match[3]}": tensor}
        elif match:
            found = _split(f"blocks.0.{match[3]}", tensor)
            if found is not None:
                parts = {
                    "transformer_block." + key.removeprefix("transformer_blocks.0."): value
                    for key, value in found.items()
                }
        if match is None or parts is None:
            unknown.append(name)
            continue
        branch.update({f"controlnet_blocks.{match[1]}.{key}": x for key, x in parts.items()})
    if unknown or not branch:
        what = f"{len(unknown)} unknown names ({', '.join(unknown[:3])})" if unknown else "no copy"
        raise WeightsError(
            f"{source}: is no official ControlNet checkpoint: {what}{guess(weights)}"
        )
    return to_diffusers(base, source=source) if base else {}, branch


def join_control(
    branch: Mapping[str, Tensor], transformer: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Write a branch, and the transformer where given, under official names."""
    out: dict[str, Tensor] = {}
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, tensor in branch.items():
        match = re.fullmatch(r"controlnet_blocks\.(\d+)\.(.+)", name)
        if match is None:
            raise WeightsError(f"{name!r} is no part of a control branch")
        if match[2].startswith("transformer_block."):
            key = "transformer_blocks.0." + match[2].removeprefix("transformer_block.")
            blocks.setdefault(match[1], {})[key] = tensor
        else:
            out[f"controlnet.{match[1]}.{match[2]}"] = tensor
    for index, block in blocks.items():
        for key, tensor in to_official(block, source="control branch").items():
            out[f"controlnet.{index}.copied_block." + key.removeprefix("blocks.0.")] = tensor
    if transformer is not None:
        official = to_official(transformer)
        out.update({f"base_model.{name}": tensor for name, tensor in official.items()})
    return out


def guess(names: Mapping[str, object]) -> str:
    """Say what a file that does not fit seems to be."""
    if any("lora_" in name for name in names):
        return ": this looks like a LoRA file; load it over a base model"
    if any(name.startswith(("controlnet.", "base_model.")) for name in names):
        return ": this looks like a ControlNet checkpoint; give it as the control branch"
    if any(name.startswith("controlnet_blocks.") for name in names):
        return ": this looks like a control branch; give it as the control branch"
    if any(name.startswith(("encoder.", "decoder.", "post_quant_conv")) for name in names):
        return ": this looks like an autoencoder (VAE)"
    shape = getattr(names.get(NULL_CAPTION), "shape", None)
    if shape is not None and shape[0] == 300:
        return ": 300 caption tokens: this looks like PixArt-Sigma, which is another model"
    if is_official(names) and not any(name.startswith("csize_embedder.") for name in names):
        return ": no csize_embedder: a single-scale model, or PixArt-Sigma"
    return ""


def _split(name: str, tensor: Tensor) -> dict[str, Tensor] | None:
    if name in _TOP:
        return {_TOP[name]: tensor}
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return {f"{_TOP[stem]}.{kind}": tensor}
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if match is None:
        return None
    prefix = f"transformer_blocks.{match[1]}."
    if match[2] in _BLOCK:
        return {prefix + match[2]: tensor}
    stem, _, kind = match[2].rpartition(".")
    if stem not in _BLOCK or kind not in ("weight", "bias"):
        return None
    parts = _BLOCK[stem]
    return {
        f"{prefix}{part}.{kind}": piece
        for part, piece in zip(parts, tensor.chunk(len(parts)), strict=True)
    }


def _join(
    name: str, tensor: Tensor, weights: Mapping[str, Tensor], source: str
) -> dict[str, Tensor] | None:
    if name in _TOP_BACK:
        return {_TOP_BACK[name]: tensor}
    stem, _, kind = name.rpartition(".")
    if stem in _TOP_BACK:
        return {f"{_TOP_BACK[stem]}.{kind}": tensor}
    match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", name)
    if match is None:
        return None
    if match[2] in _BLOCK_BACK:
        return {f"blocks.{match[1]}.{match[2]}": tensor}
    stem, _, kind = match[2].rpartition(".")
    if stem not in _BLOCK_BACK or kind not in ("weight", "bias"):
        return None
    key, parts = _BLOCK_BACK[stem]
    names = [f"transformer_blocks.{match[1]}.{part}.{kind}" for part in parts]
    missing = [part for part in names if part not in weights]
    if missing:
        raise WeightsError(f"{source}: {missing[0]!r} is missing")
    return {f"blocks.{match[1]}.{key}.{kind}": torch.cat([weights[part] for part in names])}
