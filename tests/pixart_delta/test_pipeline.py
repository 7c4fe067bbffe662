"""The pipeline on a tiny model with random weights: everything but beauty."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from polyzoo.core.errors import ConfigError, DataError, WeightsError
from polyzoo.core.weights import write_weights
from polyzoo.pixart_delta import layout
from polyzoo.pixart_delta.buckets import buckets
from polyzoo.pixart_delta.captions import PackedCaptions
from polyzoo.pixart_delta.config import xl
from polyzoo.pixart_delta.decoding import decode, decode_tiled
from polyzoo.pixart_delta.folders import save_vae, write_json
from polyzoo.pixart_delta.lora import read_adapter
from polyzoo.pixart_delta.pipeline import PixArtDeltaPipeline
from polyzoo.pixart_delta.record import read_record, save_png
from polyzoo.pixart_delta.request import plan_sizes
from polyzoo.pixart_delta.sampling import NotFiniteError, first_bad_layer
from polyzoo.pixart_delta.scheduler import PixArtLCMScheduler
from support.pixart_folders import picture, write_model
from support.pixart_models import relative_error

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")
PROMPTS = ["red apple, flat style", "cat face"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pixart") / "model"
    write_model(path)
    return path


@pytest.fixture
def pipe(folder: Path) -> PixArtDeltaPipeline:
    made = PixArtDeltaPipeline.from_pretrained(folder, device="cpu")
    made.set_progress_bar_config(disable=True)
    return made


def latents(pipe: PixArtDeltaPipeline, prompt, **options) -> torch.Tensor:
    options.setdefault("num_inference_steps", 2)
    return pipe(prompt, output_type="latent", **options).images


class TestDrawing:
    """Sizes, seeds, batches."""

    @pytest.mark.parametrize("scheduler", ["lcm", "dpm", "ddim"])
    def test_an_image_depends_on_its_seed_alone(self, pipe, scheduler):
        both = latents(pipe, PROMPTS, seed=[5, 6], scheduler=scheduler, num_inference_steps=3)
        alone = latents(pipe, PROMPTS[1], seed=6, scheduler=scheduler, num_inference_steps=3)
        again = latents(pipe, PROMPTS[1], seed=6, scheduler=scheduler, num_inference_steps=3)
        assert torch.equal(alone, again)
        assert relative_error(alone[0], both[1]) <= 1e-4
        assert relative_error(both[0], both[1]) > 1e-2

    def test_pictures(self, pipe):
        made = pipe(PROMPTS, num_images_per_prompt=2, seed=0, num_inference_steps=2, height=32,
                    width=48, profile=True)  # fmt: skip
        assert [image.size for image in made.images] == [(48, 32)] * 4
        assert [record.seed for record in made.records] == [0, 1, 2, 3]
        assert [record.prompt for record in made.records] == [
            PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1],
        ]  # fmt: skip
        assert made.seconds.keys() == {"text", "sources", "transformer", "vae"}
        tensors = pipe(PROMPTS, num_inference_steps=1, seed=0, output_type="pt").images
        assert tensors.shape == (2, 3, 32, 32)
        assert float(tensors.min()) >= 0
        assert float(tensors.max()) <= 1

    def test_guidance(self, pipe):
        plain = latents(pipe, PROMPTS[0], seed=0, scheduler="ddim", guidance_scale=1.0)
        guided = latents(pipe, PROMPTS[0], seed=0, scheduler="ddim", guidance_scale=3.0)
        learned = latents(
            pipe, PROMPTS[0], seed=0, scheduler="ddim", guidance_scale=3.0, uncond="learned_null"
        )
        negative = latents(
            pipe, PROMPTS[0], seed=0, scheduler="ddim", guidance_scale=3.0,
            negative_prompt="blue house",
        )  # fmt: skip
        for one, other in ((plain, guided), (guided, learned), (guided, negative)):
            assert relative_error(one, other) > 1e-4
        same = latents(
            pipe, PROMPTS[0], seed=0, scheduler="ddim", guidance_scale=3.0,
            negative_prompt=PROMPTS[0],
        )  # fmt: skip
        assert relative_error(same, plain) <= 1e-4  # u + s (c - u) is c where u is c

    def test_embeddings_in_place_of_prompts(self, pipe):
        wanted = latents(pipe, PROMPTS, seed=3)
        embeds = pipe.encode(PROMPTS)
        assert isinstance(embeds, PackedCaptions)
        assert torch.equal(latents(pipe, None, prompt_embeds=embeds, seed=3), wanted)
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        given = latents(pipe, PROMPTS, latents=noise, seed=3, num_inference_steps=1)
        assert torch.equal(given, latents(pipe, PROMPTS, latents=noise, seed=9,
                                          num_inference_steps=1))  # fmt: skip

    def test_every_bucket_gives_the_size_asked_for(self):
        for own, resolution in ((xl(1024), 1024), (xl(512, conditions=True), 512)):
            for bucket in buckets(resolution):
                sizes = plan_sizes(own, 8, height=bucket.height, width=bucket.width, binning=True)
                assert (sizes.height, sizes.width) == (bucket.height, bucket.width)
                assert sizes.height % 16 == 0
                assert sizes.width % 16 == 0
        sizes = plan_sizes(xl(1024), 8, height=720, width=1279, binning=True)
        assert (sizes.height, sizes.width) == (768, 1344)
        assert (sizes.out_height, sizes.out_width) == (720, 1279)
        assert sizes.ratio == 768 / 1344


class TestSteps:
    """Callbacks, interruption, strength, masks."""

    def test_callback_sees_and_changes(self, pipe):
        seen = []

        def watch(given, index, timestep, tensors):
            assert given is pipe
            seen.append((index, timestep, set(tensors)))
            return {"latents": torch.zeros_like(tensors["latents"])} if index == 0 else None

        changed = latents(pipe, PROMPTS[0], seed=0, scheduler="lcm", callback_on_step_end=watch,
                          num_inference_steps=4)  # fmt: skip
        names = {"latents", "denoised"}
        assert seen == [(i, t, names) for i, t in enumerate((999, 759, 499, 259))]
        plain = latents(pipe, PROMPTS[0], seed=0, scheduler="lcm", num_inference_steps=4)
        assert not torch.equal(changed, plain)
        shown = pipe.show(plain, side=4)
        assert shown[0].size == (16, 16)

    def test_interrupt(self, pipe):
        steps = []

        def stop(given, index, timestep, tensors):
            steps.append(timestep)
            if index == 1:
                given.interrupt()

        made = pipe(PROMPTS[0], seed=0, scheduler="lcm", num_inference_steps=4,
                    callback_on_step_end=stop)  # fmt: skip
        assert steps == [999, 759]
        assert made.interrupted
        assert made.images[0].size == (32, 32)
        assert not pipe(PROMPTS[0], seed=0, num_inference_steps=1).interrupted

    @pytest.mark.parametrize("scheduler", ["lcm", "dpm", "ddim"])
    def test_from_an_image(self, pipe, scheduler):
        source = picture()
        options = {"image": source, "seed": 0, "scheduler": scheduler, "num_inference_steps": 4}
        from polyzoo.pixart_delta.pictures import cover, to_tensor
        from polyzoo.pixart_delta.vae import encode_images

        clean = encode_images(pipe.vae, to_tensor([cover(source, 32, 32)]) * 2 - 1).sample()
        far = latents(pipe, PROMPTS[0], strength=1.0, **options)
        near = latents(pipe, PROMPTS[0], strength=0.1, **options)
        assert (near - clean).norm() < (far - clean).norm()

    @pytest.mark.parametrize("scheduler", ["lcm", "dpm", "ddim"])
    def test_inpainting_keeps_what_is_black(self, pipe, scheduler):
        source, mask = picture(), Image.new("L", (32, 32), 0)
        mask.paste(255, (16, 0, 32, 32))
        options = {"image": source, "seed": 0, "scheduler": scheduler, "num_inference_steps": 3}
        kept = latents(pipe, PROMPTS[0], mask_image=mask, strength=1.0, **options)
        from polyzoo.pixart_delta.pictures import cover, to_tensor
        from polyzoo.pixart_delta.vae import encode_images

        clean = encode_images(pipe.vae, to_tensor([cover(source, 32, 32)]) * 2 - 1).sample()
        assert relative_error(kept[..., :4], clean[..., :4]) <= 1e-5
        assert relative_error(kept[..., 4:], clean[..., 4:]) > 1e-2


class TestControl:
    """Control with and without LCM."""

    @pytest.mark.parametrize("scheduler", ["lcm", "ddim"])
    def test_scale_and_range(self, pipe, scheduler):
        options = {"seed": 0, "scheduler": scheduler, "num_inference_steps": 4}
        plain = latents(pipe, PROMPTS, **options)

        def steered(**more):
            return latents(
                pipe, PROMPTS, control_image=picture(), control_type="edges", **options, **more
            )

        assert torch.equal(steered(control_scale=0.0), plain)
        full, weak = steered(), steered(control_scale=0.3)
        early, late = steered(control_end=0.5), steered(control_start=0.5)
        for one, other in ((plain, full), (full, weak), (full, early), (early, late)):
            assert relative_error(one, other) > 1e-3
        raw = latents(pipe, PROMPTS, control_image=[picture(), picture(1)], control_type="raw",
                      **options)  # fmt: skip
        assert relative_error(raw, full) > 1e-3

    def test_what_is_missing(self, pipe, folder, tmp_path):
        with pytest.raises(
            DataError, match=r"needs the edge detector: load the pipeline with hed="
        ):
            pipe(PROMPTS[0], control_image=picture(), control_type="hed", num_inference_steps=1)
        with pytest.raises(DataError, match=r"3 control_images for 2 prompts and 2 images"):
            pipe(PROMPTS, control_image=[picture()] * 3, control_type="raw")
        with pytest.raises(DataError, match=r"control_image of 1 x 1 is too small"):
            pipe(PROMPTS, control_image=Image.new("RGB", (1, 1)), control_type="raw")
        with pytest.raises(ConfigError, match=r"control_scale=3.0 must be 0 to 2"):
            pipe(PROMPTS, control_image=picture(), control_scale=3.0)
        with pytest.raises(ConfigError, match=r"0 <= start < end <= 1"):
            pipe(PROMPTS, control_image=picture(), control_start=0.5, control_end=0.5)
        bare = tmp_path / "bare"
        write_model(bare, control=False)
        other = PixArtDeltaPipeline.from_pretrained(bare, device="cpu")
        with pytest.raises(DataError, match=r"needs a control branch: load the pipeline with"):
            other(PROMPTS[0], control_image=picture())

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
    def test_pictures_of_any_mode(self, pipe, mode):
        source = picture().convert("L") if mode == "I;16" else picture()
        given = (
            source.convert("I").point(lambda v: v * 256) if mode == "I;16" else source.convert(mode)
        )
        made = latents(pipe, PROMPTS[0], control_image=given, control_type="raw",
                       num_inference_steps=1, seed=0)  # fmt: skip
        assert bool(made.isfinite().all())


class TestParts:
    """Folders, adapters, memory, decoding, records."""

    def test_round_trip(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path / "again")
        again = PixArtDeltaPipeline.from_pretrained(tmp_path / "again", device="cpu")
        assert again.kind == "base"
        mine, its = pipe.transformer.state_dict(), again.transformer.state_dict()
        assert all(torch.equal(mine[name], its[name]) for name in mine)
        # the words are rounded to int8 anew
        found, wanted = (latents(p, PROMPTS, seed=1) for p in (again, pipe))
        assert relative_error(found, wanted) <= 1e-2

    def test_transformer_alone_in_the_official_layout(self, pipe, folder, tmp_path):
        official = layout.to_official(pipe.transformer.state_dict(), null_caption=pipe.null_caption)
        write_weights(tmp_path / "model.safetensors", official)
        with pytest.raises(WeightsError, match=r"no autoencoder there; give its folder with vae="):
            PixArtDeltaPipeline.from_pretrained(tmp_path / "model.safetensors", device="cpu")
        with pytest.raises(WeightsError, match=r"pickled checkpoints are read only by"):
            PixArtDeltaPipeline.from_pretrained(tmp_path / "model.pth", device="cpu")

    def test_memory_recipe_gives_the_same(self, folder, pipe):
        small = PixArtDeltaPipeline.from_pretrained(folder, device="cpu", memory="8gb")
        assert torch.equal(latents(small, PROMPTS, seed=1), latents(pipe, PROMPTS, seed=1))
        one, other = (p(PROMPTS[0], seed=1, num_inference_steps=1).images[0] for p in (small, pipe))
        assert one.tobytes() == other.tobytes()
        with pytest.raises(ConfigError, match=r"compile=True captures where they are"):
            PixArtDeltaPipeline.from_pretrained(folder, device="cpu", memory="8gb", compile=True)

    @pytest.mark.parametrize("style", ["peft", "unet", "transformer"])
    def test_adapters(self, pipe, tmp_path, style):
        prefix = {
            "peft": "base_model.model.", "unet": "unet.base_model.model.",
            "transformer": "transformer.",
        }[style]  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        tensors = {}
        for layer, rows, columns in (
            ("transformer_blocks.0.attn1.to_q", 48, 48), ("proj_out", 32, 48),
        ):  # fmt: skip
            tensors[f"{prefix}{layer}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
            tensors[f"{prefix}{layer}.lora_B.weight"] = torch.randn(rows, 4, generator=generator)
        path = tmp_path / "adapter"
        path.mkdir()
        metadata = {"polyzoo.kind": "lcm"}
        if style == "peft":
            write_weights(path / "adapter_model.safetensors", tensors, metadata=metadata)
            write_json(path / "adapter_config.json", {"lora_alpha": 2.0, "r": 4})
            scale = 0.5
        else:
            path = path / "adapter.safetensors"
            write_weights(path, tensors, metadata=metadata)
            scale = 2.0  # alpha 8 where nobody says
        before = {name: x.clone() for name, x in pipe.transformer.state_dict().items()}
        name = pipe.load_lora_weights(path)
        assert pipe.lcm_weights
        changed = pipe.transformer.proj_out.weight - before["proj_out.weight"]
        product = (
            tensors[f"{prefix}proj_out.lora_B.weight"] @ tensors[f"{prefix}proj_out.lora_A.weight"]
        )
        assert relative_error(changed, scale * product) <= 1e-4
        assert pipe(PROMPTS[0], seed=0, num_inference_steps=1).records[0].adapters == {name: 1.0}
        pipe.adapters.set_scale(name, 0.5)
        halved = pipe.transformer.proj_out.weight - before["proj_out.weight"]
        assert relative_error(halved, 0.5 * scale * product) <= 1e-4
        pipe.load_lora_weights(path, name="other", scale=0.5)
        assert (
            relative_error(
                pipe.transformer.proj_out.weight - before["proj_out.weight"], scale * product
            )
            <= 1e-4
        )
        pipe.unload_lora_weights()
        after = pipe.transformer.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
        with pytest.raises(WeightsError, match=r"no adapter 'other'; there are none"):
            pipe.unload_lora_weights("other")

    def test_adapters_of_another_model(self, pipe, tmp_path):
        path = tmp_path / "a.safetensors"
        write_weights(path, {"unet.mid.lora_A.weight": torch.zeros(2, 4),
                             "unet.mid.lora_B.weight": torch.zeros(4, 2)})  # fmt: skip
        with pytest.raises(WeightsError, match=r"1 of 1 adapted layers are not in the transformer"):
            pipe.load_lora_weights(path)
        write_weights(path, {"proj_out.weight": torch.zeros(2, 4)})
        with pytest.raises(WeightsError, match=r"names are no adapter's"):
            read_adapter(path)

    def test_tiles_are_near_the_whole(self, pipe):
        # GroupNorm sees a tile instead of the image, so that tiles are near, not equal.
        x = 0.2 * torch.randn(1, 4, 24, 40, generator=torch.Generator().manual_seed(0))
        whole = decode(pipe.vae, x)
        tiles = decode_tiled(pipe.vae, x, tile=16, overlap=8)
        assert tiles.shape == whole.shape
        assert float((tiles - whole).norm() / whole.norm()) < 0.3
        assert torch.allclose(decode_tiled(pipe.vae, x, tile=64, overlap=8), whole, atol=1e-5)

    def test_record_in_the_png(self, pipe, tmp_path):
        made = pipe(PROMPTS[0], seed=4, num_inference_steps=2, scheduler="lcm")
        save_png(made.images[0], tmp_path / "a.png", made.records[0])
        record = read_record(tmp_path / "a.png")
        assert (record["prompt"], record["seed"], record["steps"]) == (PROMPTS[0], 4, 2)
        assert record["weights"].keys() == {"transformer", "vae"}
        again = pipe(record["prompt"], seed=record["seed"], num_inference_steps=record["steps"],
                     scheduler=record["scheduler"])  # fmt: skip
        with Image.open(tmp_path / "a.png") as stored:
            assert again.images[0].tobytes() == stored.tobytes()
        picture().save(tmp_path / "b.png")
        with pytest.raises(DataError, match=r"holds no record"):
            read_record(tmp_path / "b.png")


class TestErrors:
    """Messages that say what to do (section 10)."""

    def test_arguments(self, pipe):
        for match, options in (
            (r"height=30 is not a multiple of 8: use 24 or 32", {"height": 30}),
            (r"steps=0 must be 1 to 50", {"num_inference_steps": 0, "scheduler": "lcm"}),
            (r"steps=-1 must be 1 to 1000", {"num_inference_steps": -1, "scheduler": "dpm"}),
            (r"steps=51 must be 1 to 50", {"num_inference_steps": 51, "scheduler": "lcm"}),
            (r"strength=0 must be above 0", {"strength": 0, "image": picture()}),
            (r"2 seeds for 1 images", {"seed": [1, 2]}),
            (r"mask_image needs image", {"mask_image": picture()}),
            (r"latents of shape \(1, 4, 2, 2\): expected", {"latents": torch.zeros(1, 4, 2, 2)}),
        ):
            with pytest.raises((ConfigError, DataError), match=match):
                pipe(PROMPTS[0], **options)
        with pytest.raises(ConfigError, match=r"steps=6 must be 1 to 5 with strength=0.1"):
            pipe(PROMPTS[0], image=picture(), strength=0.1, num_inference_steps=6, scheduler="lcm")
        with pytest.raises(DataError, match=r"give prompt or prompt_embeds"):
            pipe()

    def test_single_scale_models_draw_one_size(self, tmp_path):
        write_model(tmp_path, multi_scale=False, control=False)
        single = PixArtDeltaPipeline.from_pretrained(tmp_path, device="cpu")
        with pytest.raises(DataError, match=r"48 x 32: this model draws only 32 x 32"):
            single(PROMPTS[0], height=48)

    def test_warnings(self, pipe, caplog):
        def said(**options) -> str:
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="polyzoo"):
                pipe(options.pop("prompt", PROMPTS[0]), num_inference_steps=1, seed=0, **options)
            return caplog.text

        assert "LCM scheduler with base weights" in said(scheduler="lcm")
        assert "with LCM: its weights contain guidance" in said(scheduler="lcm", guidance_scale=3.0)
        assert "negative_prompt does nothing without guidance" in said(
            scheduler="dpm", guidance_scale=1.0, negative_prompt="blue"
        )
        assert "empty after cleaning" in said(prompt="  ")
        assert "empty after cleaning" in said(prompt="\u4e00\u53ea\u732b")
        assert "longer than 9 words; left out: 'cat'" in said(prompt="red " * 9 + "cat")
        pipe.kind = "lcm"
        assert "LCM weights with scheduler='ddim'" in said(scheduler="ddim")
        assert "LCM weights" not in said(scheduler="lcm")

    def test_other_families(self, folder, tmp_path):
        from polyzoo.pixart_delta.vae import load_vae, small_vae

        vae = small_vae()
        vae.register_to_config(scaling_factor=0.13025)
        save_vae(tmp_path, vae)
        with pytest.raises(WeightsError, match=r"0.13025 belongs to SDXL and PixArt-Sigma"):
            load_vae(tmp_path / "vae")
        with pytest.raises(ConfigError, match=r"images look washed out"):
            PixArtLCMScheduler(beta_schedule="scaled_linear")

    def test_not_finite(self, pipe):
        with torch.no_grad():
            pipe.transformer.transformer_blocks[1].ff.net[2].bias[0] = float("inf")
        with pytest.raises(NotFiniteError, match=r"in step 1 of 2 .timestep 999."):
            pipe(PROMPTS[0], num_inference_steps=2, seed=0, scheduler="lcm")
        captions = pipe.encode(PROMPTS[:1])
        from polyzoo.pixart_delta.model import Conditions

        x, conditions = torch.zeros(1, 4, 8, 8), Conditions(timestep=torch.ones(1))
        bad = first_bad_layer(pipe.transformer, lambda: pipe.transformer(x, captions, conditions))
        assert bad == "transformer_blocks.1.ff.net.2"


def test_scheduler_config_of_diffusers(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "m")
    values = {
        "_class_name": "LCMScheduler", "beta_start": 0.0001, "beta_end": 0.02,
        "beta_schedule": "linear", "num_train_timesteps": 1000, "original_inference_steps": 50,
        "timestep_spacing": "leading",
    }  # fmt: skip
    write_json(tmp_path / "m" / "scheduler" / "scheduler_config.json", values)
    pipe = PixArtDeltaPipeline.from_pretrained(tmp_path / "m", device="cpu")
    assert isinstance(pipe.scheduler, PixArtLCMScheduler)
    values["beta_schedule"] = "scaled_linear"
    path = tmp_path / "m" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"beta_schedule='scaled_linear', but PixArt was trained"):
        PixArtDeltaPipeline.from_pretrained(tmp_path / "m", device="cpu")
