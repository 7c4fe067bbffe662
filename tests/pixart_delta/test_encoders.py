"""Text encoder and autoencoder against the published implementations; words and int8 layers."""

from __future__ import annotations

import logging

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from transformers import T5Config as TheirConfig
from transformers import T5EncoderModel

from polyzoo.core.errors import WeightsError
from polyzoo.pixart_delta.int8 import quantise_linears
from polyzoo.pixart_delta.t5 import T5Config, T5Encoder
from polyzoo.pixart_delta.text import encode_prompts
from polyzoo.pixart_delta.vae import (
    LATENT_SCALE,
    MidAttention,
    decode_latents,
    encode_images,
    small_vae,
    whiten,
)
from support.pixart_folders import word_encoder
from support.pixart_models import relative_error


def t5() -> tuple[T5EncoderModel, T5Encoder]:
    torch.manual_seed(0)
    config = TheirConfig(
        d_model=32, d_ff=64, num_layers=3, num_heads=4, d_kv=8, feed_forward_proj="gated-gelu",
        vocab_size=100, tie_word_embeddings=False,
    )  # fmt: skip
    theirs = T5EncoderModel(config).eval()
    ours = T5Encoder(T5Config.read(config.to_dict())).eval()
    weights = dict(theirs.state_dict())
    weights.pop("encoder.embed_tokens.weight", None)
    ours.load_state_dict(weights)
    return theirs, ours


class TestT5:
    """Without padding, the same states."""

    @torch.no_grad()
    def test_states(self):
        theirs, ours = t5()
        ids = torch.randint(0, 100, (2, 150), generator=torch.Generator().manual_seed(1))
        mask = torch.ones(2, 150, dtype=torch.int64)
        mask[0, 10:] = 0
        wanted = theirs(ids, attention_mask=mask).last_hidden_state
        found = ours(ids, torch.tensor([10, 150], dtype=torch.int32))
        assert relative_error(found[mask.bool()], wanted[mask.bool()]) <= 2e-5
        assert relative_error(ours(ids[:1, :10]), wanted[:1, :10]) <= 2e-5

    @torch.no_grad()
    def test_int8(self):
        _, ours = t5()
        ids = torch.arange(40)[None]
        wanted = ours(ids)
        assert quantise_linears(ours, least=1) == 3 * 7
        assert relative_error(ours(ids), wanted) <= 0.05

    def test_other_encoders_are_refused(self):
        with pytest.raises(WeightsError, match=r"feed_forward_proj='relu': PixArt's text encoder"):
            T5Config.read({"feed_forward_proj": "relu"})

    def test_long_prompts_are_cut_and_named(self, caplog):
        class Letters:
            """A tokenizer of letters; 1 ends."""

            def __call__(self, text, **_):
                from types import SimpleNamespace

                return SimpleNamespace(input_ids=[*(ord(c) % 90 + 2 for c in text), 1])

            def decode(self, ids):
                return f"{len(ids)} letters"

        _, ours = t5()
        with caplog.at_level(logging.WARNING, logger="polyzoo"):
            found = encode_prompts(
                ["abcdefgh", "ab"], encoder=ours, tokenizer=Letters(), length=6, cleaning=False
            )
        assert found.lengths == (6, 3)
        assert "longer than 6 tokens; left out: '3 letters'" in caplog.text


class TestAutoencoder:
    """The attention inside, and the change of latents that changes no image."""

    @torch.no_grad()
    def test_attention(self):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(32, 64), layers_per_block=1, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=LATENT_SCALE,
        ).eval()  # fmt: skip
        x = torch.randn(2, 4, 8, 8)
        wanted = decode_latents(vae, x)
        for module in vae.modules():
            if isinstance(module, Attention):
                module.set_processor(MidAttention())
        assert relative_error(decode_latents(vae, x), wanted) <= 1e-5

    @torch.no_grad()
    def test_whitening(self):
        torch.manual_seed(0)
        vae = small_vae().eval()
        images = torch.rand(4, 3, 32, 32) * 2 - 1
        before = encode_images(vae, images)
        wanted = vae.decode(before.mean).sample
        whiten(vae, before.mean.mean((0, 2, 3)), before.mean.std((0, 2, 3)))
        after = encode_images(vae, images).sample()
        assert torch.allclose(after.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
        assert torch.allclose(after.std((0, 2, 3)), torch.ones(4), atol=1e-3)
        assert relative_error(decode_latents(vae, after), wanted) <= 1e-3


class TestWords:
    """Known words, singulars, and the end."""

    def test_encoding(self, caplog):
        encoder = word_encoder()
        assert encoder.encode(["red apples, flat style", ""]).lengths == (5, 1)
        assert torch.equal(encoder.encode(["Apple"]).tokens[0], encoder.vectors[1])
        assert torch.equal(encoder.encode([""]).tokens[0], encoder.end)
        with caplog.at_level(logging.WARNING, logger="polyzoo"):
            assert encoder.encode(["red zeppelin"]).lengths == (2,)
        assert "'zeppelin' of the prompt" in caplog.text
