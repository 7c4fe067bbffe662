"""Compare two folders of pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from polyzoo.core.errors import DataError
from polyzoo.towers.dinov2 import DinoV2
from polyzoo.towers.features import SIDE, picture_features
from polyzoo.towers.metrics import kernel_distance

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"})


@dataclass(frozen=True, kw_only=True)
class FolderDistance:
    """How far two sets of pictures are apart."""

    kernel_distance: float
    """Unbiased squared maximum mean discrepancy of DINOv2 class tokens; 0 for one distribution."""
    first: int
    """Pictures in the first set."""
    second: int
    """Pictures in the second."""
    side: int = SIDE
    """Side in pixels at which they were compared."""


def pictures_in(folder: Path) -> list[Path]:
    """Return the pictures of a folder and its subfolders, sorted.

    Raises:
        DataError: There is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not found:
        raise DataError(f"{folder}: holds no pictures ({', '.join(sorted(_SUFFIXES))})")
    return found


def compare_folders(first: Path, second: Path, model: DinoV2) -> FolderDistance:
    """Return the kernel distance of two folders' pictures.

    Raises:
        DataError: A folder holds fewer than two pictures, or one cannot be read.
    """
    sets = [pictures_in(folder) for folder in (first, second)]
    for folder, pictures in zip((first, second), sets, strict=True):
        if len(pictures) < 2:
            raise DataError(f"{folder}: holds one picture; two are the least")
    tokens = [picture_features(pictures, model)[:, : model.config.dim] for pictures in sets]
    return FolderDistance(
        kernel_distance=round(kernel_distance(*tokens), 4), first=len(sets[0]), second=len(sets[1])
    )
