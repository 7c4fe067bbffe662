"""A pipeline out of its parts, wherever they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D

from polyzoo.core.device import resolve_device, resolve_dtype
from polyzoo.core.errors import ConfigError, WeightsError
from polyzoo.core.hub import resolve_folder
from polyzoo.core.log import get_logger
from polyzoo.core.weights import read_metadata, read_weights
from polyzoo.pixart_delta import layout
from polyzoo.pixart_delta.config import ControlConfig, PixArtConfig
from polyzoo.pixart_delta.control import ControlBranch
from polyzoo.pixart_delta.fast import FastTransformer, Replayed, compile_repeated
from polyzoo.pixart_delta.folders import (
    KIND,
    build_control,
    build_transformer,
    finite,
    load_control,
    load_null,
    load_transformer,
    read_json,
    save_control,
    save_null,
    save_transformer,
    save_vae,
    write_json,
)
from polyzoo.pixart_delta.hed import load_hed
from polyzoo.pixart_delta.int8 import quantise_linears
from polyzoo.pixart_delta.model import PixArtTransformer
from polyzoo.pixart_delta.scheduler import check_betas, make_scheduler
from polyzoo.pixart_delta.t5 import T5Block, T5Encoder, load_t5
from polyzoo.pixart_delta.vae import MidAttention, decode_latents, load_vae
from polyzoo.pixart_delta.words import WordEncoder

if TYPE_CHECKING:
    from polyzoo.pixart_delta.pipeline import PixArtDeltaPipeline

_log = get_logger(__name__)
EMBEDDED = "embedded"
LICENCE = (
    "the published PixArt weights are under OpenRAIL++: its use restrictions apply to you and to "
    "whoever gets them from you"
)


def shipped_folder() -> Path:
    """Where the small model of this package lies."""
    return Path(__file__).with_name("models") / "icons"


def load_pipeline(
    cls: type[PixArtDeltaPipeline],
    name: str,
    *,
    dtype: str | torch.dtype | None,
    device: str,
    memory: str,
    compiled: bool,
    controlnet: str | Path | None,
    hed: str | Path | None,
    vae: str | Path | None,
    text: str | Path | None,
    lora: Sequence[str | Path],
    revision: str | None,
    local_files_only: bool,
    token: str | None,
    force_scheduler: bool,
) -> PixArtDeltaPipeline:
    """See `PixArtDeltaPipeline.from_pretrained`."""
    if memory not in ("full", "8gb"):
        raise ConfigError(f"memory={memory!r} must be 'full' or '8gb'")
    if memory == "8gb" and compiled:
        raise ConfigError("memory='8gb' moves parts about, compile=True captures where they are")
    place = resolve_device(device)
    kind = _dtype(dtype, place)
    file, folder = _locate(name, revision, local_files_only, token)
    transformer, weights_kind, null = _transformer(file, folder, kind)
    home = folder or Path()
    pipe = cls(
        transformer=transformer,
        vae=load_vae(_vae_folder(vae, home), dtype=kind),
        scheduler=_scheduler(home, force_scheduler),
        **_text(Path(text) if text is not None else home, kind, memory),
        controlnet=_branch(controlnet, home, kind, transformer),
        hed=load_hed(hed, dtype=kind) if hed is not None else None,
    )
    if isinstance(pipe.text_encoder, WordEncoder):
        pipe.text_encoder.length = transformer.shape.caption_length
    pipe.null_caption = null
    pipe.kind = weights_kind
    pipe.name = Path(name).name
    _adapters(pipe, lora, home if name == EMBEDDED else None)
    pipe.memory = memory  # pyright: ignore[reportAttributeAccessIssue]
    pipe.work_device = place
    if memory == "full":
        pipe.to(place)
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.controlnet):
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    if compiled:
        make_fast(pipe)
    return pipe


def make_fast(pipe: PixArtDeltaPipeline) -> None:
    """Compile and capture the networks: each new shape warms up once."""
    pipe._fast = FastTransformer(pipe.transformer, pipe.controlnet)
    pipe._fast_vae = fast_decoder(pipe.vae)
    if isinstance(pipe.text_encoder, T5Encoder):
        fast_text(pipe.text_encoder)


def fast_decoder(vae: AutoencoderKL) -> Replayed:
    """Scaled latents to images, captured; what it returns is overwritten by the next call."""
    vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    for block in vae.modules():
        if isinstance(block, Attention):
            block.set_processor(MidAttention())  # pyright: ignore[reportArgumentType]
    compile_repeated(vae.decoder, ResnetBlock2D)
    return Replayed(lambda latents: decode_latents(vae, latents), name="autoencoder")


def fast_text(encoder: T5Encoder) -> None:
    """Capture a text encoder, in place."""
    compile_repeated(encoder, T5Block)
    replayed = Replayed(encoder.forward, name="text encoder")
    encoder.forward = lambda ids, kv_lens: replayed(ids, kv_lens).clone()  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]


def save_pipeline(pipe: PixArtDeltaPipeline, folder: Path) -> None:
    """See `PixArtDeltaPipeline.save_pretrained`."""
    if pipe.adapters.active:
        names = ", ".join(pipe.adapters.active)
        raise ConfigError(f"adapters {names} are merged into the weights: unload them first")
    save_transformer(folder, pipe.transformer, kind=pipe.kind or "base")
    save_vae(folder, pipe.vae)
    if pipe.controlnet is not None:
        save_control(folder, pipe.controlnet)
    if pipe.null_caption is not None:
        save_null(folder, pipe.null_caption)
    if isinstance(pipe.text_encoder, WordEncoder):
        pipe.text_encoder.save(folder / "text")
    pipe.scheduler.save_config(str(folder / "scheduler"))
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "PixArtAlphaPipeline",
            "scheduler": ["diffusers", type(pipe.scheduler).__name__],
            "transformer": ["diffusers", "PixArtTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def _dtype(given: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if isinstance(given, torch.dtype):
        return given
    if given is not None:
        return resolve_dtype(given, device)
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _locate(
    name: str, revision: str | None, local_files_only: bool, token: str | None
) -> tuple[Path | None, Path | None]:
    """File of a transformer alone, or folder of a model."""
    if name == EMBEDDED:
        return None, shipped_folder()
    path = Path(name).expanduser()
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        raise WeightsError(
            f"{path}: pickled checkpoints are read only by `polyzoo pixart-delta convert {path} "
            "--out FOLDER`, which runs none of their code; then load FOLDER"
        )
    if path.suffix == ".safetensors":
        return path, None
    if path.is_dir():
        return None, path
    folder = resolve_folder(name, revision=revision, local_files_only=local_files_only, token=token)
    _log.warning("%s: %s", name, LICENCE)
    return None, folder


def _transformer(
    file: Path | None, folder: Path | None, dtype: torch.dtype
) -> tuple[PixArtTransformer, str, Any]:
    if folder is not None:
        inner = folder / "transformer"
        model, kind = load_transformer(inner if inner.is_dir() else folder, dtype=dtype)
        if not kind and "lcm" in str(folder).lower():
            kind = "lcm"
        return model, kind, load_null(folder)
    assert file is not None  # noqa: S101 - one of the two is set
    tensors = finite(read_weights(file, dtype=dtype), file)
    null = tensors.get(layout.NULL_CAPTION)
    if layout.is_official(tensors):
        tensors = layout.to_diffusers(tensors, source=str(file))
    shape = infer_shape(tensors, source=str(file))
    kind = read_metadata(file).get(KIND, "lcm" if "lcm" in file.name.lower() else "")
    return build_transformer(shape, tensors, source=str(file)), kind, null


def infer_shape(
    tensors: dict[str, torch.Tensor],
    *,
    source: str,
    sample_size: int | None = None,
    heads: int | None = None,
) -> PixArtConfig:
    """Read a transformer's shape off its weights (diffusers' layout).

    Args:
        tensors: The weights.
        source: For errors, and for the size in the file's name.
        sample_size: Latent side; 128 with size conditions, else by the name, where not given.
        heads: 16 as published, where not given; nothing in the weights tells.

    Raises:
        WeightsError: They are no transformer's.
    """
    try:
        patch = tensors["pos_embed.proj.weight"]
        caption = tensors["caption_projection.linear_1.weight"]
        hidden = tensors["transformer_blocks.0.ff.net.0.proj.weight"]
        out = tensors["proj_out.weight"]
    except KeyError as error:
        raise WeightsError(
            f"{source}: {error.args[0]!r} is missing{layout.guess(tensors)}"
        ) from None
    multi = any(name.startswith("adaln_single.emb.resolution_embedder") for name in tensors)
    count = 1 + max(int(n.split(".")[1]) for n in tensors if n.startswith("transformer_blocks."))
    if sample_size is None:
        sample_size = 128 if multi else 32 if "256" in Path(source).name else 64
    width, heads = patch.shape[0], heads or 16
    if width % heads:
        raise WeightsError(f"{source}: width {width} is not divisible by {heads} heads; give heads")
    return PixArtConfig(
        sample_size=sample_size,
        patch_size=patch.shape[2],
        in_channels=patch.shape[1],
        out_channels=out.shape[0] // patch.shape[2] ** 2,
        num_layers=count,
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        caption_channels=caption.shape[1],
        mlp_ratio=hidden.shape[0] / width,
        use_additional_conditions=multi,
    )


def _vae_folder(given: str | Path | None, home: Path) -> Path:
    folder = Path(given) if given is not None else home / "vae"
    if (folder / "vae").is_dir():
        folder = folder / "vae"
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no autoencoder there; give its folder with vae=")
    return folder


def _scheduler(home: Path, force: bool) -> Any:
    path = home / "scheduler" / "scheduler_config.json"
    values = read_json(path) if path.is_file() else {}
    name = str(values.get("_class_name", "DPMSolverMultistepScheduler"))
    check_betas(values, name, force=force)
    kind = "lcm" if "LCM" in name else "ddim" if name.startswith("DDIM") else "dpm"
    return make_scheduler(kind, {} if force else values)


def _text(home: Path, dtype: torch.dtype, memory: str) -> dict[str, Any]:
    if (home / "text").is_dir():
        return {"text_encoder": WordEncoder.from_folder(home / "text")}
    if not (home / "text_encoder").is_dir():
        return {}
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        str(home / "tokenizer"), local_files_only=True, trust_remote_code=False
    )
    encoder = load_t5(home / "text_encoder", dtype=dtype)
    if memory == "8gb":
        quantise_linears(encoder)
    return {"tokenizer": tokenizer, "text_encoder": encoder}


def _branch(
    given: str | Path | None, home: Path, dtype: torch.dtype, transformer: PixArtTransformer
) -> ControlBranch | None:
    if given is None:
        if not (home / "controlnet").is_dir():
            return None
        given = home / "controlnet"
    path = Path(given)
    if path.is_dir():
        inner = path / "controlnet"
        folder = inner if inner.is_dir() else path
        return load_control(folder, dtype=dtype, transformer=transformer.shape)
    if path.suffix != ".safetensors":
        raise WeightsError(
            f"{path}: give a folder or a .safetensors file; a .pth goes through "
            "`polyzoo pixart-delta convert`"
        )
    tensors = finite(read_weights(path, dtype=dtype), path)
    if not any(name.startswith("controlnet_blocks.") for name in tensors):
        _, tensors = layout.split_control(tensors, source=str(path))
    count = 1 + max(int(name.split(".")[1]) for name in tensors)
    return build_control(transformer.shape, ControlConfig(num_blocks=count), tensors, str(path))


def _adapters(pipe: PixArtDeltaPipeline, given: Sequence[str | Path], home: Path | None) -> None:
    paths = list(given)
    if home is not None and (home / "lora" / "lcm").is_dir() and not paths:
        paths = [home / "lora" / "lcm"]
    for item in paths:
        path, _, scale = str(item).partition("=")
        if path == "none":
            continue
        pipe.load_lora_weights(path, name=Path(path).stem, scale=float(scale) if scale else 1.0)
