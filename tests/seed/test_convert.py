"""Published layouts, merging, token tars, and diffusers de-tokenisers of both versions."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polyzoo.core.errors import ConfigError, DataError, UsageError, WeightsError
from polyzoo.seed.config import HeadConfig
from polyzoo.seed.convert import build, convert_tars, convert_tokenizer, main
from polyzoo.seed.detokenizer import Detokenizer, load_detokenizer, unclip_class
from polyzoo.seed.model import SeedModel
from polyzoo.seed.options import ConvertConfig
from polyzoo.seed.published import our_name, rename
from support.seed_models import tiny_model

HEADS = {"decode_heads": 2, "qformer_heads": 2, "vision_heads": 2}


def published(model: SeedModel, *, text: bool = False) -> dict[str, Tensor]:
    """A model's weights under the reference's names, written out once more by hand."""
    suffix = "text" if text else "image"
    plain = {
        "vision.patches.": "visual_encoder.patch_embed.proj.",
        "vision.class_token": "visual_encoder.cls_token",
        "vision.positions": "visual_encoder.pos_embed",
        "vision.blocks.": "visual_encoder.blocks.",
        "vision_norm.": "ln_vision.",
        "to_code.": "encode_task_layer.",
        "from_code.": "decode_task_layer.",
        "quantizer.codebook": "quantize.embedding.weight",
        "reconstruct.positions": "pos_embed",
        "reconstruct.blocks.": "blocks.",
        "prepare_head.positions": f"pos_embed_{suffix}",
        "prepare_head.blocks.": f"blocks_{suffix}.",
        "head.down.": "image_down.",
        "head.projection.": f"distill_{suffix}_proj.",
        "head.queries": "reverse_tokens",
    }
    inner = {
        "self_attention.norm.": "attention.output.LayerNorm.",
        "self_attention.output.": "attention.output.dense.",
        "self_attention.": "attention.self.",
        "cross_attention.norm.": "crossattention.output.LayerNorm.",
        "cross_attention.output.": "crossattention.output.dense.",
        "cross_attention.": "crossattention.self.",
        "query_ffn.expand.": "intermediate_query.dense.",
        "query_ffn.contract.": "output_query.dense.",
        "query_ffn.norm.": "output_query.LayerNorm.",
    }
    out: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "queries":
            out["query_tokens"] = tensor
            continue
        for ours, theirs in {"qformer.": "Qformer.", "head.qformer.": "Reverse_Qformer."}.items():
            if name.startswith(ours):
                rest = name.removeprefix(ours)
                rest = rest.replace("embedding_norm.", "bert.embeddings.LayerNorm.")
                rest = rest.replace("layers.", "bert.encoder.layer.")
                for a, b in inner.items():
                    if a in rest:
                        rest = rest.replace(a, b)
                        break
                out[theirs + rest] = tensor
                break
        else:
            ours = next(ours for ours in plain if name.startswith(ours))
            out[plain[ours] + name.removeprefix(ours)] = tensor
    return {name: tensor.clone() for name, tensor in out.items()}


def no_text(**more: Any) -> SeedModel:
    from dataclasses import replace

    from support.seed_models import tiny_config

    qformer = replace(tiny_config().qformer, vocabulary=0, max_text=512, dropout=0.1)
    return tiny_model(qformer=qformer, contrast_dim=0, **more)


class TestPublishedNames:
    @pytest.mark.parametrize(
        ("head", "text"),
        [
            (HeadConfig(dim=24, mlp=(16, 16, 8)), False),
            (HeadConfig(kind="reverse", dim=24, layers=3, ffn=64), False),
            (HeadConfig(kind="reverse", target="text", dim=24, queries=5, layers=2, ffn=64), True),
        ],
    )
    def test_config_and_weights_come_back(self, head: HeadConfig, text: bool):
        model = no_text(head=head)
        found = build(published(model, text=text), **HEADS)
        assert found.config == model.config
        images = torch.randn(2, 3, 32, 32)
        assert torch.equal(found.eval().encode(images), model.encode(images))
        codes = model.encode(images)
        assert torch.equal(found.decode(codes).condition, model.decode(codes).condition)

    def test_v1s_pair_of_files(self, tmp_path: Path):
        head = HeadConfig(kind="reverse", target="text", dim=24, queries=5, layers=2, ffn=64)
        model = no_text(head=head, reconstructs=False)
        # 16 and 12 heads are what published files have; their sizes are divisible by both.
        tensors = published(model, text=True)
        first = {k: v for k, v in tensors.items() if k.startswith(("visual", "ln_", "query", "Qf"))}
        second = {k: v for k, v in tensors.items() if k not in first}
        for name, part in (("causal_qformer.pth", first), ("seed_tokenizer.pth", second)):
            torch.save({"model": part}, tmp_path / name)
        merged = {**first, **second}
        assert build(merged, **HEADS).config.head.target == "text"
        with pytest.raises(WeightsError, match="the checkpoint lacks encode_task_layer, quantize"):
            convert_tokenizer([tmp_path / "causal_qformer.pth"], tmp_path / "out")

    def test_the_vit_is_a_file_of_its_own(self, tmp_path: Path):
        tensors = published(no_text())
        rest = {k: v for k, v in tensors.items() if not k.startswith("visual_encoder.")}
        torch.save(rest, tmp_path / "seed_quantizer.pt")
        with pytest.raises(
            WeightsError, match=r"lacks visual_encoder; the ViT is a file of its own"
        ):
            convert_tokenizer([tmp_path / "seed_quantizer.pt"], tmp_path / "out")
        torch.save({"head.weight": torch.zeros(2)}, tmp_path / "vit.pth")
        with pytest.raises(WeightsError, match=r"neither an EVA ViT .* nor a BLIP-2"):
            convert_tokenizer(
                [tmp_path / "seed_quantizer.pt"], tmp_path / "out", vision=tmp_path / "vit.pth"
            )

    def test_a_blip2_vision_tower(self):
        from polyzoo.seed.published import eva_file

        tensors = published(no_text())
        vit = {k: v for k, v in tensors.items() if k.startswith("visual_encoder.")}
        theirs: dict[str, Tensor] = {}
        for name, tensor in vit.items():
            rest = name.removeprefix("visual_encoder.")
            if rest.endswith("v_bias"):
                continue
            if rest.endswith("q_bias"):
                v_bias = vit[name.replace("q_bias", "v_bias")]
                tensor = torch.cat((tensor, torch.zeros_like(tensor), v_bias))
                rest = rest.replace("q_bias", "qkv.bias")
            for a, b in {
                "cls_token": "embeddings.class_embedding",
                "pos_embed": "embeddings.position_embedding",
                "patch_embed.proj": "embeddings.patch_embedding",
                "blocks.": "encoder.layers.", ".norm1.": ".layer_norm1.",
                ".norm2.": ".layer_norm2.", ".attn.qkv.": ".self_attn.qkv.",
                ".attn.proj.": ".self_attn.projection.",
            }.items():  # fmt: skip
                rest = rest.replace(a, b)
            theirs[f"vision_model.{rest}"] = tensor
        found = eva_file(theirs)
        assert found.keys() == vit.keys()
        assert all(torch.equal(found[name], vit[name]) for name in vit)
        biased = next(name for name in theirs if name.endswith("qkv.bias"))
        theirs[biased] = torch.ones_like(theirs[biased])
        with pytest.raises(WeightsError, match="has biases for keys, which the EVA ViT lacks"):
            eva_file(theirs)

    def test_leftovers_are_summed_up_in_one_warning(self, caplog: pytest.LogCaptureFixture):
        tensors = published(no_text())
        tensors |= {f"leftover.{i}": torch.zeros(1) for i in range(146)}
        build(tensors, **HEADS)
        warnings = [r.message for r in caplog.records if "have no place" in r.message]
        assert warnings == [
            "146 tensors have no place in the tokenizer and are left out: leftover (146)"
        ]

    def test_a_codebook_of_another_size(self):
        tensors = rename(published(no_text()))
        tensors["to_code.2.weight"] = torch.zeros(9, 32)
        with pytest.raises(WeightsError, match=r"1 misshaped .to_code\.2\.weight"):
            from polyzoo.core.weights import load_into

            load_into(no_text(), tensors, source="case")

    def test_names_without_a_place(self):
        assert our_name("Qformer.bert.embeddings.position_ids") is None
        assert our_name("itm_head.weight") is None


class TestTars:
    @staticmethod
    def tar(path: Path, records: list[Any]) -> None:
        with tarfile.open(path, "w") as archive:
            for number, record in enumerate(records):
                data = pickle.dumps(record)
                member = tarfile.TarInfo(f"{number}.pkl")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))

    def test_records_become_lines(self, tmp_path: Path):
        records = [{"image_ids": [1, 2], "text": "a", "metadata": {}}, {"image_ids": (3, 4)}]
        self.tar(tmp_path / "a.tar", records)
        report = convert_tars(tmp_path, tmp_path / "out")
        assert report.records == 2
        lines = (tmp_path / "out" / "records.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines][1] == {"image_ids": [3, 4]}

    def test_a_pickle_that_would_run_code(self, tmp_path: Path):
        class Evil:
            def __reduce__(self) -> Any:
                return (Path.touch, (Path(tmp_path / "was here"),))

        self.tar(tmp_path / "a.tar", [{"text": Evil()}])
        with pytest.raises(DataError, match="refused, since reading it would call"):
            convert_tars(tmp_path / "a.tar", tmp_path / "out")
        assert not (tmp_path / "was here").exists()
        assert not (tmp_path / "out" / "records.jsonl").exists()

    def test_damage_and_absence(self, tmp_path: Path):
        self.tar(tmp_path / "a.tar", [[1, 2]])
        with pytest.raises(DataError, match="holds list, no record"):
            convert_tars(tmp_path / "a.tar", tmp_path / "out")
        with pytest.raises(DataError, match=r"no \.tar there"):
            convert_tars(tmp_path / "none", tmp_path / "out")

    @pytest.mark.parametrize("what", ["tokenizer", "adapters", "tokens"])
    def test_what_each_conversion_needs(self, tmp_path: Path, what: Any):
        with pytest.raises(UsageError, match=f"convert {what} needs --"):
            main(ConvertConfig(what=what, out=tmp_path))


def unclip(folder: Path) -> Path:
    """A tiny random unCLIP pipeline whose condition has 24 channels, on disk."""
    import diffusers
    from transformers import (
        CLIPImageProcessor,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=8, bos_token_id=0, eos_token_id=1,
            pad_token_id=1,
        )
    )  # fmt: skip
    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            image_size=8, patch_size=8, projection_dim=24,
        )
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, cross_attention_dim=16,
        block_out_channels=(32, 32), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
        layers_per_block=1, class_embed_type="projection",
        projection_class_embeddings_input_dim=48,
    )  # fmt: skip
    # At random the class condition hardly counts; here it must.
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "class_embedding" in name or "time_emb_proj" in name:
                parameter.mul_(12)
    pipeline = diffusers.StableUnCLIPImg2ImgPipeline(
        feature_extractor=CLIPImageProcessor(crop_size=8, size=8),
        image_encoder=vision,
        image_normalizer=diffusers.pipelines.stable_diffusion.StableUnCLIPImageNormalizer(24),
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=clip_tokenizer(folder / "words"),
        text_encoder=text,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction"),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(16, 16), norm_num_groups=8, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ),
    )  # fmt: skip
    pipeline.save_pretrained(folder / "unclip")
    return folder / "unclip"


def clip_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True)
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "a": 3}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=8)


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Detokenizer:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    return load_detokenizer(unclip(tmp_path_factory.mktemp("unclip")), target="image")


@pytest.mark.filterwarnings("ignore")  # of diffusers and transformers about each other
class TestDetokenizer:
    codes = torch.tensor([[1, 5, 9, 13], [2, 2, 7, 0]])

    def drawn(self, generator: Detokenizer, codes: Tensor, **more: Any) -> np.ndarray:
        given = {"seeds": [3, 4][: len(codes)], "steps": 2, "guidance": 3.0, **more}
        return np.stack([np.asarray(p, int) for p in generator(tiny_model(), codes, **given)])

    def test_each_picture_depends_on_its_own_seed(self, generator: Detokenizer):
        both = self.drawn(generator, self.codes)
        assert both.shape == (2, 16, 16, 3)
        assert np.array_equal(both, self.drawn(generator, self.codes))
        alone = self.drawn(generator, self.codes[1:], seeds=[4])
        assert np.abs(alone[0] - both[1]).max() <= 1
        assert np.abs(self.drawn(generator, self.codes, seeds=[5, 6]) - both).max() > 3

    def test_codes_and_negative_codes_matter(self, generator: Detokenizer):
        plain = self.drawn(generator, self.codes)
        other = self.drawn(generator, (self.codes + 5) % 16)
        away = self.drawn(generator, self.codes, negative=(self.codes + 3) % 16)
        assert not np.array_equal(plain, other)
        assert not np.array_equal(plain, away)
        # Pushed away from itself, guidance changes nothing.
        same = self.drawn(generator, self.codes, negative=self.codes)
        assert np.abs(same - self.drawn(generator, self.codes, guidance=1.0)).max() <= 2

    def test_guidance_1_asks_half_of_the_unet(self, generator: Detokenizer):
        seen: list[int] = []
        hook = generator.pipeline.unet.register_forward_pre_hook(
            lambda _, args: seen.append(len(args[0]))
        )
        self.drawn(generator, self.codes, guidance=1.0)
        self.drawn(generator, self.codes, guidance=2.0)
        hook.remove()
        assert seen == [2, 2, 4, 4]

    def test_what_does_not_fit(self, generator: Detokenizer):
        wrong = tiny_model(head=HeadConfig(dim=32, mlp=(16, 16, 8)))
        with pytest.raises(ConfigError, match="embeddings of 32 channels and the generator takes"):
            generator(wrong, self.codes, seeds=[1, 2])
        text = tiny_model(
            head=HeadConfig(kind="reverse", target="text", dim=24, queries=5, layers=2, ffn=64)
        )
        with pytest.raises(ConfigError, match="v2 goes with unCLIP, v1 with Stable Diffusion"):
            generator(text, self.codes, seeds=[1, 2])
        with pytest.raises(ConfigError, match="must both be at least 1"):
            generator(tiny_model(), self.codes, seeds=[1, 2], steps=0)

    def test_no_such_pipeline(self, tmp_path: Path):
        with pytest.raises(WeightsError, match="is no diffusers pipeline"):
            load_detokenizer(tmp_path / "none", target="image", local_files_only=True)

    def test_it_is_diffusers_own_pipeline(self):
        diffusers = pytest.importorskip("diffusers")
        assert issubclass(unclip_class(), diffusers.StableUnCLIPImg2ImgPipeline)
