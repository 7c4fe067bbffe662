"""The `polyzoo training` commands. Torch-free: what a command runs is named, and imported then."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from polyzoo.core.cli import Command, CommandGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectConfig:
    """Which run to look at."""

    run_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_DIR")]
    """Folder of the run."""
    verify: bool = True
    """Read every byte of every checkpoint and compare its hash; else only sizes."""


GROUP = CommandGroup(
    summary="Look after training runs",
    commands={
        "inspect": Command(
            summary="Show how a run stands, and verify its checkpoints",
            config=InspectConfig,
            run="polyzoo.training.inspect:inspect",
            render="polyzoo.training.inspect:render",
        ),
    },
)
