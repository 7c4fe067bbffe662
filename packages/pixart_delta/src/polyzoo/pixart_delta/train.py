"""The `train` command: parts from a recipe, handed to the training engine."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from polyzoo.core.errors import ConfigError, WeightsError
from polyzoo.core.log import get_logger
from polyzoo.core.seeding import seed_everything
from polyzoo.pixart_delta.blocks import PixArtBlock
from polyzoo.pixart_delta.control import Control, ControlBranch
from polyzoo.pixart_delta.folders import (
    load_transformer,
    save_control,
    save_transformer,
    save_vae,
)
from polyzoo.pixart_delta.icons import to_unit
from polyzoo.pixart_delta.material import Material, gather, save_material
from polyzoo.pixart_delta.model import Conditions, PixArtTransformer
from polyzoo.pixart_delta.objectives import (
    STEPS,
    Network,
    draw,
    lcm_objective,
    noise_objective,
)
from polyzoo.pixart_delta.presets import PixArtTrainConfig
from polyzoo.pixart_delta.vae import load_vae, small_vae, whiten
from polyzoo.pixart_delta.vae_loss import psnr, vae_objective
from polyzoo.training import StepContext, StepOutput, Trainer, TrainResult

_log = get_logger(__name__)


@dataclass(frozen=True)
class PixArtTrainReport:
    """A finished training."""

    task: str
    out: str
    """Folder of the model."""
    run_dir: str
    steps: int
    images: int
    figures: dict[str, float]
    """What the task measures at its end, such as the autoencoder's PSNR."""


class Distilled(nn.Module):
    """A student, and its average as buffers: saved with a run, not trained by it."""

    def __init__(self, student: PixArtTransformer) -> None:
        super().__init__()
        self.student = student
        self.target = as_buffers(copy.deepcopy(student))

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move the average toward the student."""
        own = [p.data for p in self.student.parameters()]
        buffers = dict(self.target.named_buffers())
        average = [buffers[name] for name, _ in self.student.named_parameters()]
        torch._foreach_lerp_(average, own, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]


def as_buffers(module: PixArtTransformer) -> PixArtTransformer:
    """Turn every parameter of a network into a buffer, in place."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                del part._parameters[name]
                part.register_buffer(name, parameter.data)
    return module


def main(config: PixArtTrainConfig) -> PixArtTrainReport:
    """Run the command; the same call resumes an interrupted run."""
    seed_everything(config.train.seed)
    recipe = with_auto_lr(config)
    if config.task in ("lcm", "lcm-lora", "controlnet"):
        _start(config)
    material = gather(config)
    runner = {
        "vae": _train_vae,
        "base": _train_base,
        "lcm": _train_lcm,
        "lcm-lora": _train_lora,
        "controlnet": _train_control,
    }[config.task]
    result, figures = runner(replace(config, train=recipe), material)
    return PixArtTrainReport(
        task=config.task,
        out=str(config.out),
        run_dir=str(result.run_dir),
        steps=result.step,
        images=material.count,
        figures=figures,
    )


def with_auto_lr(config: PixArtTrainConfig) -> Any:
    """The run, its learning rate scaled where the recipe asks for it."""
    run = config.train
    if config.auto_lr == "none":
        return run
    factor = math.sqrt(run.batch_size * run.grad_accum / 256)
    return replace(run, optim=replace(run.optim, lr=run.optim.lr * factor))


def _train_vae(
    config: PixArtTrainConfig, material: Material
) -> tuple[TrainResult, dict[str, float]]:
    pictures = material.frozen["data"]

    def build() -> AutoencoderKL:
        vae = small_vae()
        if config.start is not None and (config.start / "vae").is_dir():
            vae = load_vae(config.start / "vae").float().train()
        if config.compile:
            vae.encoder.compile()
            vae.decoder.compile()
        return vae

    def step(model: Any, indices: Tensor, ctx: StepContext) -> StepOutput:
        generator = ctx.generator
        images = to_unit(ctx.frozen["data"].images[indices])  # pyright: ignore[reportIndexIssue]
        flip = torch.rand(len(images), generator=generator, device=ctx.device) < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(3), images)
        objective = vae_objective(model, images, generator, config.vae)
        return StepOutput(loss=objective.loss, metrics=objective.metrics)

    result = _fit(config, material, build, step)
    vae: Any = result.model
    vae.eval().float()
    for part in (vae.encoder, vae.decoder):
        part._compiled_call_impl = None  # a last look is not worth compiling for
    device = next(vae.parameters()).device
    held = material.held.to(device)
    with torch.no_grad():
        means = torch.cat(
            [
                vae.encode(to_unit(part)).latent_dist.mean
                for part in pictures.images.to(device).split(256)
            ]  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        )
        whiten(vae, means.mean((0, 2, 3)), means.std((0, 2, 3)))
    figures = {"psnr": psnr(vae, held)}
    save_vae(config.out, vae.cpu())
    return result, figures


