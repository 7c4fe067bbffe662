"""The PixArt transformer: latents, timestep and captions in, noise prediction out (section 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from polyzoo.core.errors import ConfigError, DataError
from polyzoo.pixart_delta.blocks import PixArtBlock, TextKeys, TextLengths, modulate
from polyzoo.pixart_delta.captions import PackedCaptions, RowCaptions
from polyzoo.pixart_delta.config import PixArtConfig
from polyzoo.pixart_delta.control import Control, ControlBranch
from polyzoo.pixart_delta.position import SCALAR_CHANNELS, position_table, scalar_embedding


@dataclass(frozen=True)
class TextMemory:
    """Keys and values of all blocks for the captions of a batch: worked out once an image."""

    blocks: tuple[TextKeys, ...]
    """Of the transformer's blocks."""
    lengths: TextLengths
    """How the captions are laid out."""
    batch: int
    """Captions."""
    control: tuple[TextKeys, ...] = ()
    """Of the control branch's blocks."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What the model is told besides the text; all float32, on the model's device.

    Only models with size conditions use `size` and `ratio`.
    """

    timestep: Tensor
    """`(b,)`, 0 to 999."""
    size: Tensor | None = None
    """`(b, 2)`: height and width in pixels of the image as it should look."""
    ratio: Tensor | None = None
    """`(b, 1)`: height over width."""


class Embedder(nn.Module):
    """Scalars to vectors: sinusoid and two linear layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(SCALAR_CHANNELS, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, values: Tensor) -> Tensor:
        """`(n,)` float32 to `(n, channels)`."""
        embedded = scalar_embedding(values).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(embedded)))


class ConditionEmbedders(nn.Module):
    """Embedders of timestep, image size and aspect ratio; one for height and width."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.timestep_embedder = Embedder(config.width)
        if config.multi_scale:
            self.resolution_embedder = Embedder(config.width // 3)
            self.aspect_ratio_embedder = Embedder(config.width // 3)


class AdaLayerNormSingle(nn.Module):
    """One adaptive norm for the whole network."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.emb = ConditionEmbedders(config)
        self.linear = nn.Linear(config.width, 6 * config.width)
        self.multi_scale = config.multi_scale

    def forward(self, conditions: Conditions) -> tuple[Tensor, Tensor]:
        """The blocks' shared condition `(b, 6c)`, and the embedding `(b, c)` it comes from."""
        embedded = self.emb.timestep_embedder(conditions.timestep)
        if self.multi_scale:
            assert conditions.size is not None and conditions.ratio is not None  # noqa: S101, PT018
            sides = self.emb.resolution_embedder(conditions.size.flatten())
            ratio = self.emb.aspect_ratio_embedder(conditions.ratio.flatten())
            sides = sides.view(len(embedded), -1)
            embedded = embedded + torch.cat([sides, ratio], dim=1)
        return self.linear(F.silu(embedded)), embedded


class PatchEmbedding(nn.Module):
    """Squares of a latent to tokens, row by row."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.width, kernel_size=p, stride=p)

    def forward(self, latents: Tensor) -> Tensor:
        """`(b, 4, H, W)` to `(b, n, c)`."""
        return self.proj(latents).flatten(2).transpose(1, 2)


class CaptionProjection(nn.Module):
    """Text states to the transformer's width."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.caption_channels, config.width)
        self.linear_2 = nn.Linear(config.width, config.width)

    def forward(self, text: Tensor) -> Tensor:
        """`(..., caption_channels)` to `(..., c)`."""
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))


