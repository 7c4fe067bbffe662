"""Weight-only int8 linear layers: half the memory of float16, on any device."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8 with one scale per row; it is widened when used.

    Example:
        >>> quantise_linears(text_encoder)
    """

    steps: Tensor
    scales: Tensor

    def __init__(self, steps: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        """Hold `(outputs, inputs)` int8 steps and `(outputs,)` scales of the activations' dtype."""
        super().__init__()
        self.register_buffer("steps", steps)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, layer: nn.Linear) -> Int8Linear:
        """Round a layer's weight."""
        weight = layer.weight.detach()
        scales = weight.float().abs().amax(1) / 127
        divisors = scales.where(scales > 0, 1.0)[:, None]
        steps = (weight.float() / divisors).round().to(torch.int8)
        bias = None if layer.bias is None else layer.bias.detach()
        return cls(steps, scales.to(weight.dtype), bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., inputs)` to `(..., outputs)`."""
        # The scale multiplies the sum: rounding it into the weight first would cost accuracy.
        out = F.linear(x, self.steps.to(x.dtype)) * self.scales.to(x.dtype)
        return out if self.bias is None else out + self.bias.to(x.dtype)  # pyright: ignore[reportOperatorIssue]


def quantise_linears(module: nn.Module, *, least: int = 65536) -> int:
    """Replace the linear layers of at least so many entries, in place; return how many."""
    count = 0
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and layer.weight.numel() >= least:
                setattr(parent, name, Int8Linear.of(layer))
                count += 1
    return count
