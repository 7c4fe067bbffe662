"""A tokenizer's folder: config.json, model.safetensors, and what belongs to them.

Beside these two there may be tokenizer.json (the text branch's word pieces), decoder.json with
decoder.safetensors (our small de-tokeniser), and language/ (a language model over its codes).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from polyzoo.core import config as configs
from polyzoo.core.errors import WeightsError
from polyzoo.core.hub import CONFIG_NAME, load_pretrained, resolve_folder, save_pretrained
from polyzoo.core.weights import FILE_NAME, load_into, read_weights, write_weights
from polyzoo.seed.config import SeedConfig
from polyzoo.seed.decoder import PixelDecoder
from polyzoo.seed.decoder_config import DecoderConfig
from polyzoo.seed.model import SeedModel
from polyzoo.seed.sketch import SketchDecoder
from polyzoo.seed.text_pieces import FILE_NAME as PIECES
from polyzoo.seed.text_pieces import TextPieces

Decoder = PixelDecoder | SketchDecoder
DECODER_CONFIG, DECODER_WEIGHTS = "decoder.json", "decoder.safetensors"
LANGUAGE = "language"
_SMALLEST_INT8 = 1024
"""Matrices below this many entries are not worth their scales."""


@dataclass
class SeedParts:
    """A tokenizer read from its folder, on the CPU in fp32."""

    folder: Path
    model: SeedModel
    pieces: TextPieces | None
    decoder: Decoder | None


def load_parts(folder: str | Path) -> SeedParts:
    """Read a folder strictly.

    Raises:
        WeightsError: Something is missing or does not fit; names it.
    """
    folder = Path(folder)
    config, tensors = load_pretrained(folder, SeedConfig)
    model = SeedModel(config)
    load_into(model, tensors, source=str(folder))
    decoder = None
    if (folder / DECODER_CONFIG).is_file():
        shape = configs.load(DecoderConfig, folder / DECODER_CONFIG)
        decoder = SketchDecoder(shape) if shape.kind == "sketch" else PixelDecoder(shape)
        load_into(decoder, read_weights(folder / DECODER_WEIGHTS), source=DECODER_WEIGHTS)
        if shape.context_width != config.qformer.width:
            raise WeightsError(
                f"{folder}: the decoder looks at vectors of {shape.context_width}, the tokenizer "
                f"gives {config.qformer.width}: they were not trained together"
            )
    pieces = TextPieces.load(folder) if (folder / PIECES).is_file() else None
    if config.qformer.vocabulary and pieces is None:
        raise WeightsError(f"{folder}: has a text branch and no {PIECES}")
    if pieces is not None and config.qformer.vocabulary not in (0, len(pieces)):
        raise WeightsError(
            f"{folder}: {PIECES} has {len(pieces)} pieces and the text branch "
            f"{config.qformer.vocabulary}: the tokenizer was changed after training"
        )
    return SeedParts(folder, model.eval(), pieces, decoder)


def save_parts(
    folder: str | Path,
    model: SeedModel,
    *,
    pieces: Path | None = None,
    decoder: Decoder | None = None,
    int8: bool = False,
) -> Path:
    """Write a folder; a language model already in it stays.

    Args:
        folder: Made where missing.
        model: The tokenizer.
        pieces: The text branch's tokenizer.json, copied in.
        decoder: Our small de-tokeniser.
        int8: Store matrices as int8 with a scale a row. The codebook stays fp32.
    """
    folder = Path(folder)
    tensors = model.state_dict()
    save_pretrained(folder, model.config, tensors, int8_rows=_large(tensors) if int8 else ())
    if pieces is not None and pieces.resolve() != (folder / PIECES).resolve():
        shutil.copyfile(pieces, folder / PIECES)
    if decoder is not None:
        save_decoder(folder, decoder, int8=int8)
    return folder


def save_decoder(
    folder: str | Path, decoder: Decoder, *, like: Path | None = None, int8: bool = False
) -> None:
    """Write our small de-tokeniser into a tokenizer's folder.

    Args:
        folder: Made where missing.
        decoder: What is written.
        like: Folder of the tokenizer it was trained with; its files are copied in first.
        int8: Store matrices as int8 with a scale a row.
    """
    folder = Path(folder)
    if like is not None and like.resolve() != folder.resolve():
        folder.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG_NAME, FILE_NAME, PIECES):
            if (like / name).is_file():
                shutil.copyfile(like / name, folder / name)
    tensors = decoder.state_dict()
    write_weights(folder / DECODER_WEIGHTS, tensors, int8_rows=_large(tensors) if int8 else ())
    configs.save(decoder.config, folder / DECODER_CONFIG)


def _large(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [
        name
        for name, tensor in tensors.items()
        if tensor.ndim >= 2
        and tensor.numel() >= _SMALLEST_INT8
        and tensor.shape[0] > 1
        and name != "quantizer.codebook"
    ]


def find_folder(
    name: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | None = None,
) -> Path:
    """Return the folder of a model: `embedded`, a folder, or a repository on the hub."""
    if str(name) == "embedded":
        return Path(__file__).parent / "weights"
    return resolve_folder(
        name,
        revision=revision,
        local_files_only=local_files_only,
        token=token,
        files=("config.json",),
    )
