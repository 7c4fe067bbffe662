"""Schedulers: few-step consistency sampling, and which of diffusers' others fit PixArt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from polyzoo.core.errors import ConfigError
from polyzoo.pixart_delta.config import BETA_END, BETA_START, TRAIN_STEPS
from polyzoo.pixart_delta.diffusion import schedule
from polyzoo.pixart_delta.lcm import (
    GRID_STEPS,
    SIGMA_DATA,
    TIMESTEP_SCALING,
    Spacing,
    lcm_timesteps,
)

SchedulerName = Literal["lcm", "dpm", "ddim"]
MOST_STEPS = 50
_BETAS = {
    "beta_start": BETA_START,
    "beta_end": BETA_END,
    "beta_schedule": "linear",
    "num_train_timesteps": TRAIN_STEPS,
}


@dataclass(frozen=True)
class LcmStep:
    """What one step gives."""

    prev_sample: Tensor
    """Where the next step starts."""
    denoised: Tensor
    """The clean latents as this step sees them; the result after the last one."""


@dataclass(frozen=True)
class _Point:
    """Coefficients of one step, as plain numbers: no step waits for the device."""

    timestep: int
    signal: float
    noise: float
    skip: float
    out: float


class PixArtLCMScheduler(SchedulerMixin, ConfigMixin):
    """Latent-consistency sampling in 1 to 50 steps, on PixArt's linear betas (section 5.4).

    Example:
        >>> scheduler = PixArtLCMScheduler()
        >>> scheduler.set_timesteps(4)
        >>> scheduler.timesteps.tolist()
        [999, 759, 499, 259]
    """

    config_name = "scheduler_config.json"
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = TRAIN_STEPS,
        beta_start: float = BETA_START,
        beta_end: float = BETA_END,
        beta_schedule: str = "linear",
        original_inference_steps: int = GRID_STEPS,  # noqa: ARG002 - read from self.config
        prediction_type: str = "epsilon",
        timestep_spacing: str = "even",  # noqa: ARG002 - read from self.config
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        given = {
            "num_train_timesteps": num_train_timesteps,
            "beta_start": beta_start,
            "beta_end": beta_end,
            "beta_schedule": beta_schedule,
        }
        check_betas(given, "PixArtLCMScheduler")
        if rescale_betas_zero_snr:
            raise ConfigError("rescale_betas_zero_snr=True: PixArt was trained without it")
        if prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise ConfigError(
                f"prediction_type={prediction_type!r} must be epsilon, sample or v_prediction"
            )
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.zeros(0, dtype=torch.int64)
        self._points: tuple[_Point, ...] = ()
        self._index = 0

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        *,
        timesteps: Sequence[int] | None = None,
        spacing: Spacing | None = None,
        strength: float = 1.0,
    ) -> None:
        """Choose the steps of a run.

        Args:
            num_inference_steps: 1 to 50; 2 to 8 are of use.
            device: Of `timesteps`.
            timesteps: The steps themselves instead, descending.
            spacing: "even" or "skip"; the configuration's where not given.
            strength: Share of the grid used, for image-to-image.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ConfigError("give num_inference_steps or timesteps, one of them")
        if timesteps is None:
            chosen = spacing or self.config["timestep_spacing"]
            if chosen not in ("even", "skip"):
                chosen = "even"  # other libraries' names for what they only do evenly
            points = lcm_timesteps(
                num_inference_steps or 0,
                spacing=chosen,
                grid_steps=self.config["original_inference_steps"],
                strength=strength,
            )
        else:
            points = [int(t) for t in timesteps]
            falling = all(a > b for a, b in pairwise(points))
            if not points or not falling or points[0] >= TRAIN_STEPS or points[-1] < 0:
                raise ConfigError(
                    f"timesteps={points} must fall from at most {TRAIN_STEPS - 1} to at least 0"
                )
        self.num_inference_steps = len(points)
        self.timesteps = torch.tensor(points, device=device)
        table = schedule().alphas_cumprod.float()  # as the published scheduler rounds it
        self._points = tuple(_point(t, float(table[t])) for t in points)
        self._index = 0

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:  # noqa: ARG002
        """Return the sample: consistency models take it as it is."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor | None,
        sample: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        *,
        noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> LcmStep | tuple[Tensor, Tensor]:
        """Go from one step's sample to the next one's.

        Args:
            model_output: The network's prediction.
            timestep: Which step; None for the one after the last call's.
            sample: x_t.
            generator: Draws the noise that is put back in; one for each image makes an image
                independent of its batch.
            noise: That noise itself.
            return_dict: False gives a tuple, as diffusers' schedulers do.
        """
        if not self._points:
            raise ConfigError("call set_timesteps before step")
        index = self._index if timestep is None else self._find(int(timestep))
        point = self._points[index]
        start = self._start(model_output.float(), sample.float(), point)
        denoised = point.out * start + point.skip * sample.float()
        if index + 1 < len(self._points):
            following = self._points[index + 1]
            if noise is None:
                noise = draw_like(denoised, generator)
            previous = following.signal * denoised + following.noise * noise.float()
        else:
            previous = denoised
        self._index = index + 1
        made = LcmStep(previous.to(sample.dtype), denoised.to(sample.dtype))
        return made if return_dict else (made.prev_sample, made.denoised)

    def add_noise(self, original: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t of clean latents."""
        return schedule(original.device).add_noise(original, noise, timesteps).to(original.dtype)

    def renoised(self, denoised: Tensor, noise: Tensor, after: int) -> Tensor:
        """Clean latents at the noise of the step after index `after`; clean after the last."""
        if after + 1 >= len(self._points):
            return denoised
        point = self._points[after + 1]
        return (point.signal * denoised.float() + point.noise * noise.float()).to(denoised.dtype)

    def _start(self, output: Tensor, sample: Tensor, point: _Point) -> Tensor:
        kind = self.config["prediction_type"]
        if kind == "epsilon":
            return (sample - point.noise * output) / point.signal
        if kind == "sample":
            return output
        return point.signal * sample - point.noise * output

    def _find(self, timestep: int) -> int:
        for index, point in enumerate(self._points):
            if point.timestep == timestep:
                return index
        steps = [point.timestep for point in self._points]
        raise ConfigError(f"timestep={timestep} is not one of this run's steps {steps}")


