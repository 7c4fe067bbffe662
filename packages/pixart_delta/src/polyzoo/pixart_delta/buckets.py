"""Aspect-ratio buckets: the sizes PixArt was trained at, and which of them fits an image."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from polyzoo.core.errors import ConfigError, DataError

Resolution = Literal[256, 512, 1024]
RESOLUTIONS: tuple[Resolution, ...] = (256, 512, 1024)

_SIXTEENTHS = (
    ("0.25", 8, 32), ("0.26", 8, 31), ("0.27", 8, 30), ("0.28", 8, 29), ("0.32", 9, 28),
    ("0.33", 9, 27), ("0.35", 9, 26), ("0.4", 10, 25), ("0.42", 10, 24), ("0.48", 11, 23),
    ("0.5", 11, 22), ("0.52", 11, 21), ("0.57", 12, 21), ("0.6", 12, 20), ("0.68", 13, 19),
    ("0.72", 13, 18), ("0.78", 14, 18), ("0.82", 14, 17), ("0.88", 15, 17), ("0.94", 15, 16),
    ("1.0", 16, 16), ("1.07", 16, 15), ("1.13", 17, 15), ("1.21", 17, 14), ("1.29", 18, 14),
    ("1.38", 18, 13), ("1.46", 19, 13), ("1.67", 20, 12), ("1.75", 21, 12), ("2.0", 22, 11),
    ("2.09", 23, 11), ("2.4", 24, 10), ("2.5", 25, 10), ("2.89", 26, 9), ("3.0", 27, 9),
    ("3.11", 28, 9), ("3.62", 29, 8), ("3.75", 30, 8), ("3.88", 31, 8), ("4.0", 32, 8),
)  # fmt: skip
"""Ratio key, and sides in sixteenths of the resolution."""
_TRAINED_ONLY = {"0.26", "0.27", "2.89", "3.11", "3.62", "3.75", "3.88"}


@dataclass(frozen=True)
class Bucket:
    """One of the trained sizes."""

    key: str
    """Height over width, as the tables round it."""
    height: int
    width: int

    @property
    def ratio(self) -> float:
        """The key as a number."""
        return float(self.key)


def buckets(resolution: int, *, training: bool = False) -> tuple[Bucket, ...]:
    """The 33 buckets of inference, or all 40 of training, in order of their ratio.

    Raises:
        ConfigError: There are none of that resolution.
    """
    if resolution not in RESOLUTIONS:
        raise ConfigError(
            f"resolution={resolution}: there are buckets of {', '.join(map(str, RESOLUTIONS))}; "
            "for other sizes use exact sizes"
        )
    unit = resolution // 16
    return tuple(
        Bucket(key, height * unit, width * unit)
        for key, height, width in _SIXTEENTHS
        if training or key not in _TRAINED_ONLY
    )


def nearest_bucket(
    height: float, width: float, resolution: int, *, training: bool = False
) -> Bucket:
    """The bucket whose ratio is nearest to an image's; the first of two equally near."""
    if height <= 0 or width <= 0:
        raise DataError(f"an image of {height} x {width} has no aspect ratio")
    ratio = height / width
    return min(buckets(resolution, training=training), key=lambda b: abs(b.ratio - ratio))


def resolution_of(height: int, width: int) -> Resolution:
    """The bucket table whose area is nearest to an image's."""
    area = height * width
    return min(RESOLUTIONS, key=lambda side: abs(side * side - area))


@dataclass(frozen=True)
class PromptFlags:
    """A prompt without its size flags, and what they ask for."""

    prompt: str
    bucket: Bucket
    """Nearest to --ar or --aspect_ratio; the square one without them."""
    size: tuple[float, float]
    """Height and width for the size condition: of --hw, else of the bucket."""


def prompt_flags(prompt: str, resolution: int = 1024) -> PromptFlags:
    """Read `--ar H:W`, `--aspect_ratio H:W` and `--hw H:W` off a prompt.

    Raises:
        DataError: A flag has no two numbers.
    """
    ratio: tuple[float, float] | None = None
    size: tuple[float, float] | None = None
    for match in re.finditer(r"--(ar|aspect_ratio|hw)\s+(\S+)", prompt):
        numbers = re.fullmatch(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)", match[2])
        if numbers is None or not float(numbers[1]) or not float(numbers[2]):
            raise DataError(f"--{match[1]} {match[2]}: give height:width, such as --ar 9:16")
        pair = (float(numbers[1]), float(numbers[2]))
        if match[1] == "hw":
            size = pair
        else:
            ratio = pair
    text = re.sub(r"\s*--(?:ar|aspect_ratio|hw)\s+\S+", "", prompt).strip()
    bucket = nearest_bucket(*(ratio or (1.0, 1.0)), resolution)
    return PromptFlags(text, bucket, size or (float(bucket.height), float(bucket.width)))
