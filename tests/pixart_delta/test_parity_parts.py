"""Stored results for schedulers, losses, edges, adapters, prompts and buckets."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from polyzoo.core.weights import load_into
from polyzoo.pixart_delta import layout
from polyzoo.pixart_delta.batches import LatentBatch
from polyzoo.pixart_delta.buckets import buckets, nearest_bucket, prompt_flags
from polyzoo.pixart_delta.captions import PackedCaptions
from polyzoo.pixart_delta.cleaning import clean_once, clean_prompt
from polyzoo.pixart_delta.config import ControlConfig
from polyzoo.pixart_delta.control import Control, ControlBranch
from polyzoo.pixart_delta.diffusion import schedule
from polyzoo.pixart_delta.hed import HedNetwork
from polyzoo.pixart_delta.lcm import boundary_scalings, lcm_timesteps, solver_grid
from polyzoo.pixart_delta.lora import Adapters, read_adapter
from polyzoo.pixart_delta.losses import consistency, diffusion_loss, pseudo_huber
from polyzoo.pixart_delta.model import Conditions, PixArtTransformer, read_diffusers_config
from polyzoo.pixart_delta.objectives import Draws, lcm_objective
from polyzoo.pixart_delta.recipe import LcmRecipe
from polyzoo.pixart_delta.scheduler import PixArtLCMScheduler
from support.parity import case_folders
from support.pixart_models import Case, inputs, named, official_config, relative_error

FORWARD, SAMPLING, GRADIENT, PARAMETER = 2e-5, 1e-4, 2e-4, 2e-3
SPACINGS = {"official": "skip", "diffusers": "even"}


def found(request: pytest.FixtureRequest, name: str) -> list[Case]:
    cases = named(request, name)
    if not cases:
        pytest.skip(f"no stored case {name} here: the larger ones come through --parity-dir")
    return cases


class TestLcmScheduler:
    """Timesteps, boundary scalings and steps of both spacings."""

    def test_timesteps(self, request: pytest.FixtureRequest):
        for case in found(request, "lcm_scheduler"):
            for name, spacing in SPACINGS.items():
                for steps, wanted in case.about[f"{name}_timesteps"].items():
                    assert lcm_timesteps(int(steps), spacing=spacing) == wanted, (name, steps)
            for key, wanted in case.about["diffusers_timesteps_strength"].items():
                steps, _, strength = key.partition("@")
                assert lcm_timesteps(int(steps), strength=float(strength)) == wanted

    def test_tables(self, request: pytest.FixtureRequest):
        for case in found(request, "lcm_scheduler"):
            io = case.io()
            assert relative_error(schedule().alphas_cumprod, io["alphas_cumprod"]) <= FORWARD
            skip, out = boundary_scalings(io["bc.timesteps"])
            assert relative_error(skip, io["bc.c_skip"]) <= FORWARD
            assert relative_error(out, io["bc.c_out"]) <= FORWARD

    def test_steps(self, request: pytest.FixtureRequest):
        for case in found(request, "lcm_scheduler"):
            io = case.io()
            for n in sorted({int(key[1:].split(".")[0]) for key in io if key.startswith("n")}):
                for name, spacing in SPACINGS.items():
                    scheduler = PixArtLCMScheduler()
                    scheduler.set_timesteps(n, spacing=spacing)
                    sample = io[f"n{n}.sample0"]
                    for i, t in enumerate(scheduler.timesteps):
                        step = scheduler.step(
                            io[f"n{n}.model_output"][i], t, sample, noise=io[f"n{n}.noise"][i]
                        )
                        assert (
                            relative_error(step.denoised, io[f"n{n}.{name}.denoised"][i]) <= FORWARD
                        )
                        if i + 1 < n or name == "diffusers":  # the official one re-noises its last
                            assert (
                                relative_error(step.prev_sample, io[f"n{n}.{name}.prev_sample"][i])
                                <= FORWARD
                            )
                        sample = step.prev_sample


class TestLcmSampling:
    """Whole few-step runs, plain and controlled."""

    def test_run(self, request: pytest.FixtureRequest):
        for case in found(request, "lcm_sampling"):
            io, about = case.io(), case.about
            base, copies = layout.split_control(case.weights())
            model = PixArtTransformer(case.model)
            load_into(model, base, source="base")
            branch = ControlBranch(case.model, ControlConfig(num_blocks=about["copy_blocks_num"]))
            load_into(branch, copies, source="branch")
            captions = PackedCaptions.from_padded(io["y"], io["mask"])
            memory = model.remember(
                captions, queries=io["latents0"][0, 0].numel() // 4, branch=branch
            )
            scheduler = PixArtLCMScheduler(
                original_inference_steps=about["original_inference_steps"]
            )
            for kind, control in (("plain", None), ("control", Control(branch, io["c"]))):
                scheduler.set_timesteps(
                    about["steps"], spacing=SPACINGS.get(about["spacing"], "even")
                )
                assert scheduler.timesteps.tolist() == about["timesteps"]
                sample = io["latents0"]
                for i, t in enumerate(scheduler.timesteps):
                    conditions = Conditions(
                        timestep=t.float().expand(len(sample)),
                        size=io["img_hw"],
                        ratio=io["aspect_ratio"],
                    )
                    with torch.no_grad():
                        eps = model(sample, memory, conditions, control=control)[:, :4]
                    step = scheduler.step(eps, t, sample, noise=io["noise"][i])
                    assert relative_error(step.denoised, io[f"{kind}.denoised"][i]) <= SAMPLING
                    sample = step.prev_sample


class TestLcmLoss:
    """One optimisation step of the official distillation."""

    def test_step(self, request: pytest.FixtureRequest):
        for case in found(request, "lcm_loss"):
            self.check(case)

    def check(self, case: Case):
        io, about = case.io(), case.about
        shape = official_config(about["model"], multi_scale=True)
        weights = case.weights()
        networks: dict[str, PixArtTransformer] = {}
        for role in ("student", "ema", "teacher"):
            own = {
                key.removeprefix(f"{role}."): x
                for key, x in weights.items()
                if key.startswith(f"{role}.")
            }
            networks[role] = PixArtTransformer(shape)
            load_into(networks[role], layout.to_diffusers(own), source=role)
        seen: dict[str, Tensor] = {}

        def network(role: str):
            def call(latents, captions, conditions, control):
                out = networks[role](latents, captions, conditions)
                seen[role] = out[:, :4].detach()
                seen[f"{role}.x"] = latents
                return out

            return call

        batch = LatentBatch(
            io["z"] * about["scale_factor"],
            PackedCaptions.from_padded(io["y"], io["mask"]),
            size=io["img_hw"],
            ratio=io["aspect_ratio"],
        )
        draws = Draws(io["noise"], torch.tensor(about["index"]))
        recipe = LcmRecipe(
            guidance=about["w"], grid_steps=about["num_ddim_timesteps"], huber_c=about["huber_c"],
            ema_decay=about["ema_decay"],
        )  # fmt: skip
        grid = solver_grid(about["num_ddim_timesteps"])
        assert torch.equal(grid.timesteps, io["solver.timesteps"])
        assert torch.equal(grid.timesteps[draws.position], io["start.timesteps"])
        assert torch.equal(grid.before[draws.position], io["end.timesteps"])
        assert relative_error(grid.alphas_cumprod_before, io["solver.alphas_cumprod_prev"]) <= 1e-9
        objective = lcm_objective(
            network("student"), network("ema"), network("teacher"), batch, draws, recipe,
            io["uncond_y"],
        )  # fmt: skip
        b = len(batch)
        assert relative_error(seen["student.x"], io["student.x_t"]) <= FORWARD
        assert relative_error(seen["student"], io["student.eps"]) <= FORWARD
        assert relative_error(seen["teacher"][:b], io["teacher_cond.eps"]) <= FORWARD
        assert relative_error(seen["teacher"][b:], io["teacher_uncond.eps"]) <= FORWARD
        assert relative_error(seen["ema.x"], io["x_prev"].float()) <= FORWARD
        assert relative_error(seen["ema"], io["ema.eps"]) <= FORWARD
        table = schedule()
        prediction, start = consistency(
            io["student.x_t"], io["student.eps"], io["start.timesteps"], table
        )
        assert relative_error(start, io["student.pred_x0"]) <= FORWARD
        assert relative_error(prediction, io["model_pred"]) <= FORWARD
        target, _ = consistency(io["x_prev"], io["ema.eps"].double(), io["end.timesteps"], table)
        assert relative_error(target, io["target"]) <= FORWARD
        assert relative_error(objective.loss, io["loss_huber"]) <= FORWARD
        l2 = lcm_objective(
            network("student"), network("ema"), network("teacher"), batch, draws,
            LcmRecipe(guidance=about["w"], loss="l2"), io["uncond_y"],
        )  # fmt: skip
        assert relative_error(l2.loss, io["loss_l2"]) <= FORWARD
        self.check_update(case, networks, objective.loss)

    def check_update(self, case: Case, networks: dict[str, PixArtTransformer], loss: Tensor):
        io, about = case.io(), case.about
        student = networks["student"]
        loss.backward()
        gradients = layout.to_official(
            {
                name: torch.zeros_like(p) if p.grad is None else p.grad
                for name, p in student.named_parameters()
            }
        )
        for key, wanted in io.items():
            if key.startswith("grad."):
                name = key.removeprefix("grad.")
                assert relative_error(gradients[name], wanted) <= GRADIENT, name
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), about["gradient_clip"])
        assert relative_error(norm, io["grad_norm_before_clip"]) <= GRADIENT
        options = about["optimizer"]
        optimizer = torch.optim.AdamW(
            student.parameters(), lr=options["lr"], betas=tuple(options["betas"]),
            weight_decay=options["weight_decay"], eps=options["eps"],
        )  # fmt: skip
        optimizer.step()
        with torch.no_grad():
            for own, new in zip(networks["ema"].parameters(), student.parameters(), strict=True):
                own.lerp_(new, 1 - about["ema_decay"])
        for prefix, role in (("student_after.", "student"), ("ema_after.", "ema")):
            after = layout.to_official(networks[role].state_dict())
            for key, wanted in io.items():
                if key.startswith(prefix):
                    name = key.removeprefix(prefix)
                    assert relative_error(after[name], wanted) <= PARAMETER, key

    def test_huber(self, request: pytest.FixtureRequest):
        for case in found(request, "lcm_loss"):
            io = case.io()
            for index, c in enumerate(case.about["huber_unit_c"]):
                value = pseudo_huber(io["huber.a"], io["huber.b"], c=c)
                assert relative_error(value, io[f"huber{index}.loss"]) <= FORWARD


def test_iddpm_loss(request: pytest.FixtureRequest):
    for case in found(request, "iddpm_loss"):
        io = case.io()
        table = schedule()
        assert relative_error(table.betas, io["betas"]) <= 1e-9
        assert relative_error(table.alphas_cumprod, io["alphas_cumprod"]) <= 1e-9
        wanted = io["posterior_log_variance_clipped"]
        assert relative_error(table.posterior_log_variance, wanted) <= 1e-9
        noisy = table.add_noise(io["x_start"], io["noise"], io["t"])
        assert relative_error(noisy, io["x_t"]) <= FORWARD
        eps = io["model_output"][:, :4]
        start = table.predict_start(io["x_t"], eps, io["t"])
        assert relative_error(start, io["pred_x0"]) <= FORWARD
        parts = diffusion_loss(
            io["model_output"], start=io["x_start"], noisy=io["x_t"], noise=io["noise"],
            timestep=io["t"], schedule=table,
        )  # fmt: skip
        assert relative_error(parts.mse, io["mse"]) <= FORWARD
        assert relative_error(parts.vb, io["vb"]) <= SAMPLING
        assert relative_error(parts.total, io["loss"]) <= SAMPLING


def generated_weights(about: dict) -> dict[str, Tensor]:
    """The edge detector's weights from their recipe."""
    out: dict[str, Tensor] = {}
    mask = (1 << 64) - 1
    with np.errstate(over="ignore"):
        for j, (key, shape) in enumerate(zip(about["keys_in_order"], about["shapes"], strict=True)):
            count = int(np.prod(shape))
            offset = np.uint64(((about["seed"] + j + 1) * 0x9E3779B97F4A7C15) & mask)
            x = np.arange(count, dtype=np.uint64) + offset
            x ^= x >> np.uint64(30)
            x *= np.uint64(0xBF58476D1CE4E5B9)
            x ^= x >> np.uint64(27)
            x *= np.uint64(0x94D049BB133111EB)
            x ^= x >> np.uint64(31)
            u = 2 * ((x >> np.uint64(11)).astype(np.float64) / 2**53) - 1
            fan = max(int(np.prod(shape[1:])), 1)
            if key == "norm":
                u = np.array([123.0, 117.0, 104.0])
            elif key.endswith("bias"):
                u = 0.1 * u
            elif "projection" in key:
                u = 0.03 * u / np.sqrt(fan)
            else:
                u = u * np.sqrt(6 / fan)
            out[key] = torch.from_numpy(u.reshape(shape).astype(np.float32))
    return out