def _point(timestep: int, kept: float) -> _Point:
    scaled = timestep * TIMESTEP_SCALING
    square = scaled**2 + SIGMA_DATA**2
    return _Point(
        timestep, kept**0.5, (1 - kept) ** 0.5, SIGMA_DATA**2 / square, scaled / square**0.5
    )


def draw_like(
    sample: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None
) -> Tensor:
    """Normal noise like a batch; from one generator an image where several are given.

    Drawn on the generator's device, so that a seed means the same everywhere.
    """
    if isinstance(generator, Sequence):
        if len(generator) != len(sample):
            raise ConfigError(
                f"{len(generator)} generators for {len(sample)} images: give one each"
            )
        rows = [draw_like(sample[:1], own) for own in generator]
        return torch.cat(rows)
    place = generator.device if generator is not None else sample.device
    noise = torch.randn(sample.shape, generator=generator, device=place, dtype=torch.float32)
    return noise.to(sample.device)


def check_betas(config: Mapping[str, Any], name: str, *, force: bool = False) -> None:
    """Refuse a scheduler with other betas than PixArt was trained with.

    Raises:
        ConfigError: They differ, such as Stable Diffusion's scaled_linear ones.
    """
    if force:
        return
    for key, wanted in _BETAS.items():
        value = config.get(key, wanted)
        same = value == wanted if isinstance(wanted, str) else abs(value - wanted) < 1e-9
        if not same:
            raise ConfigError(
                f"{name}: {key}={value!r}, but PixArt was trained with {wanted!r}; with other "
                "betas images look washed out. Take the scheduler of a PixArt folder, or "
                "force_scheduler=True if the model was trained so"
            )


def make_scheduler(name: SchedulerName, config: Mapping[str, Any] | None = None) -> Any:
    """Build a scheduler by name.

    Args:
        name: lcm, dpm (DPM-Solver++ 2M) or ddim.
        config: A stored configuration, for the lcm scheduler's grid.
    """
    if name == "lcm":
        known = {
            key: value
            for key, value in (config or {}).items()
            if key in ("original_inference_steps", "prediction_type", *_BETAS)
        }
        return PixArtLCMScheduler(**known)
    if name == "dpm":
        return DPMSolverMultistepScheduler(
            **_BETAS, algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="linspace"
        )
    if name == "ddim":
        return DDIMScheduler(
            **_BETAS, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
        )
    raise ConfigError(f"scheduler={name!r} must be lcm, dpm or ddim")


def check_steps(name: str, steps: int) -> None:
    """Refuse a number of steps out of range.

    Raises:
        ConfigError: Names the range.
    """
    most = MOST_STEPS if name == "lcm" else TRAIN_STEPS
    if not 1 <= steps <= most:
        use = "; 2 to 8 are of use" if name == "lcm" else ""
        raise ConfigError(f"steps={steps} must be 1 to {most} with scheduler={name}{use}")
