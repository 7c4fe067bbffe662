"""What the commands take. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from polyzoo.core.errors import ConfigError

Positional = tyro.conf.Positional


@dataclass(frozen=True, kw_only=True, slots=True)
class InferConfig:
    """Draw images."""

    prompt: Annotated[str, Positional] = ""
    """What to draw; `--ar 9:16` in it chooses a ratio (height:width)."""
    prompts: Path | None = None
    """A JSON object per line with prompt, and where wanted seed, height, width, negative_prompt,
    name: an image each, into --out."""
    out: Path = Path("out.png")
    """PNG file; a folder with --prompts or several images."""
    model: str = "embedded"
    """embedded, a folder, a hub repository, or a .safetensors file."""
    steps: int | None = None
    """Network evaluations; 4 with LCM, 20 with dpm, 25 with ddim by default."""
    seed: int = 0
    """Of the first image; the next ones count up."""
    count: int = 1
    """Images of each prompt."""
    height: int | None = None
    """In pixels; the model's own by default."""
    width: int | None = None
    """In pixels."""
    exact: bool = False
    """Draw exactly this size (a multiple of 16) instead of the nearest trained one."""
    guidance: float | None = None
    """4.5 by default, 1 (none) with LCM."""
    negative: str | None = None
    """What guidance leads away from."""
    scheduler: Literal["lcm", "dpm", "ddim"] | None = None
    """What suits the weights by default."""
    spacing: Literal["even", "skip"] | None = None
    """Of LCM's steps."""
    image: Path | None = None
    """Picture to start from."""
    mask: Path | None = None
    """White is painted anew, black stays as in --image."""
    strength: float = 0.6
    """Share of the noise that --image is laid under."""
    control: Path | None = None
    """Picture whose outlines steer."""
    control_type: Literal["hed", "edges", "raw"] = "edges"
    """Network edges, colour differences, or a ready map."""
    control_scale: float = 1.0
    """0 to 2."""
    control_start: float = 0.0
    """Share of the steps before which control is off."""
    control_end: float = 1.0
    """Share of the steps after which control is off."""
    controlnet: Path | None = None
    """Folder or file of a control branch."""
    hed: Path | None = None
    """Weights of the edge detector."""
    vae: Path | None = None
    """Folder of another autoencoder."""
    text: Path | None = None
    """Folder with tokenizer/ and text_encoder/."""
    lora: tuple[str, ...] = ()
    """Adapters, PATH or PATH=SCALE; `none` leaves out the embedded model's own."""
    memory: Literal["full", "8gb"] = "full"
    """8gb: parts take turns on the GPU, the text encoder in int8."""
    compile: bool = False
    """Compile and capture; pays from the second image of a shape on."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    dtype: str | None = None
    """bf16 on a GPU, fp32 elsewhere by default."""
    batch: int = 4
    """Images drawn at a time."""
    profile: bool = False
    """Report seconds and peak memory of each stage."""

    def __post_init__(self) -> None:
        """Check what does not need a model."""
        if bool(self.prompt) == (self.prompts is not None):
            raise ConfigError("give a prompt or --prompts FILE, one of them")
        for name in ("count", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.mask is not None and self.image is None:
            raise ConfigError("--mask needs --image: the picture that stays outside the mask")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """Convert weights between layouts; .pth files are read without running their code."""

    source: Annotated[Path, Positional]
    """An official .pth or .safetensors (base, ControlNet or HED), or a folder in diffusers'
    layout."""
    out: Path
    """Folder in diffusers' layout; or a .safetensors file in the official one, from a folder."""
    sample_size: int | None = None
    """Latent side of the model (32, 64, 128); by its size conditions and the file's name where
    not given."""
    heads: int | None = None
    """Attention heads, where not 16."""
    use_ema: bool = False
    """Take the averaged weights of a training checkpoint."""
    full: bool = False
    """With a ControlNet file: write the frozen transformer too."""
    dtype: Literal["keep", "fp16", "bf16", "fp32"] = "keep"
    """Stored type."""
    kind: Literal["base", "lcm"] = "base"
    """What the weights are, kept in their header."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractConfig:
    """Encode images and captions once, to train on; goes on where it was interrupted."""

    data: Path
    """data_info.json (a list of path, prompt, height, width, ratio), or a .jsonl of the same."""
    images: Path
    """Folder that the paths are relative to."""
    out: Path
    """Folder of the features."""
    model: str = "embedded"
    """Whose autoencoder and text encoder to use."""
    resolution: int = 1024
    """Of the buckets, or the one square size."""
    multi_scale: bool = True
    """Aspect-ratio buckets; else one square size, middle cut out."""
    control: Literal["none", "edges", "hed"] = "none"
    """Also encode control maps."""
    hed: Path | None = None
    """Weights of the edge detector."""
    shard_size: int = 256
    """Images in a shard: what is lost at most when interrupted."""
    bad_limit: int = 20
    """Unreadable images after which it stops; each is named."""
    prompt: str | None = None
    """One prompt for a folder of images without captions (DreamBooth); --data is the folder."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("shard_size", "resolution"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.control == "hed" and self.hed is None:
            raise ConfigError("control='hed' needs hed: the weights of the edge detector")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Measure the small model on the icon pack: needs the DINOv2 and MiniLM assets."""

    icons: Path
    """The icon pack."""
    model: str = "embedded"
    """Folder of a model trained on it."""
    out: Path = Path("out/pixart-eval")
    """Folder of grids and figures."""
    split: Literal["reserved-combination", "val", "reserved-concept"] = "reserved-combination"
    """Whose prompts are drawn."""
    images: int = 200
    """How many prompts."""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of LCM steps."""
    teacher_steps: int = 25
    """Guided DDIM steps of the base model."""
    guidance: float = 3.0
    """Of the teacher."""
    control: bool = True
    """Also measure the control branch."""
    seed: int = 0
    """Of the first image."""
    batch: int = 25
    """Images drawn at a time."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
