"""The EVA tower for inference in half precision: the same blocks with fewer trips to memory.

Three things differ from `EvaVit.forward`, none of them in what is computed: the skip connection is
added where the next norm reads it, the residual stream stays fp32 (which costs little and keeps
codes), and GELU runs in the epilogue of the matrix product, by the hyperbolic-tangent formula of
that epilogue (its largest difference from the exact one is 5e-4, below half precision's rounding).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyzoo.attention import attention
from polyzoo.seed.blocks import Block
from polyzoo.seed.vision import EvaVit


class FastVision(nn.Module):
    """Takes an EvaVit's place on a GPU, in bf16 or fp16, without gradients.

    Example:
        >>> model.vision = FastVision(model.vision)
    """

    def __init__(self, vision: EvaVit, *, fp32_residual: bool = True) -> None:
        super().__init__()
        self.vision = vision
        self.config = vision.config
        self.fp32_residual = fp32_residual
        # Fused by the compiler: one pass over the stream instead of three.
        self._add_norm = torch.compile(_add_norm, dynamic=False)
        self._biases = [_qkv_bias(block) for block in _blocks(vision)]

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Return (b, 1 + patches, d) features of normalised pixels (b, 3, H, W)."""
        x = self.vision.embed(pixels)
        dtype, shape = x.dtype, x.shape
        stream = x.float() if self.fp32_residual else x
        stream = stream.flatten(0, 1)
        delta = torch.zeros_like(x).flatten(0, 1)
        for block, bias in zip(_blocks(self.vision), self._biases, strict=True):
            stream, h = self._add_norm(
                stream, delta, block.norm1.weight, block.norm1.bias, block.norm1.eps
            )
            delta = self._attend(block, bias, h, shape)
            stream, h = self._add_norm(
                stream, delta, block.norm2.weight, block.norm2.bias, block.norm2.eps
            )
            fc1, fc2 = block.mlp.fc1, block.mlp.fc2
            h = torch.ops.aten._addmm_activation(fc1.bias, h, fc1.weight.T, use_gelu=True)
            delta = F.linear(h, fc2.weight, fc2.bias)
        return (stream + delta).to(dtype).view(shape)

    @staticmethod
    def _attend(block: Block, bias: Tensor, h: Tensor, shape: torch.Size) -> Tensor:
        b, n, d = shape
        heads = block.attn.heads
        qkv = F.linear(h, block.attn.qkv.weight, bias).view(b, n, 3, heads, d // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = attention(q, k, v).transpose(1, 2).reshape(b * n, d)
        return F.linear(out, block.attn.proj.weight, block.attn.proj.bias)


def _blocks(vision: EvaVit) -> list[Block]:
    return [block for block in vision.blocks if isinstance(block, Block)]


def _qkv_bias(block: Block) -> Tensor:
    attn = block.attn
    return torch.cat((attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias)).detach()


def _add_norm(
    stream: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add what a layer gave to the stream, and normalise for the next one."""
    total = stream.float() + delta.float()
    out = F.layer_norm(total, total.shape[-1:], weight.float(), bias.float(), eps)
    return total.to(stream.dtype), out.to(delta.dtype)
