"""How a codebook starts and is repaired while it is trained. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from polyzoo.core.errors import ConfigError

Start = Literal["data", "uniform"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CodebookConfig:
    """How the codebook starts, and what happens to entries that nothing chooses.

    The defaults keep nearly all entries in use; start="uniform" with restart_every=None is the
    reference, which has no counter-measure and loses most.
    """

    start: Start = "data"
    """data: entries are encoder outputs of the first batches; uniform: small random numbers."""
    restart_every: int | None = 10
    """Steps between two rounds of replacing dead entries by encoder outputs; None never does."""
    dead_below: float = 0.05
    """An entry is dead when its average count per batch is below this."""
    restart_until: float = 0.85
    """Share of the run after which entries are left alone, so that the decoder can settle."""
    memory: float = 0.98
    """Share of the old average kept in each step."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.restart_every is not None and self.restart_every < 1:
            raise ConfigError(f"restart_every={self.restart_every} must be at least 1, or None")
        if not 0 <= self.memory < 1:
            raise ConfigError(f"memory={self.memory} must lie in [0, 1)")
        if not 0 <= self.restart_until <= 1:
            raise ConfigError(f"restart_until={self.restart_until} must be between 0 and 1")
