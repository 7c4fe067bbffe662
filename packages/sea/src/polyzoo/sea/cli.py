"""The `polyzoo sea` commands. Torch-free: what a command runs is named, and imported only then."""

from __future__ import annotations

from polyzoo.core.cli import CommandGroup

GROUP = CommandGroup(summary="Natural-language search over long code", commands={})
