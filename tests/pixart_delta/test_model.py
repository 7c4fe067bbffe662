"""The transformer and its control branch: identities, and diffusers' class as the oracle."""

from __future__ import annotations

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from polyzoo.attention import use_backend
from polyzoo.core.errors import ConfigError, DataError, WeightsError
from polyzoo.core.weights import load_into
from polyzoo.pixart_delta import layout
from polyzoo.pixart_delta.blocks import PixArtBlock
from polyzoo.pixart_delta.captions import PackedCaptions, RowCaptions
from polyzoo.pixart_delta.config import ControlConfig, PixArtConfig, xl
from polyzoo.pixart_delta.control import Control, ControlBranch, is_untrained
from polyzoo.pixart_delta.folders import (
    load_control,
    load_transformer,
    save_control,
    save_transformer,
)
from polyzoo.pixart_delta.model import (
    Conditions,
    PixArtTransformer,
    diffusers_config,
    read_diffusers_config,
)
from polyzoo.pixart_delta.position import position_table, scalar_embedding
from support.pixart_models import (
    relative_error,
    tiny_branch,
    tiny_captions,
    tiny_config,
    tiny_model,
)


def draws(b: int = 2, height: int = 8, width: int = 12, seed: int = 3) -> tuple[Tensor, Conditions]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(b, 4, height, width, generator=generator)
    timestep = torch.randint(0, 1000, (b,), generator=generator).float()
    return latents, Conditions(timestep=timestep)


@torch.no_grad()
def run(model: PixArtTransformer, latents: Tensor, captions, conditions, **named) -> Tensor:
    return model(latents, captions, conditions, **named)


class TestAgainstDiffusers:
    """Same weights, same output."""

    @pytest.mark.parametrize("multi_scale", [False, True])
    def test_equal(self, multi_scale: bool):
        model = tiny_model(use_additional_conditions=multi_scale)
        latents, conditions = draws(height=8, width=12 if multi_scale else 8)
        captions = tiny_captions((3, 7))
        states, mask = captions.padded(9)
        other = PixArtTransformer2DModel.from_config(diffusers_config(model.shape)).eval()
        other.load_state_dict(model.state_dict(), strict=True)
        size = torch.tensor([[64.0, 96.0], [128.0, 96.0]])
        ratio = torch.tensor([[0.57], [1.33]])
        conditions = Conditions(timestep=conditions.timestep, size=size, ratio=ratio)
        with torch.no_grad():
            theirs = other(
                latents, encoder_hidden_states=states, timestep=conditions.timestep.long(),
                encoder_attention_mask=mask, return_dict=False,
                added_cond_kwargs={"resolution": size, "aspect_ratio": ratio},
            )[0]  # fmt: skip
        assert relative_error(run(model, latents, captions, conditions), theirs) <= 2e-5

    def test_sizes_are_filled_in_as_diffusers_does(self):
        model = tiny_model()
        latents, conditions = draws()
        full = Conditions(
            timestep=conditions.timestep,
            size=torch.tensor([[64.0, 96.0]]).expand(2, 2),
            ratio=torch.full((2, 1), 64 / 96),
        )
        captions = tiny_captions()
        assert torch.equal(
            run(model, latents, captions, conditions), run(model, latents, captions, full)
        )

    def test_xl_has_the_published_number_of_parameters(self):
        with torch.device("meta"):
            counts = [
                sum(p.numel() for p in PixArtTransformer(xl(size)).parameters())
                for size in (512, 1024)
            ]
            branch = ControlBranch(xl(1024))
        assert counts == [610_856_096, 611_349_152]
        assert sum(p.numel() for p in branch.parameters()) == 294_917_760


