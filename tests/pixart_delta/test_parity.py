"""Stored results of the official classes. `--parity-dir DIR` takes further cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from polyzoo.core.weights import load_into
from polyzoo.pixart_delta import layout
from polyzoo.pixart_delta.config import ControlConfig
from polyzoo.pixart_delta.control import Control, ControlBranch
from polyzoo.pixart_delta.model import PixArtTransformer, diffusers_config
from support.pixart_models import Case, cases, inputs, loaded, relative_error

FORWARD = 2e-5


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model_case" in metafunc.fixturenames:
        found = [
            (case, layout_name)
            for case in cases(metafunc.config, has="config.json")
            if {"class", "model"} <= case.about.keys()
            and (case.folder / "io.safetensors").is_file()
            and "out" in case.io()
            for layout_name in ("official", "diffusers")
        ]  # fmt: skip
        if not found:
            reason = "stored whole models are too large for the repository: use --parity-dir"
            metafunc.parametrize(
                "model_case", [pytest.param(None, marks=pytest.mark.skip(reason=reason))]
            )
            return
        metafunc.parametrize(
            "model_case", found, ids=[f"{case.folder.name}-{name}" for case, name in found]
        )


def parts(case: Case, layout_name: str) -> tuple[PixArtTransformer, ControlBranch | None]:
    """Transformer and branch of a case, from one of its weight files."""
    official = case.weights()
    branch_weights: dict[str, Tensor] = {}
    if "copy_blocks_num" in case.about:
        base, branch_weights = layout.split_control(official)
    else:
        base = layout.to_diffusers(official)
    if layout_name == "diffusers":
        for name in ("weights_diffusers", "weights_diffusers_controlnet"):
            if (case.folder / f"{name}.safetensors").is_file():
                stored = case.weights(name)
                if name == "weights_diffusers":
                    base = stored
                else:
                    branch_weights = stored
    model = loaded(case, base)
    if not branch_weights:
        return model, None
    branch = ControlBranch(case.model, ControlConfig(num_blocks=case.about["copy_blocks_num"]))
    load_into(branch, branch_weights, source="branch")
    return model, branch.eval()


class TestModels:
    """Single-scale and MS models, with and without the control branch."""

    def test_output(self, model_case: tuple[Case, str]):
        case, name = model_case
        model, branch = parts(case, name)
        io = case.io()
        latents, captions, conditions = inputs(io)
        control = Control(branch, io["c"]) if branch is not None else None
        with torch.no_grad():
            out = model(latents, captions, conditions, control=control)
            plain = model(latents, captions, conditions)
        assert relative_error(out, io["out"]) <= FORWARD
        if "out_c_none" in io:
            assert relative_error(plain, io["out_c_none"]) <= FORWARD
        if "out_nomask" in io:
            latents, captions, conditions = inputs(io, masked=False)
            with torch.no_grad():
                out = model(latents, captions, conditions)
            assert relative_error(out, io["out_nomask"]) <= FORWARD
        if "out_square_crop" in io:
            latents, captions, conditions = inputs(io)
            side = min(latents.shape[2:])
            with torch.no_grad():
                out = model(latents[:, :, :side, :side], captions, conditions)
            assert relative_error(out, io["out_square_crop"]) <= FORWARD

    def test_guidance_with_the_learned_null_caption(self, model_case: tuple[Case, str]):
        case, name = model_case
        io = case.io()
        if "out_cfg_eps" not in io:
            return
        model, _ = parts(case, name)
        latents, captions, conditions = inputs(io)
        null = case.weights()[layout.NULL_CAPTION][None].expand(len(latents), -1, -1)
        _, uncond, _ = inputs({**io, "y": null})
        with torch.no_grad():
            c = model(latents, captions, conditions)[:, :4]
            u = model(latents, uncond, conditions)[:, :4]
        assert relative_error(u + case.about["cfg_scale"] * (c - u), io["out_cfg_eps"]) <= FORWARD

    def test_activations(self, model_case: tuple[Case, str]):
        case, name = model_case
        model, branch = parts(case, name)
        io = case.io()
        seen = watched(model, branch)
        latents, captions, conditions = inputs(io)
        control = Control(branch, io["c"]) if branch is not None else None
        with torch.no_grad():
            model(latents, captions, conditions, control=control)
        wanted = {key.removeprefix("act."): x for key, x in io.items() if key.startswith("act.")}
        assert wanted
        for key, tensor in wanted.items():
            found = seen[key]
            if key == "y_embedder":  # ours has no padding
                tensor = tensor[:, 0][io["mask"].reshape(len(tensor), -1).bool()]
            if key == "csize_embedder":
                found = found.view(len(tensor), -1)
            assert relative_error(found, tensor) <= FORWARD, key

    def test_positions(self, model_case: tuple[Case, str]):
        case, name = model_case
        model, _ = parts(case, name)
        io = case.io()
        for key in ("pos_embed", "pos_embed_nonsquare"):
            if key in io:
                rows, columns = (side // 2 for side in io["x"].shape[2:])
                found = model.position(rows, columns, torch.device("cpu"))
                assert relative_error(found[None], io[key]) <= 1e-6


class TestLayouts:
    """Both weight layouts, into each other and into diffusers' own class."""

    def test_round_trip_is_exact(self, model_case: tuple[Case, str]):
        case, _ = model_case
        official = case.weights()
        if "copy_blocks_num" in case.about:
            base, branch = layout.split_control(official)
            back = layout.join_control(branch, base)
            null = official.get(f"base_model.{layout.NULL_CAPTION}")
            if null is not None:
                back[f"base_model.{layout.NULL_CAPTION}"] = null
            dropped = {f"base_model.{layout.POSITIONS}"}
        else:
            null = official.get(layout.NULL_CAPTION)
            back = layout.to_official(layout.to_diffusers(official), null_caption=null)
            dropped = {layout.POSITIONS}
        assert back.keys() == official.keys() - dropped
        assert all(torch.equal(back[name], official[name]) for name in back)

    def test_diffusers_class_takes_ours(self, model_case: tuple[Case, str]):
        case, name = model_case
        model, _ = parts(case, name)
        config = diffusers_config(case.model)
        other = PixArtTransformer2DModel.from_config(config).eval()
        other.load_state_dict(model.state_dict(), strict=True)
        io = case.io()
        latents, captions, conditions = inputs(io)
        square = latents.shape[2] == latents.shape[3]
        with torch.no_grad():
            theirs = other(
                latents,
                encoder_hidden_states=io["y"][:, 0],
                timestep=io["timestep"],
                encoder_attention_mask=io["mask"][:, 0, 0],
                added_cond_kwargs={
                    "resolution": io.get("img_hw"),
                    "aspect_ratio": io.get("aspect_ratio"),
                },
                return_dict=False,
            )[0]  # fmt: skip
            ours = model(latents, captions, conditions)
        assert square or case.model.multi_scale
        assert relative_error(ours, theirs) <= FORWARD


