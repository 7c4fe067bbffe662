"""Configs of every kind of field, for tests of reading and of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    """Part of a config."""

    depth: int = 2
    """How deep it goes."""
    path: Path = Path("here")
    """Where it lies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fuzzed:
    """A config with a field of every kind."""

    steps: int = 10
    """How many steps to take."""
    rate: float = 1e-3
    """How far a step goes."""
    name: str = ""
    """What it is called."""
    kind: Literal["a", "b"] = "a"
    """Which kind it is."""
    flags: tuple[bool, ...] = ()
    """What is on."""
    sizes: dict[str, int] = field(default_factory=dict)
    """How large things are."""
    inner: Inner = field(default_factory=Inner)
    """A part."""
    extra: Inner | None = None
    """A part that may be absent."""