class PixArtTransformer(ModelMixin, ConfigMixin):
    """PixArt-alpha's diffusion transformer, single-scale or with size conditions (MS).

    Example:
        >>> model = PixArtTransformer(PixArtConfig(sample_size=32))
        >>> out = model(latents, captions, Conditions(timestep=torch.tensor([999.0])))
        >>> noise = out[:, : model.shape.in_channels]
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = True
    _no_split_modules = ("PixArtBlock",)

    def __init__(self, config: PixArtConfig | None = None) -> None:
        super().__init__()
        shape = config or PixArtConfig()
        self.shape = shape
        self.register_to_config(**diffusers_config(shape))
        self.pos_embed = PatchEmbedding(shape)
        self.adaln_single = AdaLayerNormSingle(shape)
        self.caption_projection = CaptionProjection(shape)
        self.transformer_blocks = nn.ModuleList(
            [PixArtBlock(shape) for _ in range(shape.num_layers)]
        )
        self.scale_shift_table = nn.Parameter(torch.empty(2, shape.width))
        self.proj_out = nn.Linear(shape.width, shape.patch_size**2 * shape.out_channels)
        self.gradient_checkpointing = False
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: Any = None, **_: Any) -> PixArtTransformer:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Build one from a PixArtConfig, or from a diffusers configuration of either class name."""
        return cls(config if isinstance(config, PixArtConfig) else read_diffusers_config(config))

    def reset_parameters(self) -> None:
        """Draw fresh weights (section 2.4): the output and the text attention start at zero."""
        for block in self.transformer_blocks:
            block.reset_parameters()  # pyright: ignore[reportCallIssue]
        small = (self.adaln_single, self.caption_projection)
        for module in (m for part in small for m in part.modules()):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.flatten(1))
        assert self.pos_embed.proj.bias is not None  # noqa: S101 - our own layer
        nn.init.zeros_(self.pos_embed.proj.bias)
        nn.init.normal_(self.scale_shift_table, std=self.shape.width**-0.5)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def remember(
        self,
        captions: PackedCaptions | RowCaptions,
        *,
        queries: int,
        branch: ControlBranch | None = None,
    ) -> TextMemory:
        """Work out what the blocks keep of the captions, for any number of steps.

        Args:
            captions: One for each image.
            queries: Tokens of an image.
            branch: The control branch, where one is used: its blocks read the captions too.

        Raises:
            DataError: The captions come from another text encoder.
        """
        rows = isinstance(captions, RowCaptions)
        given = (captions.states if rows else captions.tokens).shape[-1]
        channels = self.shape.caption_channels
        if given != channels:
            known = {4096: " (T5-v1.1-XXL)", 256: " (word vectors)"}.get(channels, "")
            raise DataError(
                f"captions have {given} channels; this transformer expects {channels}{known}: "
                "encode them with the text encoder it was trained with"
            )
        if rows:
            return self.remember_rows(captions.states, captions.kv_lens, branch=branch)
        lengths = TextLengths(packed=None if captions.uniform else captions.seqlens(queries))
        count = len(captions) if captions.uniform else None
        return self._memory(captions.tokens, count, lengths, len(captions), branch)

    def remember_rows(
        self, states: Tensor, kv_lens: Tensor | None, *, branch: ControlBranch | None = None
    ) -> TextMemory:
        """The same for captions in rows of one length, as a compiled or captured step needs them.

        Args:
            states: `(b, n, caption_channels)`; what stands beyond a caption's length is not seen.
            kv_lens: int32 `(b,)`, or None where every row is full.
            branch: The control branch, where one is used.
        """
        b = len(states)
        return self._memory(states.flatten(0, 1), b, TextLengths(kv_lens=kv_lens), b, branch)

    def _memory(
        self,
        tokens: Tensor,
        rows: int | None,
        lengths: TextLengths,
        batch: int,
        branch: ControlBranch | None,
    ) -> TextMemory:
        text = self.caption_projection(tokens)
        blocks, copies = (
            tuple(block.attn2.remember(text, rows=rows) for block in group)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
            for group in (self.transformer_blocks, branch.copies() if branch is not None else ())
        )
        return TextMemory(blocks, lengths, batch, copies)

    def forward(
        self,
        latents: Tensor,
        captions: PackedCaptions | RowCaptions | TextMemory,
        conditions: Conditions,
        *,
        control: Control | None = None,
    ) -> Tensor:
        """Predict the noise in latents.

        Args:
            latents: `(b, 4, H, W)` noisy latents, sides divisible by the patch size.
            captions: One for each latent, or their memory.
            conditions: Timestep, and for MS models size and ratio; left out, these come from the
                latents, at 8 pixels a side.
            control: Branch and control latents.

        Returns:
            `(b, 8, H, W)`: noise, then variance interpolation where it is learned.

        Raises:
            DataError: A shape does not fit the model, or parts differ in their batch.
        """
        self.check(latents, len_of(captions), conditions, control)
        rows, columns = (side // self.shape.patch_size for side in latents.shape[2:])
        branch = control.branch if control is not None else None
        text = (
            captions
            if isinstance(captions, TextMemory)
            else self.remember(captions, queries=rows * columns, branch=branch)
        )
        if self.shape.multi_scale:
            conditions = fill_conditions(conditions, latents)
        position = self.position(rows, columns, latents.device)
        return self.denoise(latents, position, text, conditions, control)

    def denoise(
        self,
        latents: Tensor,
        position: Tensor,
        text: TextMemory,
        conditions: Conditions,
        control: Control | None = None,
    ) -> Tensor:
        """`forward` after its checks: tensor work alone, fit for torch.compile.

        Args:
            latents: `(b, 4, H, W)`.
            position: `(n, c)`, as `position` gives it.
            text: As `remember` gives it.
            conditions: Complete: an MS model needs size and ratio.
            control: Branch and control latents.
        """
        rows, columns = (side // self.shape.patch_size for side in latents.shape[2:])
        condition, embedded = self.adaln_single(conditions)
        x = self.embed(latents, position)
        state = x
        if control is not None:
            state = self.embed(control.latents, position)
        for index, block in enumerate(self.transformer_blocks):
            if control is not None and 0 < index <= len(control.branch.controlnet_blocks):
                state, skip = control.branch.controlnet_blocks[index - 1](
                    x, state, condition, text.control[index - 1], text.lengths
                )
                x = x + skip * control.scale
            x = self._run(block, x, condition, text.blocks[index], text.lengths)
        table = self.scale_shift_table + embedded[:, None]
        shift, scale = table.unsqueeze(2).unbind(1)
        return self.unpatchify(self.proj_out(modulate(x, shift, scale)), rows, columns)

    def embed(self, latents: Tensor, position: Tensor) -> Tensor:
        """Tokens `(b, n, c)` of latents, with their positions."""
        tokens = self.pos_embed(latents.to(self.pos_embed.proj.weight.dtype))
        return tokens + position.to(tokens.dtype)

    def position(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Position embedding `(n, c)` of a grid; kept for later calls."""
        shape = self.shape
        return _positions(
            rows, columns, shape.width, shape.base_size, shape.position_scale, str(device)
        )

    def unpatchify(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """`(b, n, p * p * c)`, c fastest, to `(b, c, H, W)`."""
        p = self.shape.patch_size
        grid = tokens.reshape(len(tokens), rows, columns, p, p, self.shape.out_channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(
            len(tokens), self.shape.out_channels, rows * p, columns * p
        )

    def fuse_projections(self) -> None:
        """Compute queries, keys and values by one product each; the weights are not copied."""
        for block in self.transformer_blocks:
            fuse_block(block)  # pyright: ignore[reportArgumentType]

    def check(
        self, latents: Tensor, texts: int, conditions: Conditions, control: Control | None
    ) -> None:
        """Refuse inputs that do not fit together.

        Raises:
            DataError: What was given, what is allowed.
        """
        shape = self.shape
        if latents.ndim != 4 or latents.shape[1] != shape.in_channels:
            raise DataError(
                f"latents of shape {tuple(latents.shape)}: give (batch, {shape.in_channels}, "
                "height, width)"
            )
        sides = tuple(latents.shape[2:])
        if not shape.multi_scale and sides != (shape.sample_size, shape.sample_size):
            raise DataError(
                f"latents of {sides[0]} x {sides[1]}: this model draws only "
                f"{shape.sample_size} x {shape.sample_size}; for other sizes use a multi-scale "
                "(MS) model"
            )
        for side in sides:
            if side % shape.patch_size or not side:
                low = side // shape.patch_size * shape.patch_size
                raise DataError(
                    f"latent side {side} is not a multiple of {shape.patch_size}: use "
                    f"{low or shape.patch_size} or {low + shape.patch_size}"
                )
        b = len(latents)
        for name, count in (("captions", texts), ("timestep", len(conditions.timestep))):
            if count != b:
                raise DataError(f"{name} has batch {count}, the latents {b}: they must agree")
        if control is not None:
            control.check(latents, shape)

    def _run(self, block: nn.Module, *arguments: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *arguments)  # pyright: ignore[reportOptionalCall]
        return block(*arguments)


def fuse_block(block: PixArtBlock) -> None:
    """Join the projections of one block."""
    block.attn1.join(("to_q", "to_k", "to_v"))
    block.attn2.join(("to_k", "to_v"))


def len_of(captions: PackedCaptions | RowCaptions | TextMemory) -> int:
    """Number of captions."""
    return captions.batch if isinstance(captions, TextMemory) else len(captions)


def fill_conditions(conditions: Conditions, latents: Tensor, factor: int = 8) -> Conditions:
    """Give an MS model the size and ratio of the latents where they are not given.

    Args:
        conditions: What the caller knows.
        latents: `(b, c, H, W)`.
        factor: Image pixels to a latent pixel.
    """
    b, _, height, width = latents.shape
    size, ratio = conditions.size, conditions.ratio
    like = {"device": latents.device, "dtype": torch.float32}
    if size is None:
        size = torch.tensor([[height * factor, width * factor]], **like).expand(b, 2)
    if ratio is None:
        ratio = torch.tensor([[height / width]], **like).expand(b, 1)
    if tuple(size.shape) != (b, 2) or tuple(ratio.shape) != (b, 1):
        raise DataError(
            f"size of shape {tuple(size.shape)} and ratio of shape {tuple(ratio.shape)}: give "
            f"({b}, 2) and ({b}, 1)"
        )
    return Conditions(timestep=conditions.timestep, size=size, ratio=ratio)


@lru_cache(maxsize=64)
def _positions(
    rows: int, columns: int, width: int, base_size: int, scale: float, device: str
) -> Tensor:
    return position_table(rows, columns, width=width, base_size=base_size, scale=scale).to(device)


_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "norm_type": "ada_norm_single",
    "num_embeds_ada_norm": 1000,
}
_CLASSES = ("PixArtTransformer2DModel", "Transformer2DModel", "PixArtTransformer")


def diffusers_config(config: PixArtConfig) -> dict[str, Any]:
    """A shape as the configuration of diffusers' class, which can be built from it."""
    own = asdict(config)
    for name in ("mlp_ratio", "caption_length"):
        own.pop(name)
    return {
        "_class_name": _CLASSES[0],
        **own,
        "interpolation_scale": config.position_scale,
        "use_additional_conditions": config.multi_scale,
        "cross_attention_dim": config.width,
        **_FIXED,
    }


def read_diffusers_config(values: Mapping[str, Any], *, caption_length: int = 120) -> PixArtConfig:
    """Turn a diffusers configuration into a shape.

    Raises:
        ConfigError: It describes another network, such as PixArt-Sigma's or one with other norms.
    """
    name = values.get("_class_name", _CLASSES[0])
    if name not in _CLASSES:
        raise ConfigError(f"_class_name={name!r} is no PixArt transformer: {', '.join(_CLASSES)}")
    for key, wanted in _FIXED.items():
        if values.get(key, wanted) != wanted:
            raise ConfigError(f"{key}={values[key]!r}: a PixArt transformer has {wanted!r}")
    known = {field.name for field in fields(PixArtConfig)}
    config = PixArtConfig(
        **{
            "caption_length": caption_length,
            **{key: value for key, value in values.items() if key in known},
        }
    )
    width = values.get("cross_attention_dim", config.width)
    if width != config.width:
        raise ConfigError(
            f"cross_attention_dim={width} differs from the width {config.width}: not PixArt"
        )
    return config