class TestText:
    """Padding is never seen, and what is kept of a caption is what it would be anew."""

    def test_mates_and_padding_change_nothing(self):
        model = tiny_model()
        latents, conditions = draws()
        both = run(model, latents, tiny_captions((3, 7)), conditions)
        captions = tiny_captions((3, 7))
        for row in range(2):
            alone = run(
                model,
                latents[row : row + 1],
                captions.rows([row]),
                Conditions(timestep=conditions.timestep[row : row + 1]),
            )
            assert relative_error(alone, both[row : row + 1]) <= 1e-5

    def test_masked_equals_cut(self):
        model = tiny_model()
        latents, conditions = draws()
        captions = tiny_captions((3, 7))
        states, mask = captions.padded(10)
        states = states + 100 * (1 - mask[..., None])
        for form in (mask, mask[:, None, None]):
            padded = PackedCaptions.from_padded(states[:, None], form)
            assert torch.equal(
                run(model, latents, padded, conditions), run(model, latents, captions, conditions)
            )

    @pytest.mark.parametrize("lengths", [(4, 4), (3, 7)])
    def test_kept_keys(self, lengths: tuple[int, ...]):
        model = tiny_model()
        branch = tiny_branch(model)
        latents, conditions = draws()
        captions = tiny_captions(lengths)
        with torch.no_grad():
            memory = model.remember(captions, queries=24, branch=branch)
        for control in (None, Control(branch, latents.flip(0))):
            assert torch.equal(
                run(model, latents, captions, conditions, control=control),
                run(model, latents, memory, conditions, control=control),
            )

    def test_rows(self):
        model = tiny_model()
        latents, conditions = draws()
        captions = tiny_captions((3, 7))
        states, _ = captions.padded(10)
        rows = RowCaptions(states + 0, torch.tensor([3, 7], dtype=torch.int32))
        assert (
            relative_error(
                run(model, latents, rows, conditions), run(model, latents, captions, conditions)
            )
            <= 1e-5
        )

    def test_replacing_captions(self):
        captions = tiny_captions((3, 7))
        null = torch.arange(10 * 16.0).view(10, 16)
        drop = torch.tensor([True, False])
        kept = captions.replaced(drop, null, keep_lengths=True)
        assert kept.lengths == (3, 7)
        assert torch.equal(kept.tokens[:3], null[:3])
        assert torch.equal(kept.tokens[3:], captions.tokens[3:])
        whole = captions.replaced(drop, null[:1], keep_lengths=False)
        assert whole.lengths == (1, 7)
        states, _ = captions.padded(8)
        rows = RowCaptions(states, torch.tensor([3, 7], dtype=torch.int32))
        found = rows.replaced(drop, null[:1], keep_lengths=False)
        assert found.kv_lens.tolist() == [1, 7]
        assert torch.equal(found.states[0, 0], null[0])
        assert torch.equal(found.states[1], states[1])


class TestControl:
    """The branch starts as nothing, and can be turned down to nothing."""

    def test_untrained_branch_changes_no_bit(self):
        model = tiny_model()
        latents, conditions = draws()
        captions = tiny_captions()
        branch = ControlBranch.copy_of(model, ControlConfig(num_blocks=2))
        assert is_untrained(branch)
        plain = run(model, latents, captions, conditions)
        controlled = run(
            model, latents, captions, conditions, control=Control(branch, latents.flip(0))
        )
        assert torch.equal(plain, controlled)

    def test_scale(self):
        model = tiny_model()
        branch = tiny_branch(model)
        assert not is_untrained(branch)
        latents, conditions = draws()
        captions = tiny_captions()
        plain = run(model, latents, captions, conditions)
        outs = [
            run(model, latents, captions, conditions, control=Control(branch, latents, scale))
            for scale in (0.0, 0.5, 1.0)
        ]
        assert torch.equal(outs[0], plain)
        assert relative_error(outs[1], plain) > 1e-3
        assert relative_error(outs[2], outs[1]) > 1e-3

    def test_gradients_reach_only_the_branch(self):
        model = tiny_model().requires_grad_(False)
        branch = tiny_branch(model).train()
        latents, conditions = draws()
        out = model(latents, tiny_captions(), conditions, control=Control(branch, latents))
        out.square().mean().backward()
        assert all(p.grad is not None for p in branch.parameters())
        assert all(p.grad is None for p in model.parameters())


