"""Packing: what a sequence's vector is must not depend on its company."""

from __future__ import annotations

import pytest
import torch

from polyzoo.core.errors import ConfigError, DataError
from polyzoo.sea.encoding.encoder import PackedEncoder, set_dropout
from polyzoo.sea.encoding.packing import PackedSequences
from polyzoo.sea.encoding.segments import segment_ids
from support.sea_models import sequences, tiny_roberta

POOLINGS = ("cls", "mean", "pooler")


def padded(encoder: PackedEncoder, rows: list[list[int]]) -> torch.Tensor:
    """The same encoder as transformers runs it by default: padding and a mask."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), encoder.pad_id)
    for line, row in enumerate(rows):
        ids[line, : len(row)] = torch.tensor(row)
    mask = (ids != encoder.pad_id).long()
    model = encoder.model
    model.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]
    out = model(input_ids=ids, attention_mask=mask)
    model.set_attn_implementation("polyzoo")  # pyright: ignore[reportCallIssue]
    if encoder.pooling == "pooler":
        return out.pooler_output
    if encoder.pooling == "cls":
        return out.last_hidden_state[:, 0]
    weight = mask[..., None].float()
    return (out.last_hidden_state * weight).sum(1) / weight.sum(1)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("fused", [False, True])
def test_packed_equals_padded(pooling: str, fused: bool):
    encoder, rows = tiny_roberta(pooling=pooling), sequences()
    wanted = padded(encoder, rows)
    if fused:
        assert encoder.fuse()
    with torch.no_grad():
        found = encoder.encode(rows)
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(("tokens", "blocks"), [(1, None), (37, None), (1000, 2), (60, 3)])
def test_independent_of_chunks_and_order(tokens: int, blocks: int | None):
    encoder, rows = tiny_roberta(pooling="mean"), sequences()
    wanted = encoder.encode(rows)
    encoder.max_tokens_per_forward, encoder.max_blocks_per_forward = tokens, blocks
    assert torch.allclose(encoder.encode(rows), wanted, atol=1e-5)
    order = [3, 0, 8, 1, 7, 2, 6, 4, 5]
    shuffled = encoder.encode([rows[index] for index in order])
    assert torch.allclose(shuffled, wanted[order], atol=1e-5)


def test_recomputed_chunks_give_the_same_gradients():
    rows = sequences()
    packed = PackedSequences.pack(rows)
    gradients = []
    for tokens, recompute in ((10_000, False), (25, True)):
        encoder = tiny_roberta(pooling="mean")
        encoder.max_tokens_per_forward = tokens
        encoder(packed, recompute=recompute).square().sum().backward()
        gradients.append({n: p.grad for n, p in encoder.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5, rtol=1e-4), name


def test_an_encoder_that_cannot_be_packed_runs_on_padded_batches():
    from transformers import ConvBertConfig, ConvBertModel  # convolves over its neighbours

    torch.manual_seed(0)
    config = ConvBertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=32, max_position_embeddings=40, embedding_size=32,
    )  # fmt: skip
    encoder = PackedEncoder(ConvBertModel(config), pooling="mean").eval()
    assert not encoder.probe()
    assert "padded" in encoder.explain()
    rows = sequences(5, longest=20)
    alone = torch.cat([encoder.encode([row]) for row in rows])
    assert torch.isfinite(alone).all()
    assert torch.allclose(encoder.encode(rows[::-1]).flip(0), encoder.encode(rows), atol=1e-5)


def test_compiled_fused_forward_agrees():
    encoder, rows = tiny_roberta(pooling="pooler"), sequences(4)
    wanted = encoder.encode(rows)
    assert encoder.fuse(compile=True)
    with torch.no_grad():
        assert torch.allclose(encoder.encode(rows), wanted, atol=1e-5)
        assert torch.allclose(encoder.encode(rows[:2]), wanted[:2], atol=1e-5)


def test_dropout_is_set_apart_for_attention():
    encoder = tiny_roberta()
    set_dropout(encoder.model, hidden=0.3, attention=0.0)
    rates = {n: m.p for n, m in encoder.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert set(rates.values()) == {0.3, 0.0}
    assert all((rate == 0.0) == name.endswith(".self.dropout") for name, rate in rates.items())


def test_errors_name_the_limit():
    encoder = tiny_roberta()
    with pytest.raises(ConfigError, match="38 positions"):  # 40 rows less padding id + 1
        encoder.encode([[5] * 39])
    with pytest.raises(ConfigError, match=r"budget=37.*36 or less"):
        encoder.check(budget=37, special=2, pad_id=1, vocab_size=60)
    with pytest.raises(ConfigError, match="pad id mismatch: the tokenizer says 0"):
        encoder.check(budget=30, special=2, pad_id=0, vocab_size=60)
    with pytest.raises(ConfigError, match="61 pieces"):
        encoder.check(budget=30, special=2, pad_id=1, vocab_size=61)
    with pytest.raises(DataError, match="sequence 1 of 2 is empty"):
        PackedSequences.pack([[1], []])


def test_segment_ids_with_empty_segments():
    starts = torch.tensor([0, 2, 2, 5])
    assert segment_ids(starts, 5).tolist() == [0, 0, 2, 2, 2]
