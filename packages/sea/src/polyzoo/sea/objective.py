"""What a training step computes: contrastive loss on pairs, and a teacher's vectors beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from polyzoo.core.errors import ConfigError
from polyzoo.sea.data import Pair, PairBatch, PairDataset, collate
from polyzoo.sea.losses import contrastive_loss, cosine_distance, score_divergence
from polyzoo.sea.model import PairVectors, SeaModel
from polyzoo.sea.presets import DistillConfig, LossConfig


@dataclass(frozen=True)
class Objective:
    """A loss and the numbers worth logging."""

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class DistillBatch:
    """The same pairs in the student's pieces and in the teacher's."""

    student: PairBatch
    teacher: PairBatch

    def pin_memory(self) -> DistillBatch:
        """The same in page-locked memory, for copies that do not wait."""
        return DistillBatch(self.student.pin_memory(), self.teacher.pin_memory())


class DistillDataset(Dataset[tuple[Pair, Pair]]):
    """Pairs of two prepared files that describe the same functions, block by block."""

    def __init__(self, student: PairDataset, teacher: PairDataset) -> None:
        """Both in the same order."""
        if len(student) != len(teacher):
            raise ConfigError(
                f"{len(student)} pairs for the student, {len(teacher)} for the teacher"
            )
        self._student = student
        self._teacher = teacher

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self._student)

    def __getitem__(self, index: int) -> tuple[Pair, Pair]:
        """One pair in both vocabularies."""
        return self._student[index], self._teacher[index]

    def set_epoch(self, epoch: int) -> None:
        """Deal other extra functions in every epoch, the same to both."""
        self._student.set_epoch(epoch)
        self._teacher.set_epoch(epoch)


def collate_both(pairs: Sequence[tuple[Pair, Pair]]) -> DistillBatch:
    """Pack both views of a batch."""
    return DistillBatch(
        student=collate([pair[0] for pair in pairs]), teacher=collate([pair[1] for pair in pairs])
    )


def pair_objective(scores: Tensor, batch: PairBatch, config: LossConfig) -> Objective:
    """Contrastive loss, and how often the right function is the first of its batch."""
    loss = contrastive_loss(
        scores,
        temperature=config.temperature,
        symmetric=config.symmetric,
        duplicates=batch.duplicates,
    )
    with torch.no_grad():
        masked = scores.masked_fill(batch.duplicates, float("-inf"))
        right = masked.argmax(1) == torch.arange(batch.n, device=scores.device)
    return Objective(loss, {"accuracy": right.float().mean()})


def distill_objective(
    student: PairVectors,
    scores: Tensor,
    batch: DistillBatch,
    teacher: SeaModel,
    loss_config: LossConfig,
    config: DistillConfig,
) -> Objective:
    """The pairs' loss plus distances to the teacher's vectors, entries and ranking."""
    with torch.no_grad():
        wanted = teacher(batch.teacher)
        wanted_scores = teacher.scores(wanted.queries, wanted.codes)
    pairs = pair_objective(scores, batch.student, loss_config)
    vectors = cosine_distance(student.queries, wanted.queries) + cosine_distance(
        student.codes.vectors, wanted.codes.vectors
    )
    blocks = cosine_distance(student.codes.entries, wanted.codes.entries)
    ranking = score_divergence(
        scores,
        wanted_scores,
        temperature=loss_config.temperature,
        duplicates=batch.student.duplicates,
    )
    total = (
        config.contrastive * pairs.loss
        + config.vectors * vectors
        + config.blocks * blocks
        + config.scores * ranking
    )
    return Objective(
        total,
        {
            **pairs.metrics,
            "contrastive": pairs.loss.detach(),
            "vector_distance": vectors.detach(),
            "block_distance": blocks.detach(),
            "ranking_divergence": ranking.detach(),
        },
    )
