"""What the commands other than training take. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """The text side of a training, made once: pieces and vectors."""

    out: Path
    """Folder to write."""
    pack: Path | None = None
    """Icon pack; its training and validation splits are read."""
    pairs: Path | None = None
    """Or a .jsonl file of pairs."""
    images: Path | None = None
    """Folder of the files that pairs names."""
    vocabulary: int = 4096
    """Word pieces to keep."""
    teacher: Literal["minilm", "wordllama"] = "minilm"
    """Sentence encoder whose vectors are written: minilm or wordllama."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeConfig:
    """Many pictures to token shards; the same call again goes on where it was stopped."""

    images: Annotated[Path, tyro.conf.Positional]
    """Folder of pictures or of .tar shards, one .tar, an icon pack, or one picture."""
    out: Path
    """Folder of the shards."""
    model: str = "embedded"
    """embedded, a folder, or a hub id."""
    batch_size: int = 64
    """Pictures at a time; codes do not depend on it."""
    workers: int = 0
    """Processes that read and decode."""
    part: str = "1/1"
    """NUMBER/PARTS: take every PARTS-th picture, for several processes with a folder each."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: str = "float32"
    """Of the tower: float32, bfloat16, float16; the codebook search is fp32 always."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DetokenizeConfig:
    """Codes to pictures."""

    tokens: Annotated[Path, tyro.conf.Positional]
    """Folder of token shards, or a .json file: a list of codes, or a list of such lists."""
    out: Path
    """Folder of the PNG files."""
    model: str = "embedded"
    """embedded, a folder, or a hub id."""
    detokenizer: str | None = None
    """A diffusers folder or hub id (unCLIP, or Stable Diffusion for v1); else our own decoder."""
    seed: int = 0
    """Of the noise; picture i gets seed + i."""
    steps: int | None = None
    """Of the drawing; the de-tokeniser's own number where not given."""
    guidance: float | None = None
    """Strength of guidance; the de-tokeniser's own where not given."""
    limit: int | None = None
    """Draw only so many."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionConfig:
    """Captions of pictures."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Pictures."""
    model: str = "embedded"
    """Tokenizer: embedded, a folder, or a hub id."""
    language: Path | None = None
    """Language model: a folder of train-lm or export; the tokenizer's own where not given."""
    base: str | None = None
    """Of adapters, where it lies elsewhere than when they were trained."""
    new_tokens: int = 40
    """Tokens of a caption, at most."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawConfig:
    """Pictures of texts."""

    prompts: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Texts, such as "red apple, flat style"."""
    out: Path = Path("drawings")
    """Folder of the PNG files."""
    model: str = "embedded"
    """Tokenizer: embedded, a folder, or a hub id."""
    language: Path | None = None
    """Language model: a folder of train-lm or export; the tokenizer's own where not given."""
    base: str | None = None
    """Of adapters, where it lies elsewhere than when they were trained."""
    detokenizer: str | None = None
    """A diffusers folder or hub id; else our own decoder."""
    seed: int = 0
    """Of the codes and of the noise."""
    temperature: float = 0.7
    """Of the codes; 0 takes the likeliest."""
    top_p: float = 0.9
    """Codes are drawn from the smallest set with this much probability."""
    steps: int | None = None
    """Of the drawing."""
    guidance: float | None = None
    """Strength of guidance."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatConfig:
    """A conversation with text and pictures, a line a turn, from stdin."""

    model: str = "embedded"
    """Tokenizer: embedded, a folder, or a hub id."""
    language: Path | None = None
    """Language model: a folder of train-lm or export; the tokenizer's own where not given."""
    base: str | None = None
    """Of adapters, where it lies elsewhere than when they were trained."""
    template: Literal["plain", "vicuna", "llama2"] = "plain"
    """plain: text and images one after another; vicuna: SEED-LLaMA-8B; llama2: the 14B."""
    out: Path = Path("drawings")
    """Folder of pictures it draws."""
    new_tokens: int = 128
    """Tokens of an answer, at most."""
    temperature: float = 0.7
    """0 takes the likeliest token."""
    top_p: float = 0.5
    """Tokens are drawn from the smallest set with this much probability."""
    seed: int = 0
    """Of the sampling."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """Published weights, adapters or token tars, in this package's form."""

    what: Annotated[Literal["tokenizer", "adapters", "tokens"], tyro.conf.Positional]
    """tokenizer: SEED's own checkpoints; adapters: merge into a plain model; tokens: pickled
    WebDataset tars of the reference."""
    out: Path
    """Folder to write."""
    checkpoint: tuple[Path, ...] = ()
    """tokenizer: seed_quantizer.pt (v2), or causal_qformer.pth and seed_tokenizer.pth (v1)."""
    vision: Path | None = None
    """tokenizer: eva_vit_g.pth, or a BLIP-2 checkpoint as safetensors file or folder."""
    adapters: Path | None = None
    """adapters: folder of train-lm."""
    base: str | None = None
    """adapters: the base model, where it lies elsewhere than when they were trained."""
    tars: Path | None = None
    """tokens: a .tar, or a folder of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """How well codes keep what an image means."""

    pairs: Path | None = None
    """A .jsonl file: {"image": FILE, "caption": TEXT or a list, optional "label", "group"}."""
    images: Path | None = None
    """Folder of the files that pairs names."""
    pack: Path | None = None
    """Or an icon pack: its reserved concepts and combinations are measured, apart."""
    model: str = "embedded"
    """Tokenizer: embedded, a folder, or a hub id."""
    language: Path | None = None
    """Language model: a folder of train-lm or export; the tokenizer's own where not given."""
    base: str | None = None
    """Of adapters, where it lies elsewhere than when they were trained."""
    text: Literal["own", "minilm"] = "own"
    """Who encodes captions for retrieval: the text branch, or the asset minilm."""
    captions: bool = True
    """Also measure captions and drawings, where there is a language model."""
    drawings: int = 64
    """Prompts drawn, at most; 0 draws none."""
    limit: int | None = None
    """Use only so many pairs of each split."""
    seed: int = 0
    """Of the drawings."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