class TestVariants:
    """Other ways to the same numbers."""

    def test_joined_projections(self):
        model = tiny_model()
        latents, conditions = draws()
        captions = tiny_captions()
        before = run(model, latents, captions, conditions)
        names = list(model.state_dict())
        model.fuse_projections()
        assert list(model.state_dict()) == names
        assert relative_error(run(model, latents, captions, conditions), before) <= 1e-5
        with torch.no_grad():  # a change in place reaches the joint weight
            model.transformer_blocks[0].attn1.to_k.weight.mul_(2)
        changed = run(model, latents, captions, conditions)
        assert relative_error(changed, before) > 1e-4
        model.double()  # moving keeps both in step
        assert relative_error(
            run(model, latents.double(), PackedCaptions(captions.tokens.double(), captions.lengths),
                conditions), changed
        ) <= 1e-5  # fmt: skip

    def test_checkpointing_gives_the_same_gradients(self):
        latents, conditions = draws()
        captions = tiny_captions()
        gradients = []
        for checkpointing in (False, True):
            model = tiny_model().train()
            if checkpointing:
                model.enable_gradient_checkpointing()
            model(latents, captions, conditions).square().mean().backward()
            gradients.append([p.grad for p in model.parameters()])
        for one, other in zip(*gradients, strict=True):
            assert one is not None
            assert torch.equal(one, other)

    def test_reference_attention(self):
        model = tiny_model()
        latents, conditions = draws()
        captions = tiny_captions()
        with use_backend("reference"):
            wanted = run(model, latents, captions, conditions)
        assert relative_error(run(model, latents, captions, conditions), wanted) <= 1e-5

    def test_bfloat16(self):
        model = tiny_model()
        latents, conditions = draws()
        captions = tiny_captions()
        wanted = run(model, latents, captions, conditions)
        half = tiny_model().bfloat16()
        found = run(half, latents, captions.to("cpu", torch.bfloat16), conditions)
        assert found.dtype == torch.bfloat16
        assert bool(found.isfinite().all())
        assert relative_error(found, wanted) <= 0.05

    def test_compiled_step(self):
        model = tiny_model()
        branch = tiny_branch(model)
        latents, conditions = draws(width=8)
        captions = tiny_captions()
        plain = run(model, latents, captions, conditions)
        controlled = run(model, latents, captions, conditions, control=Control(branch, latents))
        model.denoise = torch.compile(model.denoise, backend="aot_eager", fullgraph=True)
        assert relative_error(run(model, latents, captions, conditions), plain) <= 1e-5
        found = run(model, latents, captions, conditions, control=Control(branch, latents))
        assert relative_error(found, controlled) <= 1e-5


class TestFolders:
    """Weights on disk."""

    def test_transformer(self, tmp_path):
        model = tiny_model()
        save_transformer(tmp_path, model, kind="lcm")
        again, kind = load_transformer(tmp_path / "transformer")
        assert kind == "lcm"
        assert diffusers_config(again.shape) == diffusers_config(model.shape)
        assert again.shape.caption_length == model.shape.caption_length
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)
        theirs = PixArtTransformer2DModel.from_pretrained(tmp_path / "transformer")
        assert all(
            torch.equal(theirs.state_dict()[name], x) for name, x in model.state_dict().items()
        )

    def test_branch(self, tmp_path):
        branch = tiny_branch(tiny_model())
        save_control(tmp_path, branch)
        again = load_control(tmp_path / "controlnet")
        assert again.transformer_shape.width == branch.transformer_shape.width
        assert again.shape == branch.shape
        for name, tensor in branch.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)

    def test_int8(self, tmp_path):
        model = tiny_model()
        save_transformer(tmp_path, model, int8=True)
        again, _ = load_transformer(tmp_path / "transformer", dtype=torch.float32)
        latents, conditions = draws()
        captions = tiny_captions()
        assert (
            relative_error(
                run(again, latents, captions, conditions), run(model, latents, captions, conditions)
            )
            <= 0.02
        )


class TestEmbeddings:
    """What section 2 fixes."""

    def test_columns_come_first(self):
        table = position_table(2, 3, width=8, base_size=3, scale=1.0).view(2, 3, 8)
        assert torch.equal(table[0, 1, :4], table[1, 1, :4])
        assert torch.equal(table[1, 0, 4:], table[1, 2, 4:])
        assert not torch.equal(table[0, 0, 4:], table[1, 0, 4:])

    def test_scalars_are_not_rounded(self):
        close = scalar_embedding(torch.tensor([999.0, 1000.0]))
        assert close.dtype == torch.float32
        assert not torch.equal(close[0], close[1])


