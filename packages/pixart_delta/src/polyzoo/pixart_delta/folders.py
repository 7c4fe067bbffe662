"""A model's folder: its parts in diffusers' places, read strictly and written atomically.

`transformer/`, `vae/`, `scheduler/`, `tokenizer/` and `text_encoder/` are diffusers' and
transformers' own; `text/` holds the small model's words, `controlnet/` a control branch,
`lora/NAME/` adapters in peft's layout, and `null_caption.safetensors` the learned-null caption.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from polyzoo.core.errors import WeightsError
from polyzoo.core.io import atomic_write
from polyzoo.core.weights import load_into, read_metadata, read_weights, write_weights
from polyzoo.pixart_delta import layout
from polyzoo.pixart_delta.config import ControlConfig, PixArtConfig
from polyzoo.pixart_delta.control import ControlBranch
from polyzoo.pixart_delta.model import PixArtTransformer, diffusers_config, read_diffusers_config

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
NULL = "null_caption.safetensors"
KIND = "polyzoo.kind"
"""Entry of a weight file's header: base or lcm."""


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a configuration, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as file:
        file.write(json.dumps(values, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a configuration.

    Raises:
        WeightsError: It is missing or no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except ValueError as error:
        raise WeightsError(f"{path}: is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path}: holds {type(values).__name__}; expected an object")
    return values


def weight_file(folder: Path) -> Path:
    """The weight file of a part, under diffusers' or transformers' name."""
    for name in (WEIGHTS, "model.safetensors", f"{WEIGHTS}.index.json"):
        if (folder / name).is_file():
            return folder / name
    halved = folder / "diffusion_pytorch_model.fp16.safetensors"
    if halved.is_file():
        return halved
    raise WeightsError(f"{folder}: holds no {WEIGHTS}")


def save_part(
    folder: Path,
    module: nn.Module,
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    int8: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a network: config.json and weights.

    Args:
        folder: Of the part.
        module: The network.
        config: What describes it.
        dtype: Stored type; as it is where not given.
        int8: Store matrices of at least 4,096 entries as int8 rows, the rest as float16.
        metadata: Entries of the weight file's header.
    """
    tensors = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    rows = [n for n, t in tensors.items() if int8 and t.ndim >= 2 and t.numel() >= 4096]
    kind = torch.float16 if int8 else dtype
    if kind is not None:
        tensors = {
            n: t.to(kind) if t.is_floating_point() and n not in rows else t
            for n, t in tensors.items()
        }
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / WEIGHTS, tensors, int8_rows=rows, metadata=metadata)
    write_json(folder / CONFIG, config)


def save_transformer(
    folder: Path,
    model: PixArtTransformer,
    *,
    kind: str = "base",
    dtype: torch.dtype | None = None,
    int8: bool = False,
) -> None:
    """Write `folder`/transformer."""
    config = diffusers_config(model.shape)
    if model.shape.mlp_ratio != 4.0 or model.shape.caption_length != 120:
        config |= {
            "mlp_ratio": model.shape.mlp_ratio,
            "caption_length": model.shape.caption_length,
        }
    save_part(folder / "transformer", model, config, dtype=dtype, int8=int8, metadata={KIND: kind})


def load_transformer(
    folder: str | Path, *, dtype: torch.dtype | None = None
) -> tuple[PixArtTransformer, str]:
    """Read a transformer's folder, strictly; also its kind: base, lcm, or empty if unsaid."""
    folder = Path(folder)
    config = read_diffusers_config(read_json(folder / CONFIG))
    file = weight_file(folder)
    tensors = finite(read_weights(file, dtype=dtype), file)
    model = build_transformer(config, tensors, source=str(file))
    kind = read_metadata(file).get(KIND, "") if file.suffix == ".safetensors" else ""
    return model, kind


def build_transformer(
    config: PixArtConfig, tensors: Mapping[str, Tensor], *, source: str
) -> PixArtTransformer:
    """A transformer that takes the tensors themselves, without drawing weights first.

    Raises:
        WeightsError: They do not fit; the message says what the file seems to be.
    """
    with torch.device("meta"):
        model = PixArtTransformer(config)
    try:
        load_into(model, tensors, source=source)
    except WeightsError as error:
        raise WeightsError(f"{error}{layout.guess(tensors)}") from None
    return model.eval()


def save_control(
    folder: Path,
    branch: ControlBranch,
    *,
    dtype: torch.dtype | None = None,
    int8: bool = False,
) -> None:
    """Write `folder`/controlnet: the branch alone."""
    config = {
        "_class_name": "PixArtControlNetAdapterModel",
        "num_layers": branch.shape.num_blocks,
        "transformer": {
            name: value
            for name, value in diffusers_config(branch.transformer_shape).items()
            if name != "_class_name"
        } | {"mlp_ratio": branch.transformer_shape.mlp_ratio,
             "caption_length": branch.transformer_shape.caption_length},
    }  # fmt: skip
    save_part(folder / "controlnet", branch, config, dtype=dtype, int8=int8)


def load_control(
    folder: str | Path, *, dtype: torch.dtype | None = None, transformer: PixArtConfig | None = None
) -> ControlBranch:
    """Read a control branch's folder, strictly.

    Args:
        folder: With config.json and weights.
        dtype: Of the weights.
        transformer: Shape of the transformer, for folders of the research project, whose
            config.json names only the number of copies.
    """
    folder = Path(folder)
    values = read_json(folder / CONFIG)
    if "transformer" in values:
        shape = read_diffusers_config(values["transformer"])
    elif transformer is not None:
        shape = transformer
    else:
        raise WeightsError(f"{folder / CONFIG}: does not describe its transformer; give it")
    file = weight_file(folder)
    tensors = finite(read_weights(file, dtype=dtype), file)
    return build_control(shape, ControlConfig(num_blocks=values["num_layers"]), tensors, str(file))


def build_control(
    shape: PixArtConfig, config: ControlConfig, tensors: Mapping[str, Tensor], source: str
) -> ControlBranch:
    """A branch that takes the tensors themselves."""
    with torch.device("meta"):
        branch = ControlBranch(shape, config)
    try:
        load_into(branch, tensors, source=source)
    except WeightsError as error:
        raise WeightsError(f"{error}{layout.guess(tensors)}") from None
    return branch.eval()


def save_vae(folder: Path, vae: AutoencoderKL, *, dtype: torch.dtype | None = None) -> None:
    """Write `folder`/vae."""
    config = {k: v for k, v in dict(vae.config).items() if not k.startswith("_")}
    save_part(folder / "vae", vae, {"_class_name": "AutoencoderKL", **config}, dtype=dtype)


def save_null(folder: Path, null: Tensor) -> None:
    """Write the learned-null caption `(n, c)`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / NULL, {"null_caption": null})


def load_null(folder: Path) -> Tensor | None:
    """Read the learned-null caption, where there is one."""
    path = folder / NULL
    return read_weights(path)["null_caption"] if path.is_file() else None


def draw_null(config: PixArtConfig, seed: int = 0) -> Tensor:
    """The fixed random null caption `(n, c)` of a training from nothing (section 2.4)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (config.caption_length, config.caption_channels)
    return torch.randn(shape, generator=generator) / config.caption_channels**0.5


def finite(tensors: dict[str, Tensor], source: Path | str) -> dict[str, Tensor]:
    """Refuse weights with NaN or infinity.

    Raises:
        WeightsError: Names the first tensor that holds one.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise WeightsError(
                f"{source}: {name} holds NaN or infinity; the file is damaged, or was converted "
                "to float16 without room for its values: convert it again to bfloat16 or float32"
            )
    return tensors