def test_hed(request: pytest.FixtureRequest):
    for case in found(request, "hed"):
        io = case.io()
        weights = generated_weights(case.about)
        sums = torch.stack([x.double().sum() for x in weights.values()])
        assert relative_error(sums, io["weight_check"]) <= 1e-5
        network = HedNetwork().eval()
        load_into(network, weights, source="recipe")
        with torch.no_grad():
            maps = network(io["image"])
        for index, side in enumerate(maps.sides, start=1):
            assert relative_error(side, io[f"projection{index}"]) <= SAMPLING
        assert relative_error(maps.edge, io["edge"]) <= SAMPLING


class TestLora:
    """Adapters merged into the weights."""

    def test_output(self, request: pytest.FixtureRequest):
        for case in found(request, "lora"):
            io, about = case.io(), case.about
            model = PixArtTransformer(read_diffusers_config(about["config_diffusers"])).eval()
            load_into(model, case.weights("weights_diffusers"), source="base")
            before = {name: x.clone() for name, x in model.state_dict().items()}
            adapter = read_adapter(
                case.folder / "adapter_model.safetensors",
                alpha=about["adapter_config"]["lora_alpha"],
            )
            assert sorted(adapter.factors) == about["targeted_modules"]
            assert next(iter(adapter.factors.values())).scale == about["scaling"]
            latents, captions, conditions = inputs(io)
            with torch.no_grad():
                assert (
                    relative_error(model(latents, captions, conditions), io["out_base"]) <= FORWARD
                )
                adapters = Adapters(model)
                adapters.add("stored", adapter)
                out = model(latents, captions, conditions)
            assert relative_error(out, io["out_lora"]) <= FORWARD
            adapters.remove("stored")
            assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


