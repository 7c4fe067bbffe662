"""What holds for every set of boxes: order, padding, independence, mutual influence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyzoo.regionspot.config import IntegrationConfig
from polyzoo.regionspot.integration import Integration, region_logits
from polyzoo.regionspot.losses import focal_loss, region_loss
from polyzoo.regionspot.model import RegionSpot, pad_tokens
from support.regionspot_models import tiny_model, vary

CONFIG = IntegrationConfig(heads=4, mlp=48)


def module() -> Integration:
    torch.manual_seed(0)
    made = Integration(12, 32, 10, CONFIG)
    vary(made)
    return made.eval().requires_grad_(False)


@settings(max_examples=15, deadline=None)
@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_padding_is_exact(counts: list[int], seed: int):
    torch.manual_seed(seed)
    tokens = [torch.randn(count, 12) for count in counts]
    memory = torch.randn(len(counts), 7, 32)
    padded, present = pad_tokens(tokens)
    if present is not None:
        padded = torch.where(present[..., None], padded, torch.nan)  # padding must not be read
    together = module()(padded, memory, present)
    for row, part in enumerate(tokens):
        alone = module()(part[None], memory[row : row + 1])[0]
        torch.testing.assert_close(together[row, : len(part)], alone, rtol=0, atol=1e-6)
        assert not together[row, len(part) :].any()


def test_order_of_boxes_is_order_of_results():
    tokens, memory = torch.randn(1, 6, 12), torch.randn(1, 7, 32)
    order = torch.randperm(6)
    torch.testing.assert_close(
        module()(tokens[:, order], memory), module()(tokens, memory)[:, order], rtol=0, atol=2e-6
    )


def test_boxes_see_each_other_unless_told_not_to():
    tokens, memory = torch.randn(1, 4, 12), torch.randn(1, 7, 32)
    twice = torch.cat([tokens, tokens[:, :1]], 1)
    plain = module()(tokens, memory)
    assert (module()(twice, memory)[:, :4] - plain).abs().max() > 1e-3
    alone = module().independent(tokens, memory)
    torch.testing.assert_close(module().independent(twice, memory)[:, :4], alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(alone[:, :1], module()(tokens[:, :1], memory), rtol=0, atol=1e-6)


def test_equal_to_torchs_decoder():
    made = module()
    layer = torch.nn.TransformerDecoderLayer(32, 4, 48, 0.0, batch_first=True)
    peer = torch.nn.TransformerDecoder(layer, 3, norm=torch.nn.LayerNorm(32)).eval()
    peer.load_state_dict(made.decoder.state_dict())
    tokens, memory = torch.randn(2, 5, 12), torch.randn(2, 7, 32)
    wanted = made.projector(peer(made.to_clip(tokens), memory))
    torch.testing.assert_close(made(tokens, memory), wanted, rtol=1e-5, atol=1e-5)


def test_class_order_permutes_logits():
    regions, classes = torch.randn(3, 10), torch.nn.functional.normalize(torch.randn(6, 10), dim=1)
    order = torch.randperm(6)
    torch.testing.assert_close(
        region_logits(regions, classes[order], 20.0),
        region_logits(regions, classes, 20.0)[:, order],
    )
    assert region_logits(torch.zeros(1, 10), classes, 20.0).isfinite().all()


def test_focal_loss_is_its_definition():
    logits, targets = torch.randn(50) * 4, (torch.rand(50) < 0.3).float()
    p = logits.double().sigmoid()
    wanted = torch.where(targets > 0, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log())
    torch.testing.assert_close(focal_loss(logits, targets).double(), wanted, rtol=1e-4, atol=1e-6)
    assert focal_loss(torch.tensor([900.0, -900.0]), torch.tensor([0.0, 1.0])).isfinite().all()


def test_padded_rows_do_not_count_in_the_loss():
    logits, labels = torch.randn(2, 4, 5), torch.randint(0, 5, (2, 4))
    present = torch.tensor([[True] * 4, [True, True, False, False]])
    labels[1, 2:] = 99
    wanted = region_loss(logits[:1], labels[:1]) + region_loss(logits[1:, :2], labels[1:, :2])
    torch.testing.assert_close(region_loss(logits, labels, present=present), wanted)


def test_exactly_sixty_tensors_train_and_the_towers_stay():
    model = tiny_model().train()
    assert not model.sam.training
    assert not model.clip.training
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 60
    assert all(name.startswith("integration.") for name in trained)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    memory = model.semantic_map(torch.randn(1, 3, 28, 28))
    model(torch.randn(1, 3, 32), memory).square().sum().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trained)


@pytest.mark.parametrize("count", [0, 1, 300])
def test_chunks_of_boxes_give_the_same_tokens(count: int):
    model: RegionSpot = tiny_model()
    embedding = model.image_embedding(torch.rand(1, 3, 48, 64) * 255)[0]
    corner = torch.rand(count, 2) * 30
    given = torch.cat([corner, corner + 1 + torch.rand(count, 2) * 30], 1)
    whole = model.decode(embedding, boxes=given, chunk=1000)
    parts = model.decode(embedding, boxes=given, chunk=37, want_masks=False)
    assert whole.tokens.shape == (count, 4, 32)
    torch.testing.assert_close(parts.tokens, whole.tokens, rtol=0, atol=2e-6)


def test_half_precision_spares_what_it_would_spoil():
    model = tiny_model()
    matrix = model.sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.clone()
    scale = model.logit_scale()
    model = model.to(torch.bfloat16)
    assert torch.equal(
        model.sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix, matrix
    )
    assert torch.equal(model.logit_scale(), scale)
    embedding = model.image_embedding(torch.rand(1, 3, 64, 64) * 255)
    out = model.decode(embedding[0], boxes=torch.tensor([[5.0, 5.0, 40.0, 30.0]]))
    assert out.tokens.dtype == torch.bfloat16
    assert out.tokens.isfinite().all()