class TestErrors:
    """What does not fit is refused, with what would."""

    def test_inputs(self):
        model, single = tiny_model(), tiny_model(use_additional_conditions=False)
        latents, conditions = draws()
        captions = tiny_captions()
        with pytest.raises(DataError, match=r"latent side 7 is not a multiple of 2: use 6 or 8"):
            model(latents[:, :, :7], captions, conditions)
        with pytest.raises(DataError, match=r"draws only 8 x 8; for other sizes use a multi-scale"):
            single(latents, captions, conditions)
        with pytest.raises(DataError, match=r"captions has batch 3, the latents 2"):
            model(latents, tiny_captions((1, 2, 3)), conditions)
        with pytest.raises(DataError, match=r"captions have 5 channels; this transformer expects"):
            model(latents, PackedCaptions(torch.zeros(2, 5), (1, 1)), conditions)
        branch = tiny_branch(model)
        with pytest.raises(
            DataError, match=r"control latents of shape \(1, 4, 8, 12\) for latents"
        ):
            model(latents, captions, conditions, control=Control(branch, latents[:1]))

    def test_masks(self):
        states = torch.zeros(2, 3, 16)
        with pytest.raises(DataError, match=r"mask row 1 is all zero"):
            PackedCaptions.from_padded(states, torch.tensor([[1, 0, 0], [0, 0, 0]]))
        with pytest.raises(DataError, match=r"mask holds 2; only 0"):
            PackedCaptions.from_padded(states, torch.tensor([[1, 0, 0], [2, 0, 0]]))
        with pytest.raises(DataError, match=r"mask has batch 1, the captions 2"):
            PackedCaptions.from_padded(states, torch.ones(1, 3))
        with pytest.raises(DataError, match=r"mask has 4 tokens, the captions 3"):
            PackedCaptions.from_padded(states, torch.ones(2, 4))

    def test_shapes(self):
        with pytest.raises(ConfigError, match=r"must be divisible by 3 with size conditions"):
            tiny_config(attention_head_dim=20)
        with pytest.raises(ConfigError, match=r"must be divisible by 4"):
            tiny_config(num_attention_heads=1, attention_head_dim=9)
        with pytest.raises(ConfigError, match=r"num_blocks=3 \(copy_blocks\) must be below"):
            ControlBranch(tiny_config(), ControlConfig(num_blocks=3))
        with pytest.raises(ConfigError, match=r"norm_type='layer_norm': a PixArt transformer has"):
            read_diffusers_config({"norm_type": "layer_norm"})
        with pytest.raises(ConfigError, match=r"is no PixArt transformer"):
            read_diffusers_config({"_class_name": "UNet2DConditionModel"})

    def test_weights(self, tmp_path):
        model = tiny_model()
        official = layout.to_official(model.state_dict())
        with pytest.raises(WeightsError, match=r"1 missing \(proj_out.bias\)"):
            weights = dict(model.state_dict())
            del weights["proj_out.bias"]
            load_into(PixArtTransformer(model.shape), weights, source="file")
        with pytest.raises(WeightsError, match=r"this looks like a ControlNet checkpoint"):
            layout.to_diffusers({f"base_model.{name}": x for name, x in official.items()})
        with pytest.raises(WeightsError, match=r"looks like a LoRA file"):
            layout.to_diffusers({"base_model.model.proj_out.lora_A.weight": torch.zeros(1)})
        sigma = {
            **official,
            layout.NULL_CAPTION: torch.zeros(300, 4),
            "blocks.0.q_norm": torch.ones(1),
        }
        with pytest.raises(WeightsError, match=r"300 caption tokens: this looks like PixArt-Sigma"):
            layout.to_diffusers(sigma)
        save_transformer(tmp_path, model)
        with torch.no_grad():
            model.proj_out.weight[0, 0] = float("nan")
        save_transformer(tmp_path, model)
        with pytest.raises(WeightsError, match=r"proj_out.weight holds NaN or infinity"):
            load_transformer(tmp_path / "transformer")


def test_block_is_what_recomputes():
    assert all(isinstance(b, PixArtBlock) for b in tiny_model().transformer_blocks)
    assert PixArtConfig().position_scale == 2.0
    assert xl(512).position_scale == 1.0