def _train_base(
    config: PixArtTrainConfig, material: Material
) -> tuple[TrainResult, dict[str, float]]:
    def build() -> PixArtTransformer:
        if config.start is not None:
            model, _ = load_transformer(config.start / "transformer")
            model = model.float()
        else:
            model = PixArtTransformer(config.model)
        return compiled(model, config)

    def step(model: Any, data: Any, ctx: StepContext) -> StepOutput:
        generator = ctx.generator  # a fresh one each time it is asked for: ask once
        batch = material.batch(data, ctx.frozen, generator)
        draws = draw(
            batch, generator, positions=STEPS, caption_dropout=config.noise.caption_dropout
        )
        objective = noise_objective(
            network_of(model), batch, draws, config.noise, _null(material, config.noise.null, batch)
        )
        return StepOutput(loss=objective.loss, metrics=objective.metrics)

    result = _fit(config, material, build, step)
    save_material(config.out, material)
    save_transformer(config.out, _plain(result.model), int8=config.int8)
    return result, {}


def _train_lcm(
    config: PixArtTrainConfig, material: Material
) -> tuple[TrainResult, dict[str, float]]:
    recipe = config.lcm

    def build() -> Distilled:
        student, _ = load_transformer(_start(config) / "transformer")
        made = Distilled(student.float())
        compiled(made.student, config)
        compiled(made.target, config)
        return made

    def teacher() -> PixArtTransformer:
        return compiled(load_transformer(_start(config) / "transformer")[0], config)

    def step(model: Any, data: Any, ctx: StepContext) -> StepOutput:
        if ctx.step and not ctx.micro_step:
            model.follow(recipe.ema_decay)
        generator = ctx.generator  # a fresh one each time it is asked for: ask once
        batch = material.batch(data, ctx.frozen, generator)
        draws = draw(
            batch, generator, positions=recipe.grid_steps,
            caption_dropout=recipe.caption_dropout,
        )  # fmt: skip
        objective = lcm_objective(
            network_of(model.student), network_of(model.target),
            network_of(ctx.frozen["teacher"]), batch, draws, recipe,
            _null(material, recipe.null, batch),
        )  # fmt: skip
        return StepOutput(loss=objective.loss)

    result = _fit(config, material, build, step, {"teacher": teacher})
    made: Any = result.model
    made.follow(recipe.ema_decay)
    student = made.student
    save_material(config.out, material)
    save_transformer(
        Path(f"{config.out}-student"), _plain(copy.deepcopy(student)), kind="lcm", int8=config.int8
    )
    average = dict(made.target.named_buffers())
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(average[name])
    save_transformer(config.out, _plain(student), kind="lcm", int8=config.int8)
    return result, {}


def _train_lora(
    config: PixArtTrainConfig, material: Material
) -> tuple[TrainResult, dict[str, float]]:
    recipe = config.lcm

    def build() -> PixArtTransformer:
        return load_transformer(_start(config) / "transformer")[0]

    def step(model: Any, data: Any, ctx: StepContext) -> StepOutput:
        if config.compile and "denoise" not in vars(model.get_base_model()):
            compiled(model.get_base_model(), config)
        generator = ctx.generator  # a fresh one each time it is asked for: ask once
        batch = material.batch(data, ctx.frozen, generator)
        draws = draw(
            batch, generator, positions=recipe.grid_steps,
            caption_dropout=recipe.caption_dropout,
        )  # fmt: skip
        network = network_of(model.get_base_model())

        def teacher(*arguments: Any) -> Tensor:
            return network_of(ctx.frozen["teacher"])(*arguments)

        objective = lcm_objective(
            network, network, teacher, batch, draws, recipe, _null(material, recipe.null, batch)
        )
        return StepOutput(loss=objective.loss)

    def base() -> PixArtTransformer:
        return compiled(build(), config)

    result = _fit(config, material, build, step, {"teacher": base})
    save_adapter(config.out / "lora" / "lcm", result.model, config)
    return result, {}


