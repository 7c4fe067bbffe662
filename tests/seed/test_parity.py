"""Stored results of the published implementation. `--parity-dir DIR` takes further cases.

A case is found by its folder's content, whatever its name: the config says its class and sizes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from polyzoo.core.weights import load_into
from polyzoo.seed.config import HeadConfig, QFormerConfig, SeedConfig, VisionConfig
from polyzoo.seed.losses import caption_loss, contrastive_loss, stage2_loss
from polyzoo.seed.model import ContrastHead, SeedModel
from polyzoo.seed.published import infer_config, our_name, rename
from polyzoo.seed.qformer import CaptionHead, KeyValues, QFormer, caption_mask, joint_mask
from polyzoo.seed.quantizer import Quantizer, quantisation_loss
from polyzoo.seed.vision import EvaVit
from support.parity import case_folders

TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 2e-5

KINDS = {
    "VisionTransformer": "vit",
    "BertLMHeadModel": "qformer",
    "VectorQuantizer2": "vq",
    "Blip2QformerQuantizer": "tokenizer",
    "SEEDVisualTokenizer": "tokenizer",
    "Blip2QformerCasual": "stage1",
    "Blip2QformerCodebookAllImage": "stage2",
}


@dataclass(frozen=True)
class Case:
    """One folder with config.json, weights.safetensors and io.safetensors."""

    folder: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text(encoding="utf-8"))

    @cached_property
    def kind(self) -> str | None:
        named = self.facts.get("class_", "")
        return next((kind for name, kind in KINDS.items() if name in named), None)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return load_file(self.folder / "weights.safetensors")

    @cached_property
    def io(self) -> dict[str, Tensor]:
        return load_file(self.folder / "io.safetensors")


def cases(config: pytest.Config) -> list[Case]:
    found = [
        Case(path.parent)
        for folder in case_folders(config, "seed")
        for path in sorted(Path(folder).rglob("config.json"))
        if (path.parent / "io.safetensors").is_file()
    ]
    return [case for case in found if case.kind is not None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for kind in set(KINDS.values()):
        if f"{kind}_case" in metafunc.fixturenames:
            chosen = [case for case in cases(metafunc.config) if case.kind == kind]
            metafunc.parametrize(f"{kind}_case", chosen, ids=[case.folder.name for case in chosen])


def test_the_small_cases_are_stored(pytestconfig: pytest.Config):
    """Those of whole tokenizers and of both stages are 9 MB: they come by --parity-dir."""
    if not pytestconfig.getoption("--parity-dir"):
        assert {case.kind for case in cases(pytestconfig)} == {"vit", "qformer", "vq"}


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.detach(), wanted, atol=TOLERANCE, rtol=TOLERANCE)


def close_gradient(found: Tensor | None, wanted: Tensor) -> None:
    assert found is not None
    scale = max(float(wanted.abs().max()), 1e-12)
    assert float((found - wanted).abs().max()) <= GRADIENT_TOLERANCE * scale


def heads(facts: dict[str, Any], *names: str, default: int) -> int:
    return next((facts[name] for name in names if name in facts), default)


class TestVision:
    """The EVA ViT alone."""

    def test_blocks_and_features(self, vit_case: Case):
        facts, io = vit_case.facts, vit_case.io
        vit = EvaVit(
            VisionConfig(
                image_size=facts["image_size"],
                patch_size=facts["patch_size"],
                width=facts["width"],
                depth=facts["depth"],
                heads=facts["heads"],
                mlp_hidden=facts.get("mlp_hidden", int(facts["width"] * facts["mlp_ratio"])),
                norm_eps=facts.get("ln_eps", 1e-6),
            )
        ).eval()
        named = rename({f"visual_encoder.{k}": v for k, v in vit_case.weights.items()})
        load_into(vit, {k.removeprefix("vision."): v for k, v in named.items()}, source="case")
        x = vit.embed(io["pixel_values"])
        for i, block in enumerate(vit.blocks):
            x = block(x)
            close(x, io[f"block.{i}"])
        close(vit(io["pixel_values"]), io["features"])
        if "pos_embed_resized" in io:
            side = facts["resize_image_size"] // facts["patch_size"]
            close(vit.positions_for(side, side), io["pos_embed_resized"])


class TestQFormer:
    """Every mode, with its mask."""

    @staticmethod
    def build(case: Case) -> tuple[QFormer, CaptionHead]:
        facts = case.facts
        config = QFormerConfig(
            width=facts["hidden"],
            layers=facts["layers"],
            heads=facts["heads"],
            ffn=facts["intermediate"],
            cross_every=facts.get("cross_attention_freq", 2),
            vocabulary=facts["vocab"],
            max_text=facts["max_position"],
            norm_eps=facts.get("ln_eps", 1e-12),
        )
        former = QFormer(config, context_width=facts["encoder_width"]).eval()
        head = CaptionHead(config).eval()
        named = rename({f"Qformer.{k}": v for k, v in case.weights.items()}, captions=True)
        for module, prefix in ((former, "qformer."), (head, "caption_head.")):
            own = {k.removeprefix(prefix): v for k, v in named.items() if k.startswith(prefix)}
            load_into(module, own, source="case")
        return former, head

    def test_image_mode(self, qformer_case: Case):
        io = qformer_case.io
        former, _ = self.build(qformer_case)
        context = io["encoder_hidden_states"]
        queries = io["query_tokens"].expand(len(context), -1, -1)
        hidden: list[Tensor] = []
        close(former(queries, context=context, causal=True, hidden=hidden), io["image.out"])
        for i, state in enumerate(hidden):
            close(state, io[f"image.hidden.{i}"])
        visible = torch.ones_like(io["image.mask"][0, 0], dtype=torch.bool).tril()
        assert bool((visible == (io["image.mask"][0, 0] == 0)).all())

    def test_five_queries_are_bidirectional_in_the_reference(self, qformer_case: Case):
        io = qformer_case.io
        former, _ = self.build(qformer_case)
        context = io["encoder_hidden_states"]
        queries = io["query_tokens"][:, :5].expand(len(context), -1, -1)
        close(former(queries, context=context, causal=False), io["five_queries.out"])
        ordered = former(queries, context=context, causal=True)
        changed = (ordered - io["five_queries.out"]).abs().amax((0, 2))
        assert bool((changed[:4] > 10 * TOLERANCE).all())

    def test_text_and_joint_modes(self, qformer_case: Case):
        io = qformer_case.io
        former, _ = self.build(qformer_case)
        ids, mask, context = io["input_ids"], io["text_mask"], io["encoder_hidden_states"]
        close(former.text(ids, mask), io["text.out"])
        assert bool(((io["text.mask"][:, 0, 0] == 0) == mask.bool()).all())
        out = former.joint(io["query_tokens"], ids, mask, context=context, causal=True)
        close(out, io["joint.out"])
        ours = joint_mask(io["query_tokens"].shape[1], mask, causal=True)
        assert bool((ours == (io["joint.mask"] == 0)).all())

    def test_caption_mode(self, qformer_case: Case):
        io = qformer_case.io
        former, head = self.build(qformer_case)
        ids, mask, context = io["input_ids"], io["text_mask"], io["encoder_hidden_states"]
        past: list[KeyValues] = []
        former(io["query_tokens"].expand(len(ids), -1, -1), context=context, causal=True, past=past)
        logits = head(former.caption(ids, mask, past))
        close(logits, io["caption.logits"])
        smoothing = qformer_case.facts.get("label_smoothing", 0.1)
        close(caption_loss(logits, ids, mask, smoothing=smoothing), io["caption.loss"][0])
        ours = caption_mask(io["query_tokens"].shape[1], mask)
        assert bool((ours == (io["caption.mask"] == 0)).all())


class TestQuantizer:
    """Values and gradients, in the reference's weighting and in the textbook's."""

    @staticmethod
    def build(codebook: Tensor) -> Quantizer:
        quantizer = Quantizer(*codebook.shape)
        quantizer.codebook.data.copy_(codebook)
        return quantizer

    def test_codes_and_entries(self, vq_case: Case):
        io = vq_case.io
        out = self.build(io["codebook"])(io["z"])
        assert torch.equal(out.codes.flatten(), io["indices"])
        close(out.entries, io["entry"])
        close(out.vectors, io["z_q"])

    @pytest.mark.parametrize("weighting", ["legacy", "fixed"])
    def test_losses_and_gradients(self, vq_case: Case, weighting: Any):
        io = vq_case.io
        weight = vq_case.facts.get("loss_weight_in_total", 5)
        for of, parts in {
            "from_loss": (1, 0), "from_output": (0, 1), "total": (weight, 1)
        }.items():  # fmt: skip
            quantizer = self.build(io["codebook"])
            z = io["z"].clone().requires_grad_()
            out = quantizer(z)
            loss = quantisation_loss(z, out.entries, weighting=weighting)
            close(loss, io[f"{weighting}.loss"][0])
            (parts[0] * loss + parts[1] * (out.vectors * io["upstream_grad"]).sum()).backward()
            close_gradient(z.grad, io[f"{weighting}.grad_z_{of}"])
            found = quantizer.codebook.grad
            wanted = io[f"{weighting}.grad_codebook_{of}"]
            close_gradient(torch.zeros_like(wanted) if found is None else found, wanted)

    def test_first_of_equal_entries(self, vq_case: Case):
        io = vq_case.io
        found = self.build(io["tie.codebook"]).search(io["tie.z"])
        assert torch.equal(found.flatten(), io["tie.indices"].flatten())

    def test_a_step_of_gradient_descent(self, vq_case: Case):
        io, facts = vq_case.io, vq_case.facts
        quantizer = self.build(io["codebook"])
        loss = quantisation_loss(io["z"], quantizer(io["z"]).entries)
        (facts.get("loss_weight_in_total", 5) * loss).backward()
        torch.optim.SGD(quantizer.parameters(), lr=facts.get("sgd_lr", 0.1)).step()
        close(quantizer.codebook, io["sgd_step.codebook"])


def build_tokenizer(case: Case) -> SeedModel:
    facts = case.facts
    tensors = rename(case.weights)
    config = infer_config(
        tensors,
        decode_heads=heads(facts, "blocks_heads", default=12),
        qformer_heads=heads(facts, "qformer_heads", "heads", default=12),
        vision_heads=facts["vit_heads"],
    )
    model = SeedModel(config).eval()
    load_into(model, tensors, source=str(case.folder))
    return model


class TestTokenizer:
    """The inference classes of both versions, from pixels to the generator's condition."""

    def test_from_pixels_to_codes(self, tokenizer_case: Case):
        io, model = tokenizer_case.io, build_tokenizer(tokenizer_case)
        features = model.features(io["pixel_values"])
        if "vit_features" in io:
            close(features, io["vit_features"])
        close(model.context(features), io["ln_vision_features"])
        hidden: list[Tensor] = []
        causal = model.embed(features, hidden=hidden)
        for name in (name for name in io if name.startswith("qformer_hidden.")):
            close(hidden[int(name.rpartition(".")[2])], io[name])
        close(causal, io["causal_embeddings"])
        close(model.pre_quant(causal), io["pre_quant"])
        quantised = model.quantise(causal)
        assert torch.equal(quantised.codes, io["indices"])
        assert torch.equal(model.encode(io["pixel_values"]), io["indices"])
        if "quantized" in io:
            close(quantised.entries, io["quantized"])

    def test_from_codes_to_the_condition(self, tokenizer_case: Case):
        io, model = tokenizer_case.io, build_tokenizer(tokenizer_case)
        for prefix, codes in (("", io["indices"]), ("free_", io.get("free_indices"))):
            if codes is None:
                continue
            decoded = model.decode(codes)
            prepared = model.prepare_head(decoded.vectors)
            for name, found in {
                "decoded_queries": decoded.vectors,
                "blocks_image_out": prepared,
                "blocks_text_out": prepared,
                "image_embeds": decoded.condition,
                "text_embeds": decoded.condition,
            }.items():
                if prefix + name in io:
                    close(found, io[prefix + name])
            if not prefix and "reverse_hidden" in io:
                close(model.head.states(prepared), io["reverse_hidden"])

    def test_causality(self, tokenizer_case: Case):
        io, model = tokenizer_case.io, build_tokenizer(tokenizer_case)
        if "probe_query_tokens" not in io:
            pytest.skip("this case stores no probe")
        before = model.embed(model.features(io["pixel_values"]))
        model.queries.data.copy_(io["probe_query_tokens"])
        after = model.embed(model.features(io["pixel_values"]))
        close(after, io["probe_causal_embeddings"])
        assert torch.equal(before[:, :17], after[:, :17])
        assert bool((before[:, 17:] != after[:, 17:]).any(-1).all())


