"""Names and shapes of the published checkpoints: one table to ours, and the config they imply."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from polyzoo.core.errors import WeightsError
from polyzoo.core.log import get_logger
from polyzoo.seed.config import HeadConfig, QFormerConfig, SeedConfig, VisionConfig

_log = get_logger(__name__)

_BERT = (
    (r"bert\.embeddings\.LayerNorm\.", "embedding_norm."),
    (r"bert\.embeddings\.word_embeddings\.", "words."),
    (r"bert\.embeddings\.position_embeddings\.", "positions."),
    (r"bert\.encoder\.layer\.(\d+)\.", r"layers.\1."),
    (r"crossattention\.self\.", "cross_attention."),
    (r"crossattention\.output\.dense\.", "cross_attention.output."),
    (r"crossattention\.output\.LayerNorm\.", "cross_attention.norm."),
    (r"(?<!\w)attention\.self\.", "self_attention."),
    (r"(?<!\w)attention\.output\.dense\.", "self_attention.output."),
    (r"(?<!\w)attention\.output\.LayerNorm\.", "self_attention.norm."),
    (r"intermediate_query\.dense\.", "query_ffn.expand."),
    (r"output_query\.dense\.", "query_ffn.contract."),
    (r"output_query\.LayerNorm\.", "query_ffn.norm."),
    (r"intermediate\.dense\.", "text_ffn.expand."),
    (r"(?<=\d\.)output\.dense\.", "text_ffn.contract."),
    (r"(?<=\d\.)output\.LayerNorm\.", "text_ffn.norm."),
)
_TABLE = (
    (r"^visual_encoder\.patch_embed\.proj\.", "vision.patches."),
    (r"^visual_encoder\.cls_token$", "vision.class_token"),
    (r"^visual_encoder\.pos_embed$", "vision.positions"),
    (r"^visual_encoder\.", "vision."),
    (r"^ln_vision\.", "vision_norm."),
    (r"^query_tokens$", "queries"),
    (r"^Qformer\.cls\.predictions\.transform\.dense\.", "caption_head.transform."),
    (r"^Qformer\.cls\.predictions\.transform\.LayerNorm\.", "caption_head.norm."),
    (r"^Qformer\.cls\.predictions\.decoder\.", "caption_head.decoder."),
    (r"^Qformer\.", "qformer."),
    (r"^Reverse_Qformer(_text|_image)?\.", "head.qformer."),
    (r"^reverse_tokens(_text|_image)?$", "head.queries"),
    (r"^distill_(text|image)_proj\.", "head.projection."),
    (r"^image_down\.", "head.down."),
    (r"^vision_proj\.", "contrast.image."),
    (r"^text_proj\.", "contrast.text."),
    (r"^temp$", "contrast.temperature"),
    (r"^encode_task_layer\.", "to_code."),
    (r"^decode_task_layer\.", "from_code."),
    (r"^quantize\.embedding\.weight$", "quantizer.codebook"),
    (r"^pos_embed_(image|text)$", "prepare_head.positions"),
    (r"^blocks_(image|text)\.", "prepare_head.blocks."),
    (r"^pos_embed$", "reconstruct.positions"),
    (r"^blocks\.", "reconstruct.blocks."),
)
_DROPPED = re.compile(r"(position_ids$|^Qformer\.cls\.|^itm_head\.)")
_EVA_FILE = re.compile(r"^(patch_embed\.|cls_token$|pos_embed$|blocks\.\d+\.attn\.q_bias$)")
_HF_VISION = (
    (r"^vision_model\.embeddings\.class_embedding$", "visual_encoder.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "visual_encoder.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual_encoder.patch_embed.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm1\.", r"visual_encoder.blocks.\1.norm1."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm2\.", r"visual_encoder.blocks.\1.norm2."),
    (
        r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv\.",
        r"visual_encoder.blocks.\1.attn.qkv.",
    ),
    (
        r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection\.",
        r"visual_encoder.blocks.\1.attn.proj.",
    ),
    (r"^vision_model\.encoder\.layers\.(\d+)\.mlp\.", r"visual_encoder.blocks.\1.mlp."),
)


def our_name(name: str) -> str | None:
    """Return our name of a published tensor; None for one that the tokenizer has no use for."""
    if re.search(r"position_ids$|cls\.predictions\.bias$", name):  # a buffer; the tied bias again
        return None
    for pattern, ours in _TABLE:
        new, found = re.subn(pattern, ours, name)
        if found:
            if "qformer." in new:
                for inner, place in _BERT:
                    new = re.sub(inner, place, new)
            return new
    return None


def rename(tensors: Mapping[str, Tensor], *, captions: bool = False) -> dict[str, Tensor]:
    """Give published tensors our names; one summarised warning lists what has no place.

    Args:
        tensors: Of SEED's own layout: `visual_encoder.*`, `Qformer.*`, ...
        captions: Keep the language-model head of the Q-Former, under `caption_head.`.
    """
    renamed: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        new = our_name(name)
        if new is not None and new.startswith("caption_head.") and not captions:
            continue
        if new is None:
            if not _DROPPED.search(name):
                unknown.append(name)
            continue
        renamed[new] = tensor
    if unknown:
        groups = Counter(name.partition(".")[0] for name in unknown)
        shown = ", ".join(f"{group} ({count})" for group, count in groups.most_common(8))
        _log.warning(
            "%d tensors have no place in the tokenizer and are left out: %s", len(unknown), shown
        )
    return renamed


def eva_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a separate EVA file (`eva_vit_g.pth`), or a Hugging Face BLIP-2's, as SEED names it.

    Raises:
        WeightsError: It is neither.
    """
    if any(name.startswith("vision_model.") for name in tensors):
        return _from_hugging_face(tensors)
    if not any(_EVA_FILE.match(name) for name in tensors):
        first = ", ".join(list(tensors)[:3])
        raise WeightsError(
            f"the vision file holds neither an EVA ViT (blocks.0.attn.q_bias, ...) nor a BLIP-2 "
            f"vision_model.*; its first names are {first}"
        )
    kept = {
        f"visual_encoder.{name}": tensor
        for name, tensor in tensors.items()
        if name.startswith(("blocks.", "patch_embed.", "cls_token", "pos_embed"))
    }
    depth = 1 + max(int(name.split(".")[2]) for name in kept if ".blocks." in name)
    if depth == 40:  # LAVIS drops the last block of the published file
        kept = {k: v for k, v in kept.items() if not k.startswith("visual_encoder.blocks.39.")}
    return kept


