"""ControlNet-Transformer: trained copies of the first blocks steer the frozen ones (section 6)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from polyzoo.core.errors import DataError
from polyzoo.pixart_delta.blocks import PixArtBlock, TextKeys, TextLengths
from polyzoo.pixart_delta.config import ControlConfig, PixArtConfig

if TYPE_CHECKING:
    from polyzoo.pixart_delta.model import PixArtTransformer


class ControlBlock(nn.Module):
    """A copied block between projections that start at zero."""

    def __init__(self, config: PixArtConfig, *, first: bool) -> None:
        super().__init__()
        self.transformer_block = PixArtBlock(config)
        if first:
            self.before_proj = nn.Linear(config.width, config.width)
        self.after_proj = nn.Linear(config.width, config.width)
        self.first = first

    def forward(
        self, x: Tensor, state: Tensor, condition: Tensor, text: TextKeys, lengths: TextLengths
    ) -> tuple[Tensor, Tensor]:
        """New state of the branch, and what is added to the stream; all `(b, n, c)`.

        The first copy sees the stream x *after* the frozen block it was copied from: the published
        weights need that, although the paper draws it before.
        """
        if self.first:
            state = x + self.before_proj(state)
        state = self.transformer_block(state, condition, text, lengths)
        return state, self.after_proj(state)

    def reset_parameters(self) -> None:
        """Set the projections to zero; the block is copied from a transformer."""
        self.transformer_block.reset_parameters()
        for name, layer in self.named_children():
            if name != "transformer_block":
                for parameter in layer.parameters():
                    nn.init.zeros_(parameter)


class ControlBranch(ModelMixin, ConfigMixin):
    """The trained copies.

    Example:
        >>> branch = ControlBranch.copy_of(transformer, ControlConfig(num_blocks=13))
        >>> out = transformer(latents, captions, conditions, control=Control(branch, edges))
    """

    config_name = "config.json"
    _no_split_modules = ("PixArtBlock",)

    def __init__(self, transformer: PixArtConfig, config: ControlConfig | None = None) -> None:
        super().__init__()
        self.shape = config or ControlConfig()
        self.transformer_shape = transformer
        self.shape.check(transformer)
        self.register_to_config(
            _class_name="PixArtControlNetAdapterModel",
            num_layers=self.shape.num_blocks,
            transformer=asdict(transformer),
        )
        self.controlnet_blocks = nn.ModuleList(
            [ControlBlock(transformer, first=i == 0) for i in range(self.shape.num_blocks)]
        )
        for block in self.controlnet_blocks:
            block.reset_parameters()  # pyright: ignore[reportCallIssue]

    @classmethod
    def from_config(cls, config: Any = None, **_: Any) -> ControlBranch:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Build one from what `config` holds."""
        return cls(
            PixArtConfig(**config["transformer"]), ControlConfig(num_blocks=config["num_layers"])
        )

    @classmethod
    def copy_of(
        cls, transformer: PixArtTransformer, config: ControlConfig | None = None
    ) -> ControlBranch:
        """A branch that starts as an exact copy, and changes nothing yet."""
        branch = cls(transformer.shape, config)
        for own, block in zip(branch.copies(), transformer.transformer_blocks, strict=False):
            own.load_state_dict(block.state_dict())
        reference = transformer.scale_shift_table
        nn.Module.to(branch, device=reference.device, dtype=reference.dtype)
        return branch

    def copies(self) -> Iterator[PixArtBlock]:
        """The copied blocks."""
        for block in self.controlnet_blocks:
            yield block.transformer_block  # pyright: ignore[reportReturnType]

    def fuse_projections(self) -> None:
        """Compute queries, keys and values by one product each; the weights are not copied."""
        for block in self.copies():
            block.attn1.join(("to_q", "to_k", "to_v"))
            block.attn2.join(("to_k", "to_v"))


@dataclass(frozen=True)
class Control:
    """A branch at work on a batch."""

    branch: ControlBranch
    """The copies."""
    latents: Tensor
    """`(b, 4, H, W)`: encoded control images, times the autoencoder's factor."""
    scale: float | Tensor = 1.0
    """Multiplies what the branch adds; 0 is the plain model."""

    def check(self, latents: Tensor, shape: PixArtConfig) -> None:
        """Refuse what does not fit the latents it steers.

        Raises:
            DataError: Size, batch or network differ.
        """
        if self.latents.shape != latents.shape:
            raise DataError(
                f"control latents of shape {tuple(self.latents.shape)} for latents of shape "
                f"{tuple(latents.shape)}: they must agree; prepare the control image at the size "
                "of the result, and repeat it for every image of the batch"
            )
        if self.branch.transformer_shape.width != shape.width:
            raise DataError(
                f"the control branch is {self.branch.transformer_shape.width} wide, the "
                f"transformer {shape.width}: they belong to different models"
            )
        self.branch.shape.check(shape)


def zero_parameters(branch: ControlBranch) -> list[nn.Parameter]:
    """The projections that start at zero."""
    return [
        parameter
        for name, parameter in branch.named_parameters()
        if ".before_proj." in name or ".after_proj." in name
    ]


def is_untrained(branch: ControlBranch) -> bool:
    """Whether the branch still changes nothing."""
    with torch.no_grad():
        return not any(bool(parameter.any()) for parameter in zero_parameters(branch))
