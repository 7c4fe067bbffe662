"""segment_anything's image encoder with our attention: the same features, gradients and weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from polyzoo.attention.integrations.segment_anything import GridAttention, use_attention

image_encoder = pytest.importorskip(
    "segment_anything.modeling.image_encoder", reason="needs the segment_anything package"
)


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    """Padded windows (4 of 10 tokens a side), one global layer, drawn tables."""
    torch.manual_seed(0)
    made = image_encoder.ImageEncoderViT(
        img_size=160,
        embed_dim=48,
        depth=3,
        num_heads=3,
        out_chans=16,
        use_rel_pos=True,
        window_size=4,
        global_attn_indexes=(1,),
    )
    for name, parameter in made.named_parameters():
        if "rel_pos" in name:
            nn.init.normal_(parameter, std=0.3)
    return made.eval()


def test_features_and_gradients(encoder: nn.Module):
    ours = copy.deepcopy(encoder)
    assert use_attention(ours) == 3
    assert ours.state_dict().keys() == encoder.state_dict().keys()
    image = torch.randn(2, 3, 160, 160)
    wanted, found = encoder(image), ours(image)
    assert (found - wanted).abs().max() <= 1e-5 * max(1.0, wanted.abs().max().item())
    wanted.square().sum().backward()
    found.square().sum().backward()
    mine = dict(ours.named_parameters())
    for name, parameter in encoder.named_parameters():
        grad = mine[name].grad
        assert parameter.grad is not None
        assert grad is not None, name
        size = parameter.grad.abs().max().item()
        assert (grad - parameter.grad).abs().max() <= 1e-4 * max(size, 1.0), name


def test_table_of_another_side_is_stretched():
    """A window layer's table of 7 entries used on a grid of 6 by 5."""
    torch.manual_seed(1)
    layer = image_encoder.Attention(24, num_heads=2, use_rel_pos=True, input_size=(4, 4))
    nn.init.normal_(layer.rel_pos_h)
    nn.init.normal_(layer.rel_pos_w)
    x = torch.randn(1, 6, 5, 24)
    assert (GridAttention(layer)(x) - layer(x)).abs().max() <= 1e-5


def test_without_relative_position():
    torch.manual_seed(2)
    layer = image_encoder.Attention(24, num_heads=2, use_rel_pos=False)
    x = torch.randn(2, 3, 4, 24)
    assert (GridAttention(layer)(x) - layer(x)).abs().max() <= 1e-5


def test_nothing_to_replace(encoder: nn.Module):
    ours = copy.deepcopy(encoder)
    use_attention(ours)
    with pytest.raises(ValueError, match="was replaced before"):
        use_attention(ours)
    with pytest.raises(TypeError, match="Linear has no qkv"):
        GridAttention(nn.Linear(2, 2))
