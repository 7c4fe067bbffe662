"""The attention implementation "polyzoo" in tiny random transformers models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402

from polyzoo.attention import CuSeqlens  # noqa: E402
from polyzoo.attention.integrations import transformers as hook  # noqa: E402
from support.operators import Recorder  # noqa: E402

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
IDS = torch.randint(4, 99, (3, 10), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([10, 4, 7])


def roberta() -> Any:
    return transformers.RobertaConfig(**SIZES, max_position_embeddings=40)


def bert() -> Any:
    return transformers.BertConfig(**SIZES, max_position_embeddings=40)


def llama() -> Any:
    return transformers.LlamaConfig(**SIZES, num_key_value_heads=2)


def t5() -> Any:
    return transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=8, num_layers=2, num_heads=4, d_ff=48, pad_token_id=1
    )


def clip() -> Any:
    return transformers.CLIPTextConfig(**SIZES, max_position_embeddings=40)


def q_former() -> Any:
    sizes = {name: SIZES[name] for name in list(SIZES)[:5]}
    return transformers.Blip2QFormerConfig(
        **sizes, encoder_hidden_size=24, max_position_embeddings=40
    )


def model(config: Callable[[], Any], name: str) -> nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(config(), attn_implementation=name).eval()


def padding(side: str) -> Tensor:
    if side == "none":
        return torch.ones(3, 10, dtype=torch.long)
    mask = (torch.arange(10) < LENGTHS[:, None]).long()
    return mask if side == "right" else mask.flip(1)


def run(tiny: nn.Module, mask: Tensor) -> Tensor:
    if isinstance(tiny, transformers.Blip2QFormerModel):
        chance = torch.Generator().manual_seed(1)
        return tiny(
            query_embeds=torch.randn(3, 10, 32, generator=chance),
            encoder_hidden_states=torch.randn(3, 6, 24, generator=chance),
            encoder_attention_mask=padding_of_six(mask),
        ).last_hidden_state
    extra = {"decoder_input_ids": IDS[:, :7]} if isinstance(tiny, transformers.T5Model) else {}
    return tiny(input_ids=IDS, attention_mask=mask, **extra).last_hidden_state


def padding_of_six(mask: Tensor) -> Tensor:
    """Image tokens padded as the text is."""
    return mask[:, 2:8]


def pair(build: Callable[[], Any]) -> tuple[nn.Module, nn.Module]:
    """One model twice: with torch's attention, and with ours."""
    hook.register()
    theirs, ours = model(build, "sdpa"), model(build, hook.NAME)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Layers that went through our function, which does its work as ever."""
    seen: list[nn.Module] = []

    def counting(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(module)
        return hook.attention_forward(module, *args, **kwargs)

    hook.register()
    monkeypatch.setitem(AttentionInterface._global_mapping, hook.NAME, counting)
    return seen


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("build", [llama, roberta, bert, t5, clip, q_former])
def test_equals_sdpa(build: Callable[[], Any], side: str):
    theirs, ours = pair(build)
    mask = padding(side)
    expected, found = run(theirs, mask), run(ours, mask)
    valid = mask.bool()
    if build is t5:  # the decoder's tokens are not padded
        valid = torch.ones(expected.shape[:2], dtype=torch.bool)
    elif build is q_former:
        # an item whose image tokens are all padding: torch's function gives it zeros too
        valid = torch.ones(expected.shape[:2], dtype=torch.bool)
    torch.testing.assert_close(found[valid], expected[valid], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", [llama, roberta, t5, clip, q_former])
def test_every_layer_comes_through_here(build: Callable[[], Any], calls: list[nn.Module]):
    run(model(build, hook.NAME), padding("right"))
    assert len(calls) >= 2
    assert len({id(module) for module in calls}) == len(calls)


@pytest.mark.parametrize("build", [llama, roberta])
def test_gradients_equal_sdpa(build: Callable[[], Any]):
    theirs, ours = pair(build)
    mask = padding("right")
    for tiny in (theirs, ours):
        run(tiny, mask)[mask.bool()].square().sum().backward()
    for (name, one), other in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-5, msg=name)


class TestMaskFunction:
    def test_without_it_padding_would_be_seen(self, monkeypatch: pytest.MonkeyPatch):
        """What `register` prevents: this must differ, or the next test proves nothing."""
        theirs, ours = pair(roberta)
        mask = padding("right")
        expected = run(theirs, mask)[mask.bool()]
        monkeypatch.delitem(AttentionMaskInterface._global_mapping, hook.NAME)
        assert (run(ours, mask)[mask.bool()] - expected).abs().max() > 1e-3

    @pytest.mark.parametrize("build", [roberta, llama, t5])
    def test_padding_is_not_seen(self, build: Callable[[], Any]):
        """Fails when the mask function is lost: then padded tokens change the others."""
        _, ours = pair(build)
        mask = padding("right")
        out = run(ours, mask)
        other = torch.where(mask.bool(), IDS, 5)
        extra = {"decoder_input_ids": IDS[:, :7]} if build is t5 else {}
        changed = ours(input_ids=other, attention_mask=mask, **extra).last_hidden_state
        valid = slice(None) if build is t5 else mask.bool()
        torch.testing.assert_close(changed[valid], out[valid], rtol=1e-5, atol=1e-5)

    def test_registering_twice_changes_nothing(self):
        hook.register()
        before = (
            AttentionInterface._global_mapping[hook.NAME],
            AttentionMaskInterface._global_mapping[hook.NAME],
        )
        hook.register()
        assert before == (
            AttentionInterface._global_mapping[hook.NAME],
            AttentionMaskInterface._global_mapping[hook.NAME],
        )
        assert not any(part in hook.NAME for part in ("flash", "sdpa", "flex_attention", "/"))


class TestPacking:
    @staticmethod
    def packed(tiny: nn.Module, **extra: Any) -> Tensor:
        valid = padding("right").bool()
        first = 2 if isinstance(tiny, transformers.RobertaModel) else 0
        positions = (torch.arange(10) + first).expand(3, 10)
        lengths = CuSeqlens.from_lengths(LENGTHS)
        return tiny(
            input_ids=IDS[valid][None],
            position_ids=positions[valid][None],
            cu_seq_lens_q=lengths.q,
            cu_seq_lens_k=lengths.k,
            max_length_q=lengths.max_q,
            max_length_k=lengths.max_k,
            **extra,
        ).last_hidden_state[0]

    @pytest.mark.parametrize("build", [roberta, bert, llama])
    def test_equals_padded(self, build: Callable[[], Any]):
        theirs, ours = pair(build)
        mask = padding("right")
        expected = run(theirs, mask)[mask.bool()]
        torch.testing.assert_close(self.packed(ours), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("build", [roberta, bert])
    def test_gradients_equal_padded(self, build: Callable[[], Any]):
        theirs, ours = pair(build)
        mask = padding("right").bool()
        run(theirs, mask.long())[mask].square().sum().backward()
        self.packed(ours).square().sum().backward()
        for (name, one), other in zip(theirs.named_parameters(), ours.parameters(), strict=True):
            if one.grad is not None:
                torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-4, msg=name)

    def test_training_with_dropout_is_repeatable(self):
        _, ours = pair(roberta)
        ours.train()
        outs = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            outs.append(self.packed(ours))
        assert torch.equal(outs[0], outs[1])
        assert not torch.equal(outs[0], outs[2])

    def test_lengths_are_worked_out_once_for_all_layers(self):
        starts = torch.tensor([0, 3, 5], dtype=torch.int32)
        first = hook._lengths(starts, starts, 3, 3)
        assert hook._lengths(starts, starts, 3, 3) is first
        assert hook._lengths(starts, starts, 4, 4) is not first
        again = hook._lengths(starts, starts, 3, 3)
        starts[1] = 2
        assert hook._lengths(starts, starts, 3, 3) is not again, "the table was changed in place"

    def test_a_mask_beside_the_packing_is_refused(self):
        _, ours = pair(roberta)
        mask = torch.ones(1, int(LENGTHS.sum()), dtype=torch.long)
        mask[:, -1] = 0
        with pytest.raises(ValueError, match="a packed batch has no padding"):
            self.packed(ours, attention_mask=mask)


class Layer(nn.Module):
    is_causal = True


Q, K, V = torch.randn(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0)).unbind()
QKV = (Q, K, V)


class TestArguments:
    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            ({"softcap": 30.0}, r'softcap \(capped scores\) is not supported by "polyzoo".*eager'),
            ({"s_aux": torch.zeros(4)}, "attention sinks"),
            ({"cache": object()}, "paged cache"),
            ({"alibi": torch.zeros(4)}, r"tensor alibi of shape \(4,\).*does not know"),
            ({"cu_seq_lens_q": torch.zeros(2)}, "needs max_length_q"),
        ],
    )
    def test_what_is_not_served_is_refused(self, extra: dict[str, Any], message: str):
        with pytest.raises(ValueError, match=message):
            hook.attention_forward(Layer(), *QKV, None, **extra)

    def test_known_and_empty_arguments_pass(self):
        out, weights = hook.attention_forward(
            Layer(), *QKV, None, softcap=None, position_ids=torch.arange(6), use_cache=True
        )
        assert weights is None
        assert out.shape == (2, 6, 4, 8)
        assert out.is_contiguous()

    @pytest.mark.parametrize("is_causal", [None, True, False])
    def test_causal_is_the_layers_unless_said(self, is_causal: bool | None):
        out, _ = hook.attention_forward(Layer(), *QKV, None, is_causal=is_causal)
        expected = nn.functional.scaled_dot_product_attention(
            *QKV, is_causal=is_causal is not False
        )
        torch.testing.assert_close(out, expected.transpose(1, 2))

    def test_one_query_sees_the_whole_cache(self):
        q, k, v = QKV
        out, _ = hook.attention_forward(Layer(), q[:, :, :1], k, v, None)
        expected = nn.functional.scaled_dot_product_attention(q[:, :, :1], k, v)
        torch.testing.assert_close(out, expected.transpose(1, 2))

    def test_a_static_cache_is_aligned_at_the_top_left(self):
        q, k, v = QKV
        out, _ = hook.attention_forward(
            Layer(), q[:, :, :4], k, v, None, position_bias=torch.zeros(1, 4, 4, 6)
        )
        expected = nn.functional.scaled_dot_product_attention(q[:, :, :4], k, v, is_causal=True)
        torch.testing.assert_close(out, expected.transpose(1, 2))

    @pytest.mark.parametrize("kind", ["float mask", "both", "bias"])
    def test_additive_masks(self, kind: str):
        chance = torch.Generator().manual_seed(4)
        mask = torch.where(torch.rand(2, 1, 6, 6, generator=chance) < 0.5, 0.0, -1e4)
        bias = torch.randn(1, 4, 6, 6, generator=chance)
        given = None if kind == "bias" else mask
        added = bias if kind != "float mask" else None
        out, _ = hook.attention_forward(Layer(), *QKV, given, position_bias=added, is_causal=False)
        total = {"float mask": mask, "both": mask + bias, "bias": bias}[kind]
        expected = nn.functional.scaled_dot_product_attention(*QKV, attn_mask=total)
        torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)

    def test_learned_queries_are_shared_by_the_batch(self):
        q, k, v = QKV
        out, _ = hook.attention_forward(Layer(), q[:1], k, v, None, is_causal=False)
        expected = nn.functional.scaled_dot_product_attention(q[:1].expand_as(q), k, v)
        torch.testing.assert_close(out, expected.transpose(1, 2))


def test_right_padding_is_cut_off_on_a_cpu():
    """Keys that every item hides are not computed, in any layer, and the mask is read once."""
    _, ours = pair(roberta)
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[:, 6:] = 0
    with Recorder() as seen, torch.no_grad():
        run(ours, mask)
    assert [keys[2] for _, _, keys in seen.kernels] == [6, 6]
    assert seen.masks == []


def test_a_whole_encoder_compiles_as_one_graph():
    _, ours = pair(roberta)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    mask = padding("right")
    torch.testing.assert_close(run_compiled(compiled, mask), run(ours, mask), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def run_compiled(model: Any, mask: Tensor) -> Tensor:
    return model(input_ids=IDS, attention_mask=mask).last_hidden_state
