"""The icon pack as training material: pictures, captions and edge maps, kept on the device."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from polyzoo.core.icons import IconPack, IconRecord, caption
from polyzoo.core.icons.captions import prompt
from polyzoo.core.icons.records import CORE_GROUPS
from polyzoo.core.icons.sources import CLIP_ART
from polyzoo.core.log import progress
from polyzoo.pixart_delta.batches import LatentBatch
from polyzoo.pixart_delta.captions import RowCaptions
from polyzoo.pixart_delta.edges import edge_maps
from polyzoo.pixart_delta.vae import Posterior, encode_images
from polyzoo.pixart_delta.words import WordEncoder, build_vocabulary

VARIANTS = 8
"""Captions drawn for each picture; a step takes one of them."""


@dataclass(frozen=True)
class IconImages:
    """Pictures and records of a part of the pack."""

    images: Tensor
    """uint8 `(n, 3, H, W)`, on white."""
    records: tuple[IconRecord, ...]


def load_icons(
    folder: str | Path, *, split: str | Sequence[str], clip_art: bool = False
) -> IconImages:
    """Read the emoji of the core groups, and the clip art where asked for.

    Args:
        folder: An icon pack.
        split: One split or several.
        clip_art: Also the clip art: one picture a title, too varied for a small transformer, but
            good for an autoencoder.
    """
    pack = IconPack.open(folder)
    groups: list[int | None] = [*CORE_GROUPS]
    if clip_art:
        groups.append(None)
    chosen = pack.subset(split=split, groups=groups)  # pyright: ignore[reportArgumentType]
    rows = [
        torch.from_numpy(pack.rgb(i).copy()).permute(2, 0, 1)
        for i in progress(chosen, description="Reading pictures")
    ]
    return IconImages(torch.stack(rows), tuple(pack.records[i] for i in chosen))


def vocabulary(folder: str | Path, *, clip_art: bool = False) -> WordEncoder:
    """The words of all captions of the pack, reserved ones included; needs the WordLlama asset.

    The vectors are pretrained, so that a reserved word teaches nothing of its pictures.
    """
    pack = IconPack.open(folder)
    texts = [
        " ".join((prompt(record.label, record.style), *record.tags))
        for record in pack.records
        if clip_art or record.style != CLIP_ART
    ]
    return build_vocabulary(texts)


def caption_rows(
    records: Sequence[IconRecord], encoder: WordEncoder, *, variants: int = VARIANTS, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Draw captions once: word rows int32 `(n, variants, length)`, and their lengths with the end.

    The row after the last word holds the number of words, which stands for the end.
    """
    length, stop = encoder.length, len(encoder.words)
    ids = torch.full((len(records), variants, length), stop, dtype=torch.int32)
    lens = torch.zeros(len(records), variants, dtype=torch.int32)
    for row, record in enumerate(records):
        generator = random.Random(f"{seed}/{record.id}")  # noqa: S311 - not for secrets
        for variant in range(variants):
            text = (
                prompt(record.label, record.style) if variant == 0 else caption(record, generator)
            )
            found = encoder.ids(text)
            ids[row, variant, : len(found)] = torch.tensor(found, dtype=torch.int32)
            lens[row, variant] = len(found) + 1
    return ids, lens


class IconLatents(nn.Module):
    """Encoded pictures and drawn captions, on the device: a step reads them by index."""

    mean: Tensor
    std: Tensor
    ids: Tensor
    lens: Tensor
    table: Tensor
    control: Tensor | None

    def __init__(
        self,
        posterior: Posterior,
        captions: tuple[Tensor, Tensor],
        encoder: WordEncoder,
        control: Tensor | None = None,
    ) -> None:
        """Hold everything as buffers.

        Args:
            posterior: Of the pictures.
            captions: From `caption_rows`.
            encoder: Its vectors are looked up.
            control: `(n, 4, h, w)` encoded edge maps, times the factor.
        """
        super().__init__()
        self.register_buffer("mean", posterior.mean.float())
        self.register_buffer("std", posterior.std.float())
        self.register_buffer("ids", captions[0])
        self.register_buffer("lens", captions[1])
        self.register_buffer("table", torch.cat([encoder.vectors, encoder.end[None]]))
        self.register_buffer("control", control)

    def __len__(self) -> int:
        return len(self.mean)

    def batch(self, indices: Tensor, generator: torch.Generator) -> LatentBatch:
        """Draw a posterior sample and a caption of each picture."""
        device = self.mean.device
        mean, std = self.mean[indices], self.std[indices]
        noise = torch.randn(mean.shape, generator=generator, device=device)
        variant = torch.randint(
            0, self.ids.shape[1], indices.shape, generator=generator, device=device
        )
        captions = RowCaptions(self.table[self.ids[indices, variant]], self.lens[indices, variant])
        return LatentBatch(
            Posterior(mean, std).sample(noise),
            captions,
            control=None if self.control is None else self.control[indices],
        )


class Indices:
    """A dataset of its own positions: the data themselves are on the device."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


def collate_indices(indices: list[int]) -> Tensor:
    """`(b,)` int64."""
    return torch.tensor(indices)


def to_unit(images: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def encode_all(
    vae: AutoencoderKL, images: Tensor, *, batch: int = 256, device: torch.device | str = "cpu"
) -> Posterior:
    """Posterior of uint8 pictures `(n, 3, H, W)`, float32 on the CPU."""
    vae = vae.to(device)  # pyright: ignore[reportArgumentType]
    parts = [encode_images(vae, to_unit(part.to(device))) for part in images.split(batch)]
    mean, std = (
        torch.cat([getattr(part, name).float().cpu() for part in parts]) for name in ("mean", "std")
    )
    return Posterior(mean, std)


@torch.no_grad()
def encode_edges(
    vae: AutoencoderKL, images: Tensor, *, batch: int = 256, device: torch.device | str = "cpu"
) -> Tensor:
    """Control latents of the edge maps of uint8 pictures `(n, 3, H, W)`: the posterior's mean."""
    maps = [edge_maps(part.float() / 255) for part in images.split(batch)]
    vae = vae.to(device)  # pyright: ignore[reportArgumentType]
    parts = [
        encode_images(vae, (part * 2 - 1).expand(-1, 3, -1, -1).to(device)).sample().float().cpu()
        for part in maps
    ]
    return torch.cat(parts)