def _from_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for pattern, theirs in _HF_VISION:
            new, found = re.subn(pattern, theirs, name)
            if not found:
                continue
            if new.endswith("attn.qkv.bias"):
                width = len(tensor) // 3
                if tensor[width : 2 * width].abs().max() > 0:
                    raise WeightsError(f"{name}: has biases for keys, which the EVA ViT lacks")
                place = new.removesuffix("qkv.bias")
                out[f"{place}q_bias"], out[f"{place}v_bias"] = tensor[:width], tensor[2 * width :]
            else:
                out[new] = tensor.view(1, 1, -1) if new.endswith("cls_token") else tensor
    return out


def infer_config(
    tensors: Mapping[str, Tensor],
    *,
    decode_heads: int = 12,
    qformer_heads: int = 12,
    vision_heads: int = 16,
) -> SeedConfig:
    """Read sizes, version and head type off the names and shapes of renamed tensors.

    Head counts leave no trace in shapes: they are given, and default to the published ones.

    Raises:
        WeightsError: A group of tensors is missing; names it.
    """
    _need_groups(tensors)
    width = tensors["queries"].shape[2]
    patch = tensors["vision.patches.weight"]
    side = round((tensors["vision.positions"].shape[1] - 1) ** 0.5)
    layers = _count(tensors, "qformer.layers")
    words = tensors.get("qformer.words.weight")
    crossing = sorted(
        {int(name.split(".")[2]) for name in tensors if "qformer.layers" in name
         and ".cross_attention.query.weight" in name and name.startswith("qformer.")}
    )  # fmt: skip
    return SeedConfig(
        vision=VisionConfig(
            image_size=side * patch.shape[2],
            patch_size=patch.shape[2],
            width=patch.shape[0],
            depth=_count(tensors, "vision.blocks"),
            heads=vision_heads,
            mlp_hidden=tensors["vision.blocks.0.mlp.fc1.weight"].shape[0],
        ),
        qformer=QFormerConfig(
            width=width,
            layers=layers,
            heads=qformer_heads,
            ffn=tensors["qformer.layers.0.query_ffn.expand.weight"].shape[0],
            cross_every=crossing[1] - crossing[0] if len(crossing) > 1 else layers,
            vocabulary=0 if words is None else words.shape[0],
            max_text=512 if words is None else tensors["qformer.positions.weight"].shape[0],
        ),
        head=_infer_head(tensors),
        tokens_per_image=tensors["queries"].shape[1],
        codes=tensors["quantizer.codebook"].shape[0],
        code_dim=tensors["quantizer.codebook"].shape[1],
        decode_depth=_count(tensors, "prepare_head.blocks"),
        reconstructs="reconstruct.positions" in tensors,
        decode_heads=decode_heads,
        contrast_dim=tensors["contrast.image.weight"].shape[0]
        if "contrast.image.weight" in tensors
        else 0,
    )