def check_gradients(case: Case, modules: dict[str, torch.nn.Module]) -> None:
    """Compare stored gradients, and the norm of every trainable parameter's."""
    found = {
        f"{prefix}{name}": parameter.grad
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters()
    }
    stored = {k.removeprefix("grad."): v for k, v in case.io.items() if k.startswith("grad.")}
    assert stored
    for name, wanted in stored.items():
        close_gradient(found[our_name(name) or name], wanted)
    for name, norm in case.facts.get("grad_norms", {}).items():
        gradient = found.get(our_name(name) or name)
        if gradient is None:
            assert norm == 0, f"{name} has no gradient"
        else:
            assert float(gradient.norm()) == pytest.approx(norm, rel=2e-4, abs=1e-7)


class TestStage1:
    """Image-text contrast and its gradients."""

    def test_loss_and_gradients(self, stage1_case: Case):
        facts, io = stage1_case.facts, stage1_case.io
        config = SeedConfig(
            vision=VisionConfig(
                image_size=facts["image_size"],
                patch_size=facts["patch_size"],
                width=facts["vit_width"],
                depth=facts["vit_depth"],
                heads=facts["vit_heads"],
                mlp_hidden=int(facts["vit_width"] * 4.3637),
            ),
            qformer=QFormerConfig(
                width=facts["hidden"],
                layers=facts["layers"],
                heads=facts["heads"],
                ffn=facts["intermediate"],
                dropout=0.0,
                vocabulary=stage1_case.weights[
                    "Qformer.bert.embeddings.word_embeddings.weight"
                ].shape[0],
                max_text=facts["max_position"],
            ),
            head=HeadConfig(dim=8),
            decode_depth=1,
            contrast_dim=facts["embed_dim"],
        )
        model = SeedModel(config).eval()
        assert isinstance(model.contrast, ContrastHead)
        named = rename(stage1_case.weights)
        own = {k: v for k, v in model.state_dict().items() if k not in named}
        # What stage 2 trains is not in the file.
        assert {k.partition(".")[0] for k in own} == {
            "to_code", "quantizer", "from_code", "reconstruct", "prepare_head", "head"
        }  # fmt: skip
        load_into(model, {**own, **named}, source="case")
        causal = model.embed(model.features(io["pixel_values"]))
        close(causal, io["causal_embeddings"])
        image, text = (
            model.image_vectors(causal),
            model.text_vectors(io["input_ids"], io["attention_mask"]),
        )
        close(image, io["image_feat"])
        close(text, io["text_feat"])
        close(image @ text.T, io["similarity"])
        smoothing = facts.get("label_smoothing", 0.1)
        loss = contrastive_loss(image, text, model.contrast.temperature, smoothing=smoothing)
        close(loss, io["loss_itc"][0])
        loss.backward()
        check_gradients(stage1_case, {"": model})


