"""PixArt networks small enough for a test, and stored reference cases of the model's package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from polyzoo.core.weights import load_into
from polyzoo.pixart_delta.captions import PackedCaptions
from polyzoo.pixart_delta.config import ControlConfig, PixArtConfig
from polyzoo.pixart_delta.control import ControlBranch
from polyzoo.pixart_delta.model import Conditions, PixArtTransformer
from support.parity import case_folders


@dataclass(frozen=True)
class Case:
    """One folder of stored tensors."""

    folder: Path

    @property
    def about(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text(encoding="utf-8"))

    def io(self) -> dict[str, Tensor]:
        return load_file(self.folder / "io.safetensors")

    def weights(self, name: str = "weights") -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    @property
    def model(self) -> PixArtConfig:
        return official_config(self.about["model"], multi_scale="MS" in self.about["class"])


def cases(config: pytest.Config | pytest.FixtureRequest, *, has: str) -> list[Case]:
    """Every stored case whose folder holds a file, under any name."""
    found = []
    for folder in case_folders(config, "pixart_delta"):
        found += [Case(path.parent) for path in sorted(Path(folder).glob(f"*/{has}"))]
    return found


def named(config: pytest.Config | pytest.FixtureRequest, name: str) -> list[Case]:
    """Every stored case of a name, such as lcm_loss or lcm_loss_2."""
    found = []
    for folder in case_folders(config, "pixart_delta"):
        found += [Case(path) for path in sorted(Path(folder).glob(f"{name}*")) if path.is_dir()]
    return found


def official_config(values: dict[str, Any], *, multi_scale: bool) -> PixArtConfig:
    """The shape that the official classes' arguments describe."""
    return PixArtConfig(
        sample_size=values["input_size"],
        patch_size=values["patch_size"],
        in_channels=values["in_channels"],
        out_channels=values["in_channels"] * (2 if values["pred_sigma"] else 1),
        num_layers=values["depth"],
        num_attention_heads=values["num_heads"],
        attention_head_dim=values["hidden_size"] // values["num_heads"],
        caption_channels=values["caption_channels"],
        caption_length=values["model_max_length"],
        mlp_ratio=values["mlp_ratio"],
        interpolation_scale=values["lewei_scale"],
        use_additional_conditions=multi_scale,
    )


def inputs(io: dict[str, Tensor], *, masked: bool = True) -> tuple[Any, ...]:
    """Latents, captions and conditions of a stored case."""
    captions = PackedCaptions.from_padded(io["y"], io["mask"] if masked else None)
    conditions = Conditions(
        timestep=io["timestep"].float(), size=io.get("img_hw"), ratio=io.get("aspect_ratio")
    )
    return io["x"], captions, conditions


def tiny_config(**changes: Any) -> PixArtConfig:
    values: dict[str, Any] = {
        "sample_size": 8,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "caption_channels": 16,
        "caption_length": 10,
        "use_additional_conditions": True,
    }
    return PixArtConfig(**{**values, **changes})


def tiny_model(seed: int = 0, **changes: Any) -> PixArtTransformer:
    """A model of which every parameter, also those that start at zero, carries signal."""
    torch.manual_seed(seed)
    return shaken(PixArtTransformer(tiny_config(**changes)))


def tiny_branch(model: PixArtTransformer, blocks: int = 2, seed: int = 1) -> ControlBranch:
    torch.manual_seed(seed)
    return shaken(ControlBranch.copy_of(model, ControlConfig(num_blocks=blocks)))


def shaken(module: Any) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module.eval()


def tiny_captions(lengths: tuple[int, ...] = (3, 7), channels: int = 16) -> PackedCaptions:
    generator = torch.Generator().manual_seed(sum(lengths))
    return PackedCaptions(torch.randn(sum(lengths), channels, generator=generator), lengths)


def loaded(case: Case, weights: dict[str, Tensor]) -> PixArtTransformer:
    model = PixArtTransformer(case.model)
    load_into(model, weights, source=str(case.folder))
    return model.eval()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value."""
    assert found.shape == wanted.shape
    return float((found.detach().double() - wanted.double()).abs().max() / wanted.abs().max())