def _infer_head(tensors: Mapping[str, Tensor]) -> HeadConfig:
    projection = tensors["head.projection.weight"]
    if "head.queries" in tensors:
        queries = tensors["head.queries"].shape[1]
        return HeadConfig(
            kind="reverse",
            target="image" if queries == 1 else "text",
            dim=projection.shape[0],
            queries=queries,
            layers=_count(tensors, "head.qformer.layers"),
            ffn=tensors["head.qformer.layers.0.query_ffn.expand.weight"].shape[0],
        )
    mlp = tuple(tensors[f"head.down.{place}.weight"].shape[0] for place in (0, 2, 4))
    return HeadConfig(dim=projection.shape[0], mlp=(mlp[0], mlp[1], mlp[2]))


def _need_groups(tensors: Mapping[str, Tensor]) -> None:
    groups = {
        "visual_encoder": "vision.positions",
        "ln_vision": "vision_norm.weight",
        "query_tokens": "queries",
        "Qformer": "qformer.layers.0.query_ffn.expand.weight",
        "encode_task_layer": "to_code.0.weight",
        "quantize": "quantizer.codebook",
        "decode_task_layer": "from_code.0.weight",
        "pos_embed_image or pos_embed_text": "prepare_head.positions",
        "distill_image_proj or distill_text_proj": "head.projection.weight",
    }
    missing = [group for group, name in groups.items() if name not in tensors]
    if missing:
        hint = (
            "; the ViT is a file of its own: give it with --vision eva_vit_g.pth, or a BLIP-2 "
            "checkpoint"
            if "visual_encoder" in missing
            else ""
        )
        raise WeightsError(f"the checkpoint lacks {', '.join(missing)}{hint}")


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    places = [
        int(name[len(prefix) + 1 :].partition(".")[0])
        for name in tensors
        if name.startswith(prefix + ".")
    ]
    if not places:
        raise WeightsError(f"the checkpoint has no {prefix}.*")
    return 1 + max(places)


def without_text(config: SeedConfig, tensors: Mapping[str, Tensor]) -> SeedConfig:
    """Return the config without a text branch where the tensors lack part of one."""
    if config.qformer.vocabulary and "qformer.layers.0.text_ffn.expand.weight" not in tensors:
        return replace(config, qformer=replace(config.qformer, vocabulary=0))
    return config


def to_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return floating-point tensors as fp32: what codes are compared in must not be rounded."""
    return {
        name: tensor.to(torch.float32) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