def watched(model: PixArtTransformer, branch: ControlBranch | None) -> dict[str, Tensor]:
    """Collect activations under their stored names."""
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, name: str, pick: Any = lambda out: out) -> None:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            seen.setdefault(name, pick(out))  # the control latent passes the same embedding later

        module.register_forward_hook(hook)

    keep(model.pos_embed, "x_embedder")
    keep(model.adaln_single.emb.timestep_embedder, "t_embedder")
    if model.shape.multi_scale:
        keep(model.adaln_single.emb.resolution_embedder, "csize_embedder")
        keep(model.adaln_single.emb.aspect_ratio_embedder, "ar_embedder")
    keep(model.adaln_single, "t_block", lambda out: out[0])
    keep(model.caption_projection, "y_embedder")
    for index, block in enumerate(model.transformer_blocks):
        keep(block, f"block{index}.out")
        if index == 0:
            keep(block.attn1, "block0.attn")
            keep(block.attn2, "block0.cross_attn")
            keep(block.ff, "block0.mlp")
    keep(model.proj_out, "final_layer")
    if branch is not None:
        for index, block in enumerate(branch.controlnet_blocks):
            keep(block, f"control{index}.c", lambda out: out[0])
            keep(block, f"control{index}.c_skip", lambda out: out[1])

            def tokens(_: nn.Module, arguments: Any) -> None:
                seen.setdefault("control_tokens", arguments[1])

            if index == 0:
                block.register_forward_pre_hook(tokens)
    return seen
