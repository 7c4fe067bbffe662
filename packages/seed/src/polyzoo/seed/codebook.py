"""What keeps a codebook alive while it is trained, and how its health is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyzoo.core.io import atomic_path
from polyzoo.core.lazy import import_extra
from polyzoo.seed.codebook_config import CodebookConfig


class CodebookCare(nn.Module):
    """Counts what is chosen, and puts encoder outputs where nothing is.

    Its state is part of a training run's checkpoints and not of the finished model.
    """

    def __init__(self, codes: int, config: CodebookConfig) -> None:
        super().__init__()
        self.config = config
        self._begun = False
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self.register_buffer("restarted", torch.zeros((), dtype=torch.int64))
        self.counts: Tensor
        self.started: Tensor
        self.restarted: Tensor

    @torch.no_grad()
    def before(self, codebook: Tensor, z: Tensor, *, generator: torch.Generator) -> None:
        """Fill the codebook from encoder outputs (..., d) where this is the first batch."""
        if self._begun:  # on the host: asking the buffer would wait for the device at every step
            return
        if self.config.start == "data" and not bool(self.started):
            codebook.copy_(_sample(z, len(codebook), generator, jitter=0.02))
        self.started.fill_(True)
        self._begun = True

    @torch.no_grad()
    def after(
        self,
        codebook: Tensor,
        z: Tensor,
        codes: Tensor,
        *,
        step: int,
        total: int,
        generator: torch.Generator,
    ) -> None:
        """Count a batch's codes; every so often replace the dead entries.

        Args:
            codebook: (c, d), changed in place.
            z: (..., d) encoder outputs to draw from.
            codes: What they were quantised to.
            step: Of the run.
            total: Steps of the run.
            generator: Draws the replacements.
        """
        found = torch.bincount(codes.flatten(), minlength=len(codebook)).to(self.counts.dtype)
        self.counts.lerp_(found, 1 - self.config.memory)
        every = self.config.restart_every
        if every is None or step % every or step > self.config.restart_until * total:
            return
        dead = self.counts < self.config.dead_below
        number = int(dead.sum())
        if number:
            codebook[dead] = _sample(z, number, generator, jitter=0.0).to(codebook.dtype)
            self.counts[dead] = 1.0
            self.restarted += number


def _sample(z: Tensor, count: int, generator: torch.Generator, *, jitter: float) -> Tensor:
    """Rows of z drawn without replacement as far as they go; repeated ones get noise."""
    flat = z.detach().reshape(-1, z.shape[-1]).float()
    order = torch.randperm(len(flat), generator=generator, device=flat.device)
    rows = flat[order[torch.arange(count, device=flat.device) % len(flat)]]
    if jitter or count > len(flat):
        noise = torch.randn(rows.shape, generator=generator, device=flat.device)
        rows = rows + max(jitter, 0.02) * flat.std(0) * noise
    return rows


@dataclass(frozen=True)
class CodebookHealth:
    """How a codebook is used over a set of pictures."""

    codes: int
    """Entries."""
    images: int
    used: int
    """Entries chosen at least once."""
    used_share: float
    perplexity: float
    """exp of the entropy: how many entries would be as varied if all were chosen alike."""
    dead: int
    top_share: float
    """Share of all choices that fall on the most frequent hundredth of the entries."""
    verdict: str
    """good, or what is wrong and what to do."""
    by_position: list[float]
    """Perplexity at every position of the sentence."""

    @classmethod
    def of(cls, codes: NDArray[np.integer] | Tensor, *, entries: int) -> CodebookHealth:
        """Count codes (images, positions)."""
        table = np.asarray(codes)
        counts = np.bincount(table.ravel(), minlength=entries)
        used = int((counts > 0).sum())
        best = max(1, entries // 100)
        # Fewer choices than entries cannot use them all.
        reachable = min(entries, table.size)
        share = used / reachable
        verdict = "good"
        if share < 0.6:
            verdict = (
                f"low usage: {used} of {entries} entries; train with codebook.start=data and "
                "restart_every set"
            )
        return cls(
            codes=entries,
            images=len(table),
            used=used,
            used_share=used / entries,
            perplexity=_perplexity(counts),
            dead=entries - used,
            top_share=float(np.sort(counts)[-best:].sum() / max(1, counts.sum())),
            verdict=verdict,
            by_position=[_perplexity(np.bincount(column, minlength=entries)) for column in table.T],
        )


def _perplexity(counts: NDArray[np.integer]) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def plot_usage(codes: NDArray[np.integer] | Tensor, path: Path, *, entries: int) -> None:
    """Draw how often each entry is chosen, sorted, and the perplexity of each position."""
    import_extra("matplotlib", install="polyzoo-seed[train]")
    from matplotlib.figure import Figure

    health = CodebookHealth.of(codes, entries=entries)
    counts = np.sort(np.bincount(np.asarray(codes).ravel(), minlength=entries))[::-1]
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.fill_between(np.arange(entries), counts, step="mid")
    left.set(xlabel="entry, by frequency", ylabel="choices", title=f"{health.used} used")
    right.bar(np.arange(len(health.by_position)), health.by_position)
    right.set(xlabel="position", title="perplexity", ylim=(0, entries))
    with atomic_path(path.with_suffix(".png")) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