def _train_control(
    config: PixArtTrainConfig, material: Material
) -> tuple[TrainResult, dict[str, float]]:
    def base() -> PixArtTransformer:
        return compiled(load_transformer(_start(config) / "transformer")[0], config)

    def build() -> ControlBranch:
        model, _ = load_transformer(_start(config) / "transformer")
        return ControlBranch.copy_of(model.float(), config.control)

    def step(model: Any, data: Any, ctx: StepContext) -> StepOutput:
        generator = ctx.generator  # a fresh one each time it is asked for: ask once
        batch = material.batch(data, ctx.frozen, generator)
        network = network_of(ctx.frozen["base"], model)
        if config.control_objective == "noise":
            draws = draw(
                batch, generator, positions=STEPS, caption_dropout=config.noise.caption_dropout
            )
            null = _null(material, config.noise.null, batch)
            objective = noise_objective(network, batch, draws, config.noise, null)
        else:
            recipe = config.lcm
            draws = draw(
                batch, generator, positions=recipe.grid_steps,
                caption_dropout=recipe.caption_dropout,
            )  # fmt: skip
            null = _null(material, recipe.null, batch)
            objective = lcm_objective(network, network, network, batch, draws, recipe, null)
        return StepOutput(loss=objective.loss, metrics=objective.metrics)

    result = _fit(config, material, build, step, {"base": base})
    branch: Any = result.model
    save_control(config.out, branch.cpu(), int8=config.int8)
    return result, {}


def _fit(
    config: PixArtTrainConfig,
    material: Material,
    build: Callable[[], nn.Module],
    step: Callable[[Any, Any, StepContext], StepOutput],
    frozen: dict[str, Any] | None = None,
) -> TrainResult:
    return Trainer(config.train).fit(
        model=build,
        step_fn=step,
        train_data=material.dataset,
        collate=material.collate,
        frozen={**material.frozen, **(frozen or {})},
        checkpoint_blocks=(PixArtBlock,),
    )


def network_of(model: Any, branch: Any = None) -> Network:
    """A transformer, with a control branch where one is trained, as the objectives call it."""

    def network(
        latents: Tensor, captions: Any, conditions: Conditions, control: Tensor | None
    ) -> Tensor:
        given = None
        if branch is not None:
            if control is None:
                raise ConfigError("task='controlnet' needs data with control features")
            given = Control(branch, control)
        return model(latents, captions, conditions, control=given)

    return network


def compiled(model: PixArtTransformer, config: PixArtTrainConfig) -> PixArtTransformer:
    """Compile the tensor work of a transformer where the recipe asks for it."""
    if config.compile:
        model.denoise = torch.compile(model.denoise)
    return model


def save_adapter(folder: Path, model: Any, config: PixArtTrainConfig) -> None:
    """Write adapters in peft's layout, and for which base they were trained."""
    from polyzoo.training.lora import write_adapter

    write_adapter(folder, model, metadata={"polyzoo.kind": "lcm", "base": str(config.start)})


def _plain(model: Any) -> PixArtTransformer:
    vars(model).pop("denoise", None)
    return model.cpu().float()


def _start(config: PixArtTrainConfig) -> Path:
    assert config.start is not None  # noqa: S101 - checked by the config
    if not (config.start / "transformer").is_dir():
        raise WeightsError(
            f"{config.start}: holds no transformer folder; train or convert the base model first"
        )
    return config.start


def _null(material: Material, kind: str, batch: Any) -> Tensor:
    null = material.empty if kind == "empty" else material.null
    if null is None:
        raise ConfigError(
            "null='empty' needs the encoding of the empty prompt, which these data do not hold; "
            "extract it, or use null='learned'"
        )
    return null.to(batch.latents.device)


def render(report: PixArtTrainReport) -> str:
    """The report for people."""
    figures = "".join(f", {name} {value:.3f}" for name, value in report.figures.items())
    return f"{report.out}: {report.task}, {report.steps} steps on {report.images} images{figures}"
