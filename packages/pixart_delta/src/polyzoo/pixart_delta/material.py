"""What a training is given besides its networks: a dataset, and how it becomes batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyzoo.core.errors import ConfigError
from polyzoo.core.log import get_logger
from polyzoo.pixart_delta.batches import LatentBatch
from polyzoo.pixart_delta.config import PixArtConfig
from polyzoo.pixart_delta.data import (
    FeatureBatch,
    FeatureFiles,
    OfficialFeatures,
    ShardedFeatures,
    collate_features,
    latent_batch,
)
from polyzoo.pixart_delta.folders import draw_null, load_null, read_json, save_null, save_vae
from polyzoo.pixart_delta.icons import (
    IconLatents,
    Indices,
    caption_rows,
    collate_indices,
    encode_all,
    encode_edges,
    load_icons,
    vocabulary,
)
from polyzoo.pixart_delta.model import read_diffusers_config
from polyzoo.pixart_delta.presets import PixArtTrainConfig
from polyzoo.pixart_delta.sampler import BucketSampler, BucketStream
from polyzoo.pixart_delta.vae import load_vae
from polyzoo.pixart_delta.words import WordEncoder

_log = get_logger(__name__)
_TEXT = "text"


@dataclass(frozen=True)
class Material:
    """A dataset with all that a step needs to read it."""

    dataset: Any
    collate: Callable[[list[Any]], Any] | None
    count: int
    """Images."""
    batch: Callable[[Any, Mapping[str, nn.Module], torch.Generator], LatentBatch]
    """From what the loader gives to a batch on the device."""
    frozen: dict[str, Any] = field(default_factory=dict)
    """Modules of data that stay on the device."""
    null: Tensor | None = None
    """`(n, c)` the learned-null caption."""
    empty: Tensor | None = None
    """`(n, c)` the encoding of the empty prompt."""
    encoder: WordEncoder | None = None
    """The small model's text encoder, saved beside it."""
    vae: Any = None
    held: Tensor = field(default_factory=lambda: torch.zeros(0))
    """uint8 pictures kept apart, for the autoencoder's figures."""


class Pictures(nn.Module):
    """uint8 pictures on the device."""

    images: Tensor

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.register_buffer("images", images)


def gather(config: PixArtTrainConfig) -> Material:
    """Read, and where needed encode, what the recipe names."""
    if config.data.icons is not None:
        return _pictures(config) if config.task == "vae" else _icons(config)
    if config.data.manifest is not None:
        shards = ShardedFeatures(config.data.manifest, bad_limit=config.data.bad_limit)
        return _features(config, shards, shards.empty())
    if config.data.official is not None:
        files = OfficialFeatures(
            config.data.official,
            resolution=config.data.resolution,
            multi_scale=_shape(config).multi_scale,
            control=config.task == "controlnet",
            bad_limit=config.data.bad_limit,
        )
        return _features(config, files, None)
    raise ConfigError("data: give one of --data.manifest, --data.official and --data.icons")


def _shape(config: PixArtTrainConfig) -> PixArtConfig:
    if config.start is None:
        return config.model
    return read_diffusers_config(read_json(config.start / "transformer" / "config.json"))


def _features(config: PixArtTrainConfig, files: FeatureFiles, empty: Tensor | None) -> Material:
    shape = _shape(config)
    sampler = BucketSampler(
        files.keys,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        min_per_bucket=config.data.min_per_bucket,
        balanced=config.data.balanced,
    )

    def batch(
        data: FeatureBatch, frozen: Mapping[str, nn.Module], generator: torch.Generator
    ) -> LatentBatch:
        del frozen
        return latent_batch(data, generator, multi_scale=shape.multi_scale)

    null = load_null(config.start) if config.start is not None else None
    return Material(
        dataset=BucketStream(files, sampler),
        collate=collate_features,
        count=len(files),
        batch=batch,
        null=draw_null(shape, config.train.seed) if null is None else null,
        empty=empty,
    )


def save_material(out: Path, material: Material) -> None:
    """Write the parts of a model that its data brought: autoencoder, words, null caption."""
    if material.encoder is not None and not (out / _TEXT).is_dir():
        material.encoder.save(out / _TEXT)
    if material.vae is not None and not (out / "vae").is_dir():
        save_vae(out, material.vae)
    if material.null is not None:
        save_null(out, material.null)


def _pictures(config: PixArtTrainConfig) -> Material:
    assert config.data.icons is not None  # noqa: S101 - our caller's promise
    found = load_icons(config.data.icons, split="train", clip_art=True)
    held = load_icons(config.data.icons, split=("val", "reserved-concept"))
    return Material(
        dataset=Indices(len(found.images)),
        collate=collate_indices,
        count=len(found.images),
        batch=_no_batch,
        frozen={"data": Pictures(found.images)},
        held=held.images,
    )


def _no_batch(*_: Any) -> LatentBatch:
    raise ConfigError("pictures are no latents: this task reads them itself")


def _icons(config: PixArtTrainConfig) -> Material:
    assert config.data.icons is not None  # noqa: S101 - our caller's promise
    home = config.start or config.out
    if not (home / "vae").is_dir():
        raise ConfigError(f"{home}: holds no vae folder; run `train icons-vae` first")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = load_vae(home / "vae")
    if (home / _TEXT).is_dir():
        encoder = WordEncoder.from_folder(home / _TEXT)
    else:
        encoder = vocabulary(config.data.icons)
    found = load_icons(config.data.icons, split="train")
    posterior = encode_all(vae, found.images, device=device)
    control = None
    if config.task == "controlnet":
        control = encode_edges(vae, found.images, device=device)
    captions = caption_rows(found.records, encoder, seed=config.train.seed)
    data = IconLatents(posterior, captions, encoder, control)

    def batch(
        indices: Tensor, frozen: Mapping[str, nn.Module], generator: torch.Generator
    ) -> LatentBatch:
        held = frozen["data"]
        assert isinstance(held, IconLatents)  # noqa: S101 - our own promise
        return held.batch(indices, generator)

    null = load_null(home)
    if null is None and config.noise.null == "learned":
        null = draw_null(config.model, config.train.seed)
    return Material(
        dataset=Indices(len(found.images)),
        collate=collate_indices,
        count=len(found.images),
        batch=batch,
        frozen={"data": data},
        null=null,
        empty=encoder.end[None].cpu(),
        encoder=encoder,
        vae=vae.cpu(),
    )
