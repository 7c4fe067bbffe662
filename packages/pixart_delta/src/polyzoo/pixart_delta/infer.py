"""The `infer` command."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyzoo.core.errors import DataError, UsageError
from polyzoo.pixart_delta.buckets import RESOLUTIONS, prompt_flags
from polyzoo.pixart_delta.options import InferConfig
from polyzoo.pixart_delta.pipeline import PixArtDeltaPipeline, PixArtOutput
from polyzoo.pixart_delta.record import save_png

_FIELDS = {"prompt", "seed", "height", "width", "negative_prompt", "name"}


@dataclass(frozen=True)
class InferReport:
    """Images on disk."""

    images: list[str]
    seconds: dict[str, float] = field(default_factory=dict)
    peak_gib: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One image to draw."""

    prompt: str
    seed: int
    height: int | None
    width: int | None
    negative: str | None
    path: Path
    size: tuple[float, float] | None = None


def main(config: InferConfig) -> InferReport:
    """Run the command."""
    jobs = list(_jobs(config))
    pipe = PixArtDeltaPipeline.from_pretrained(
        config.model, dtype=config.dtype, device=config.device, memory=config.memory,
        compile=config.compile, controlnet=config.controlnet, hed=config.hed, vae=config.vae,
        text=config.text, lora=config.lora,
    )  # fmt: skip
    jobs = [_with_flags(job, pipe) for job in jobs]
    paths: list[str] = []
    seconds: dict[str, float] = {}
    peaks: dict[str, float] = {}
    for group in _groups(jobs, config.batch):
        made = _draw(pipe, config, group)
        assert isinstance(made.images, list)  # noqa: S101 - output_type is pil
        for job, picture, record in zip(group, made.images, made.records, strict=True):
            job.path.parent.mkdir(parents=True, exist_ok=True)
            save_png(picture, job.path, record)
            paths.append(str(job.path))
        for name, value in made.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + value
        for name, value in made.peak_bytes.items():
            peaks[name] = max(peaks.get(name, 0.0), value / 2**30)
    return InferReport(
        paths,
        {name: round(value, 4) for name, value in seconds.items()},
        {name: round(value, 3) for name, value in peaks.items()},
    )


def render(report: InferReport) -> str:
    """The report for people."""
    lines = list(report.images)
    for name, value in report.seconds.items():
        memory = report.peak_gib.get(name)
        peak = f", peak {memory:.2f} GiB" if memory is not None else ""
        lines.append(f"{name}: {value:.3f} s{peak}")
    return "\n".join(lines)


def _draw(pipe: PixArtDeltaPipeline, config: InferConfig, group: list[Job]) -> PixArtOutput:
    first = group[0]
    negatives = [job.negative or "" for job in group]
    return pipe(
        [job.prompt for job in group],
        negative_prompt=negatives if any(negatives) else None,
        seed=[job.seed for job in group],
        num_inference_steps=config.steps,
        guidance_scale=config.guidance,
        scheduler=config.scheduler,
        spacing=config.spacing,
        height=first.height,
        width=first.width,
        original_size=first.size,
        use_resolution_binning=not config.exact,
        image=config.image,
        mask_image=config.mask,
        strength=config.strength,
        control_image=config.control,
        control_type=config.control_type,
        control_scale=config.control_scale,
        control_start=config.control_start,
        control_end=config.control_end,
        profile=config.profile,
    )


def _jobs(config: InferConfig) -> Iterator[Job]:
    rows: list[dict[str, Any]] = [{"prompt": config.prompt}]
    if config.prompts is not None:
        rows = list(_read_prompts(config.prompts))
    single = config.prompts is None and config.count == 1
    if not single and config.out.suffix:
        raise UsageError(f"--out {config.out}: several images go into a folder; give its name")
    if single and config.out.suffix.lower() != ".png":
        raise UsageError(f"--out {config.out}: the name must end in .png")
    number = 0
    for row in rows:
        for copy in range(config.count):
            seed = row.get("seed", config.seed + (number if "seed" not in row else 0))
            name = row.get("name") or f"{number:04d}-{_slug(row['prompt'])}"
            if config.count > 1 and row.get("name"):
                name = f"{name}-{copy}"
            yield Job(
                prompt=row["prompt"],
                seed=seed + (copy if "seed" in row else 0),
                height=row.get("height", config.height),
                width=row.get("width", config.width),
                negative=row.get("negative_prompt", config.negative),
                path=config.out if single else config.out / f"{name}.png",
            )
            number += 1


def _read_prompts(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason})") from error
    found = False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: is no JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise DataError(f"{where}: needs an object with a text 'prompt'")
        unknown = sorted(set(row) - _FIELDS)
        if unknown:
            raise DataError(
                f"{where}: unknown field {unknown[0]!r}; known are {', '.join(sorted(_FIELDS))}"
            )
        if "/" in str(row.get("name", "")) or str(row.get("name", "")).startswith("."):
            raise DataError(f"{where}: name={row['name']!r} must be a plain file name")
        found = True
        yield row
    if not found:
        raise DataError(f"{path}: holds no prompt")


def _with_flags(job: Job, pipe: PixArtDeltaPipeline) -> Job:
    """Read the size flags off a prompt of a multi-scale model."""
    resolution = pipe.transformer.shape.sample_size * 8
    if "--" not in job.prompt or resolution not in RESOLUTIONS:
        return job
    if not re.search(r"--(ar|aspect_ratio|hw)\b", job.prompt):
        return job
    flags = prompt_flags(job.prompt, resolution)
    return Job(
        prompt=flags.prompt, seed=job.seed, height=flags.bucket.height, width=flags.bucket.width,
        negative=job.negative, path=job.path, size=flags.size,
    )  # fmt: skip


def _groups(jobs: list[Job], batch: int) -> Iterator[list[Job]]:
    """Neighbours of one size, at most `batch` at a time."""
    group: list[Job] = []
    for job in jobs:
        alike = not group or (job.height, job.width, job.size) == (
            group[0].height, group[0].width, group[0].size,
        )  # fmt: skip
        if group and (len(group) == batch or not alike):
            yield group
            group = []
        group.append(job)
    yield group


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "image"
