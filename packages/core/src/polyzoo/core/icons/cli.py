"""`polyzoo icons build | backgrounds | info`. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from polyzoo.core.cli import Command, CommandGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildConfig:
    """What to build, and from where."""

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of the pack; an older one there is replaced."""
    size: int = 64
    """Side of the pictures in pixels."""
    styles: tuple[str, ...] = (
        "fluent-3d",
        "fluent-emoji-flat",
        "noto",
        "twemoji",
        "openmoji",
        "clipart",
    )
    """Which collections."""
    offline_from: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder that holds the packages already: no network is used then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BackgroundsConfig:
    """Where the photographs go."""

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of the photographs; an older one there is replaced."""
    side: int = 640
    """Longest side in pixels."""
    offline_from: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder that holds the packages already: no network is used then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InfoConfig:
    """Which pack."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """The pack's folder."""


GROUP = CommandGroup(
    summary="Emoji and clip art with captions and fixed splits, for the image models",
    commands={
        "build": Command(
            summary="Download the collections, draw them at one size, write a pack",
            config=BuildConfig,
            run="polyzoo.core.icons.commands:build",
        ),
        "backgrounds": Command(
            summary="Download photographs without labels, for composed scenes",
            config=BackgroundsConfig,
            run="polyzoo.core.icons.commands:backgrounds",
        ),
        "info": Command(
            summary="Count a pack's pictures by style and split; show sources and licences",
            config=InfoConfig,
            run="polyzoo.core.icons.commands:info",
            render="polyzoo.core.icons.commands:render_info",
        ),
    },
)