class TestStage2:
    """Codebook and reconstruction losses and their gradients, for both targets."""

    def test_losses_and_gradients(self, stage2_case: Case):
        io, facts = stage2_case.io, stage2_case.facts
        model = build_tokenizer(stage2_case)
        with torch.no_grad():
            causal = model.embed(model.features(io["pixel_values"]))
        close(causal, io["causal_embeddings"])
        z = model.pre_quant(causal)
        close(z, io["pre_quant"])
        quantised = model.quantizer(z)
        assert torch.equal(quantised.codes, io["indices"])
        decoded = model.decode_vectors(quantised.vectors)
        assert decoded.causal is not None
        close(decoded.causal, io["recon_causal"])
        target = io.get("target_image_embeds", io.get("target_text_embeds"))
        assert target is not None
        losses = stage2_loss(
            quantisation=quantisation_loss(z, quantised.entries),
            recon=decoded.causal,
            causal=causal,
            condition=decoded.condition,
            target=target,
        )
        assert facts["losses_returned_are_already_weighted"]
        distil = next(name for name in io if name.startswith("loss_distil"))
        for found, name in (
            (losses.quantisation, "loss_embed"),
            (losses.reconstruction, "loss_recon_s"),
            (losses.generation, distil),
            (losses.total, "loss"),
        ):
            close(found, io[name][0])
        losses.total.backward()
        check_gradients(stage2_case, {"": model})
