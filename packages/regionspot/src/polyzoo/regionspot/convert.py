"""The `convert` command: published checkpoints to safetensors, strictly and with their licence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from polyzoo.core.errors import ConfigError, WeightsError
from polyzoo.core.io import sha256_file
from polyzoo.core.log import get_logger
from polyzoo.core.weights import convert_pickle, load_into, read_weights, write_weights
from polyzoo.regionspot.clip import input_size
from polyzoo.regionspot.config import SAMS, ClipConfig, IntegrationConfig, RegionSpotConfig
from polyzoo.regionspot.folders import check_quick_gelu, fill_tower, save_integration
from polyzoo.regionspot.model import RegionSpot, split_official
from polyzoo.regionspot.options import ConvertConfig

_log = get_logger(__name__)
LICENCES = {
    "regionspot": (
        "the published RegionSpot code, and so presumably its weights, are CC BY-NC 4.0: not for "
        "commercial use"
    ),
    "sam": "SAM's weights are Apache-2.0",
    "clip": "OpenAI's CLIP weights are MIT; others have their own licence",
}
TRAINED = 60
_VARIANTS = {
    (768, 512): ("ViT-B-16-quickgelu",),
    (1024, 768): ("ViT-L-14-quickgelu", "ViT-L-14-336-quickgelu"),
}


@dataclass(frozen=True)
class ConvertReport:
    """What was written."""

    out: str
    what: str
    tensors: int
    variant: str
    licence: str


def main(config: ConvertConfig) -> ConvertReport:
    """Run the command."""
    tensors = _read(config.source)
    _log.warning("licence: %s", LICENCES[config.what])
    if config.what == "regionspot":
        return _regionspot(config, tensors)
    if config.out.suffix != ".safetensors":
        raise ConfigError(f"out={config.out}: the name must end in .safetensors")
    write_weights(config.out, tensors, metadata={"source_sha256": sha256_file(config.source)})
    return ConvertReport(
        out=str(config.out), what=config.what, tensors=len(tensors), variant="",
        licence=LICENCES[config.what],
    )  # fmt: skip


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_weights(path)
    return convert_pickle(path)


def _regionspot(config: ConvertConfig, tensors: dict[str, Tensor]) -> ConvertReport:
    parts = split_official(tensors)
    module = parts["integration"]
    name = choose_clip(module, config.clip_name, source=str(config.source))
    shape = RegionSpotConfig(
        sam=SAMS[config.sam], clip=ClipConfig(name=name), integration=IntegrationConfig()
    )
    model = RegionSpot(shape)
    check_quick_gelu(model.clip, name, openai=True)
    load_module(model, module, source=str(config.source))
    for part, tower, given in (
        ("sam", model.sam, config.sam_weights), ("clip", model.clip, config.clip_weights),
    ):  # fmt: skip
        if given is not None:
            fill_tower(tower, given)
        if parts[part]:
            compare_tower(tower, parts[part], name=part, given=given is not None)
        elif given is None:
            raise WeightsError(
                f"{config.source}: holds no {part}; give --{part}-weights, so that the module is "
                "bound to the tower it was trained with"
            )
    save_integration(config.out, model, source=f"sha256:{sha256_file(config.source)}")
    return ConvertReport(
        out=str(config.out), what="regionspot", tensors=len(module),
        variant=f"{name} at {input_size(model.clip)[0]}", licence=LICENCES["regionspot"],
    )  # fmt: skip


def choose_clip(module: dict[str, Tensor], wanted: str | None, *, source: str) -> str:
    """Tell which CLIP the module belongs to, by its shapes and what the user says.

    Raises:
        WeightsError: The shapes are of no published variant, or of another one than wanted.
        ConfigError: 224 and 336 cannot be told apart, and nothing was said.
    """
    try:
        found = (module["to_clip.weight"].shape[0], module["projector.weight"].shape[0])
    except KeyError as error:
        raise WeightsError(f"{source}: is no RegionSpot checkpoint: {error} is missing") from None
    fitting = _VARIANTS.get(found)
    if fitting is None:
        raise WeightsError(
            f"{source}: width {found[0]} and text channels {found[1]} are of no published variant; "
            f"there are {', '.join(f'{w}/{t}' for w, t in _VARIANTS)}"
        )
    if wanted is not None:
        if wanted not in fitting:
            raise WeightsError(
                f"{source}: its shapes are those of {' or '.join(fitting)}, not of {wanted}"
            )
        return wanted
    if len(fitting) > 1:
        raise ConfigError(
            f"{source}: the shapes fit {' and '.join(fitting)}; say which with --clip-name"
        )
    return fitting[0]


def load_module(model: RegionSpot, module: dict[str, Tensor], *, source: str) -> None:
    """Load the trained part: all of its 60 tensors, and nothing else."""
    load_into(model.integration, module, source=source)
    if len(module) != TRAINED:
        raise WeightsError(f"{source}: {len(module)} trained tensors; there must be {TRAINED}")


def compare_tower(tower: nn.Module, stored: dict[str, Tensor], *, name: str, given: bool) -> None:
    """Take a checkpoint's frozen tower, or compare it with the one given.

    Raises:
        WeightsError: They differ: the module was trained with other weights.
    """
    if not given:
        load_into(tower, stored, source=f"the checkpoint's {name}")
        return
    own = tower.state_dict()
    for key, tensor in stored.items():
        if key not in own or own[key].shape != tensor.shape:
            raise WeightsError(f"the checkpoint's {name} has {key!r}, which the given one lacks")
        if not torch.allclose(own[key].float(), tensor.float(), rtol=1e-3, atol=1e-4):
            raise WeightsError(
                f"the checkpoint's {name} differs from the weights given at {key!r}; the module "
                "was trained with other weights"
            )
