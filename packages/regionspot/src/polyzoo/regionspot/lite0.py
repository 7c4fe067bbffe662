"""EfficientNet-lite0 as a feature pyramid, its batch norms folded into the convolutions.

The network is frozen here: it was trained on ImageNet-1k by its authors (Apache-2.0). Key names
are ours; `fold` reads timm's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyzoo.core.errors import WeightsError

CLASSES = 1000
TOP_CHANNELS = 1280
FINE_CHANNELS = 40
MIDDLE_CHANNELS = 112
COARSE_CHANNELS = 320
_STAGES = (  # blocks, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, FINE_CHANNELS),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, MIDDLE_CHANNELS),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, COARSE_CHANNELS),
)
_EPS = 1e-3


class Pyramid(NamedTuple):
    """Maps of one batch of images."""

    fine: Tensor
    """`(b, 40, H / 8, W / 8)`."""
    middle: Tensor
    """`(b, 112, H / 16, W / 16)`."""
    coarse: Tensor
    """`(b, 320, H / 32, W / 32)`."""
    top: Tensor
    """`(b, 1280, H / 32, W / 32)`: what the classifier averages."""


class SameConv(nn.Module):
    """Convolution with TensorFlow's padding: the odd pixel goes right and bottom."""

    def __init__(
        self, inside: int, outside: int, kernel: int, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.stride, self.groups, self.kernel = stride, groups, kernel
        self.weight = nn.Parameter(torch.empty(outside, inside // groups, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outside))
        nn.init.kaiming_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        if self.stride == 1:
            return F.conv2d(x, self.weight, self.bias, padding=self.kernel // 2, groups=self.groups)
        down, across = (
            max((-(-size // self.stride) - 1) * self.stride + self.kernel - size, 0)
            for size in x.shape[-2:]
        )
        x = F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))
        return F.conv2d(x, self.weight, self.bias, stride=self.stride, groups=self.groups)


class Block(nn.Module):
    """Inverted residual: widen, filter each channel, narrow; the sum where shapes allow."""

    def __init__(
        self, inside: int, outside: int, *, kernel: int, stride: int, expansion: int
    ) -> None:
        super().__init__()
        hidden = inside * expansion
        self.expand = SameConv(inside, hidden, 1) if expansion > 1 else None
        self.depth = SameConv(hidden, hidden, kernel, stride=stride, groups=hidden)
        self.project = SameConv(hidden, outside, 1)
        self.residual = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        out = x if self.expand is None else F.relu6(self.expand(x))
        out = self.project(F.relu6(self.depth(out)))
        return x + out if self.residual else out


class Lite0(nn.Module):
    """The network: pyramid and classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv(3, 32, 3, stride=2)
        stages: list[nn.Module] = []
        inside = 32
        for blocks, kernel, stride, expansion, channels in _STAGES:
            parts = []
            for place in range(blocks):
                parts.append(
                    Block(
                        inside,
                        channels,
                        kernel=kernel,
                        stride=1 if place else stride,
                        expansion=expansion,
                    )
                )
                inside = channels
            stages.append(nn.Sequential(*parts))
        self.stages = nn.ModuleList(stages)
        self.head = SameConv(inside, TOP_CHANNELS, 1)
        self.classifier = nn.Linear(TOP_CHANNELS, CLASSES)

    def forward(self, images: Tensor) -> Pyramid:
        """Return the maps of `(b, 3, H, W)` images of 0..1, sides multiples of 32."""
        x = F.relu6(self.stem(images * 2 - 1))
        maps: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return Pyramid(maps[2], maps[4], x, F.relu6(self.head(x)))


def fold(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn timm's `tf_efficientnet_lite0` tensors into ours.

    Raises:
        WeightsError: They are of another network.
    """
    out: dict[str, Tensor] = {}
    try:
        _fold_one(tensors, out, "conv_stem", "bn1", "stem")
        for stage, (blocks, *_) in enumerate(_STAGES):
            for place in range(blocks):
                old, new = f"blocks.{stage}.{place}", f"stages.{stage}.{place}"
                if stage == 0:
                    _fold_one(tensors, out, f"{old}.conv_dw", f"{old}.bn1", f"{new}.depth")
                    _fold_one(tensors, out, f"{old}.conv_pw", f"{old}.bn2", f"{new}.project")
                else:
                    _fold_one(tensors, out, f"{old}.conv_pw", f"{old}.bn1", f"{new}.expand")
                    _fold_one(tensors, out, f"{old}.conv_dw", f"{old}.bn2", f"{new}.depth")
                    _fold_one(tensors, out, f"{old}.conv_pwl", f"{old}.bn3", f"{new}.project")
        _fold_one(tensors, out, "conv_head", "bn2", "head")
        out["classifier.weight"] = tensors["classifier.weight"]
        out["classifier.bias"] = tensors["classifier.bias"]
    except KeyError as error:
        raise WeightsError(f"no EfficientNet-lite0 of timm: {error} is missing") from None
    return out


def _fold_one(
    tensors: Mapping[str, Tensor], out: dict[str, Tensor], conv: str, norm: str, name: str
) -> None:
    gain = tensors[f"{norm}.weight"] / (tensors[f"{norm}.running_var"] + _EPS).sqrt()
    out[f"{name}.weight"] = tensors[f"{conv}.weight"] * gain[:, None, None, None]
    out[f"{name}.bias"] = tensors[f"{norm}.bias"] - tensors[f"{norm}.running_mean"] * gain
