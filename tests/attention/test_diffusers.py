"""Our attention in tiny random diffusers models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="pip install polyzoo-attention[diffusers]")

from diffusers.models import attention_dispatch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    SpatialNorm,
)
from diffusers.models.transformers.pixart_transformer_2d import (
    PixArtTransformer2DModel,
)
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

from polyzoo.attention import attention
from polyzoo.attention.integrations.diffusers import (
    NAME,
    PolyzooAttnProcessor,
    dispatched_attention,
    install,
    register,
)
from polyzoo.attention.integrations.padding import kv_lens_of

LENGTHS = torch.tensor([6, 2, 4])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pixart(layers: int = 2) -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        cross_attention_dim=48,
        caption_channels=20,
        sample_size=8,
        use_additional_conditions=False,
    )
    for parameter in model.parameters():  # some start at zero, which would hide what they weigh
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def denoised(model: nn.Module, mask: Tensor | None, text: Tensor | None = None) -> Tensor:
    return model(
        random(3, 4, 8, 8, seed=1),
        encoder_hidden_states=random(3, 6, 20, seed=2) if text is None else text,
        timestep=torch.tensor([3, 500, 900]),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        encoder_attention_mask=mask,
    ).sample


def padding(side: str) -> Tensor | None:
    if side == "none":
        return None
    mask = (torch.arange(6) < LENGTHS[:, None]).long()
    if side == "one item all padding":
        mask[1] = 0
    return mask.flip(1) if side == "left" else mask


class TestPixArt:
    @pytest.mark.parametrize("side", ["none", "right", "left", "one item all padding"])
    def test_equals_their_processor(self, side: str):
        model = pixart()
        expected = denoised(model, padding(side))
        installed = install(model)
        assert len(installed.processors) == 4
        assert not installed.dispatched
        assert not installed.left
        torch.testing.assert_close(denoised(model, padding(side)), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_padding_is_not_seen(self, side: str):
        """Fails when the mask is lost: then padded tokens change the picture."""
        model, mask = pixart(), padding(side)
        assert mask is not None
        install(model)
        text = random(3, 6, 20, seed=2)
        changed = torch.where(mask.bool()[..., None], text, 7.0)
        assert torch.equal(denoised(model, mask, text), denoised(model, mask, changed))
        assert not torch.equal(denoised(model, None, text), denoised(model, None, changed))

    def test_gradients_and_checkpointing(self):
        model = pixart()
        weights = dict(model.named_parameters())
        expected = torch.autograd.grad(
            denoised(model, padding("right")).square().sum(), [*weights.values()], allow_unused=True
        )
        install(model)
        model.enable_gradient_checkpointing()
        found = torch.autograd.grad(
            denoised(model.train(), padding("right")).square().sum(),
            [*weights.values()],
            allow_unused=True,
        )
        for name, one, other in zip(weights, found, expected, strict=True):
            assert (one is None) == (other is None), name
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=name)

    def test_compiles_as_one_graph(self):
        model = pixart(layers=1)
        install(model)
        mask = padding("right")
        expected = denoised(model, mask)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(denoised(compiled, mask), expected, rtol=1e-4, atol=1e-5)
        torch._dynamo.reset()


class TestProcessor:
    @pytest.mark.parametrize(
        ("options", "shape", "inputs"),
        [
            ({"group_norm": 4, "residual_connection": True}, (2, 16, 4, 4), {}),
            ({"rescale_output_factor": 2.0, "bias": True}, (2, 5, 16), {}),
            ({"qk_norm": "layer_norm"}, (2, 5, 16), {}),
            (
                {"spatial_norm": 8, "query_dim": 32},
                (2, 32, 4, 4),
                {"temb": random(2, 8, 4, 4, seed=4)},
            ),
            (
                {"cross_attention_dim": 12, "cross_attention_norm": "layer_norm"},
                (2, 5, 16),
                {"encoder_hidden_states": random(2, 7, 12, seed=5)},
            ),
            ({}, (2, 5, 16), {"attention_mask": -3.0 * random(2, 1, 5, seed=6).abs()}),
            ({}, (2, 5, 16), {"attention_mask": random(4, 5, 5, seed=6)}),
            ({}, (2, 5, 16), {"attention_mask": random(2, 1, 5, seed=6) < 0.9}),
        ],
    )
    def test_equals_theirs(
        self, options: dict[str, Any], shape: tuple[int, ...], inputs: dict[str, Tensor]
    ):
        torch.manual_seed(0)
        options = dict(options)
        groups = options.pop("group_norm", None)
        spatial = options.pop("spatial_norm", None)
        options = {"query_dim": 16, **options}
        layer = Attention(heads=2, dim_head=8, norm_num_groups=groups, eps=1e-5, **options)
        if spatial:
            layer.spatial_norm = SpatialNorm(options["query_dim"], spatial)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
        states = random(*shape)
        layer.set_processor(AttnProcessor2_0())
        expected = layer(states, **inputs)
        layer.set_processor(PolyzooAttnProcessor())
        torch.testing.assert_close(layer(states, **inputs), expected, rtol=1e-4, atol=1e-5)

    def test_a_model_without_such_layers_is_an_error(self):
        with pytest.raises(ValueError, match=r"no layer of this Linear .* no attention layer"):
            install(nn.Linear(2, 2))


class TestPaddingAsLengths:
    def test_read_once_until_changed(self):
        mask = torch.where(torch.arange(6) < LENGTHS[:, None], 0.0, -10000.0)
        lengths = kv_lens_of(mask)
        assert lengths is not None
        assert torch.equal(lengths, LENGTHS.int())
        assert kv_lens_of(mask) is lengths
        mask[1, 2:4] = 0
        changed = kv_lens_of(mask)
        assert changed is not None
        assert changed.tolist() == [6, 4, 4]

    def test_bf16_rounds_the_customary_number(self):
        mask = torch.where(torch.arange(6) < LENGTHS[:, None], 0.0, -10000.0).bfloat16()
        lengths = kv_lens_of(mask)
        assert lengths is not None
        assert lengths.tolist() == LENGTHS.tolist()

    def test_boolean_masks(self):
        mask = torch.arange(6) < torch.tensor([6, 0, 4])[:, None]
        lengths = kv_lens_of(mask)
        assert lengths is not None
        assert lengths.tolist() == [6, 0, 4]
        assert kv_lens_of(mask.flip(1)) is None

    @pytest.mark.parametrize(
        "row", [[-1e4, 0.0, 0.0], [-1e4, -1e4, -1e4], [0.0, -1e4, 0.0], [0.0, -1.0, -1e4]]
    )
    def test_other_masks_have_none(self, row: list[float]):
        assert kv_lens_of(torch.tensor([[0.0, 0.0, -1e4], row])) is None


class TestDispatcher:
    def test_flux_equals_native(self):
        torch.manual_seed(0)
        model = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        ).eval()
        inputs = {
            "hidden_states": random(1, 16, 4),
            "encoder_hidden_states": random(1, 5, 32, seed=1),
            "pooled_projections": random(1, 32, seed=2),
            "timestep": torch.tensor([0.5]),
            "img_ids": random(16, 3, seed=3),
            "txt_ids": torch.zeros(5, 3),
        }
        expected = model(**inputs).sample
        before = attention_dispatch._AttentionBackendRegistry.get_active_backend()
        installed = install(model)
        assert len(installed.dispatched) == 2
        assert attention_dispatch._AttentionBackendRegistry.get_active_backend() == before
        torch.testing.assert_close(model(**inputs).sample, expected, rtol=1e-4, atol=1e-5)

    def test_by_its_name(self):
        register()
        assert register() is attention_dispatch.AttentionBackendName(NAME)
        q = random(2, 5, 4, 8)
        with attention_dispatch.attention_backend(NAME):
            found = attention_dispatch.dispatch_attention_fn(q, q, q)
        expected = attention_dispatch.dispatch_attention_fn(q, q, q)
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize(
        "options",
        [
            {"is_causal": True},
            {"is_causal": True, "keys": 3},
            {"is_causal": True, "keys": 9},
            {"attn_mask": random(2, 1, 5, 5, seed=8) < 1.0},
            {"attn_mask": random(1, 4, 5, 5, seed=8), "scale": 0.5},
            {"attn_mask": torch.tensor([[0.0] * 4 + [-1e4], [0.0] * 2 + [-1e4] * 3])},
            {"attn_mask": torch.tensor([[True] * 4 + [False], [True] * 5])},
        ],
    )
    def test_says_what_torch_says(self, options: dict[str, Any]):
        options = dict(options)
        m = options.pop("keys", 5)
        q, k = random(2, 5, 4, 8), random(2, m, 4, 8, seed=1)
        found = dispatched_attention(q, k, k, **options)
        mask = options.get("attn_mask")
        if mask is not None and mask.ndim == 2:
            options["attn_mask"] = mask[:, None, None]
        expected = F.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, k)), **options
        )
        torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-6)

    def test_lse_and_causal_padding(self):
        q = random(2, 5, 4, 8)
        padded = torch.tensor([[0.0] * 4 + [-1e4], [0.0] * 2 + [-1e4] * 3])
        found, lse = dispatched_attention(
            q, q, q, attn_mask=padded, is_causal=True, return_lse=True
        )
        heads = q.transpose(1, 2)
        expected = attention(
            heads, heads, heads, causal=True, mask=(padded == 0)[:, None, None], return_lse=True
        )
        torch.testing.assert_close(found, expected[0].transpose(1, 2))
        torch.testing.assert_close(lse, expected[1].transpose(1, 2))

    def test_context_parallelism_is_refused(self):
        q = random(1, 2, 2, 8)
        with pytest.raises(ValueError, match="context parallelism is not served"):
            dispatched_attention(q, q, q, _parallel_config=object())