def test_prompt_cleaning(request: pytest.FixtureRequest):
    stored = [
        row
        for folder in case_folders(request, "pixart_delta")
        for path in sorted(folder.glob("text_cleaning*/cases.json"))
        for row in json.loads(path.read_text(encoding="utf-8"))
    ]
    for row in stored:
        assert clean_once(row["input"]) == row["cleaned_once"]
        assert clean_prompt(row["input"]) == row["cleaned"]
        assert clean_prompt(row["input"], cleaning=False) == row["no_clean"]


class TestAspectRatios:
    """Bucket tables, nearest buckets and prompt flags."""

    def test_tables(self, request: pytest.FixtureRequest):
        for folder in case_folders(request, "pixart_delta"):
            for path in folder.glob("aspect_ratios*/tables.json"):
                tables = json.loads(path.read_text())
                for kind, by_size in tables.items():
                    for size, table in by_size.items():
                        own = buckets(int(size), training=kind == "train")
                        assert {b.key: [b.height, b.width] for b in own} == table

    def test_nearest(self, request: pytest.FixtureRequest):
        for folder in case_folders(request, "pixart_delta"):
            for path in folder.glob("aspect_ratios*/closest.json"):
                for row in json.loads(path.read_text()):
                    for key, (ratio, size) in (
                        (key, value) for key, value in row.items() if "_" in key
                    ):
                        kind, _, side = key.partition("_")
                        own = nearest_bucket(
                            row["h"], row["w"], int(side), training=kind == "train"
                        )
                        assert (own.key, [own.height, own.width]) == (ratio, size)

    def test_flags(self, request: pytest.FixtureRequest):
        for folder in case_folders(request, "pixart_delta"):
            for path in folder.glob("aspect_ratios*/prompt_flags.json"):
                for row in json.loads(path.read_text()):
                    own = prompt_flags(row["prompt"])
                    assert own.prompt == row["clean"]
                    assert [own.bucket.height, own.bucket.width] == row["hw"]
                    assert own.bucket.ratio == row["aspect_ratio"]
                    assert list(own.size) == row["custom_hw"]
