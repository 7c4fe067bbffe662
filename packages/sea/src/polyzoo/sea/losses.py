"""Contrastive and distillation losses, as pure functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from polyzoo.core.errors import ConfigError, DataError


def contrastive_loss(
    scores: Tensor,
    *,
    temperature: float = 1.0,
    symmetric: bool = False,
    duplicates: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each query against all codes of the batch.

    Args:
        scores: (n, f) with f >= n; query i's answer is column i, the rest are negatives.
        temperature: Divides the scores. 1 as published; 0.05 suits normalised vectors.
        symmetric: Average with the code-to-query direction over the first n columns.
        duplicates: (n, f) bool, pairs that are no negatives though they are not the answer (same
            documentation or same code). The diagonal must be False.

    Returns:
        Scalar mean over the queries.
    """
    n, f = scores.shape
    if f < n:
        raise DataError(f"scores {n} x {f}: every query needs its own code")
    if f < 2:
        raise DataError("a batch of 1 pair has no negatives: use a batch size of at least 2")
    if temperature <= 0:
        raise ConfigError(f"temperature={temperature} must be above 0")
    if duplicates is not None and duplicates.device.type == "cpu":
        check_negatives(duplicates)  # on a GPU the batch was checked when it was put together
    logits = scores.float() / temperature
    if duplicates is not None:
        logits = logits.masked_fill(duplicates, float("-inf"))
    answers = torch.arange(n, device=scores.device)
    loss = F.cross_entropy(logits, answers)
    if symmetric:
        loss = (loss + F.cross_entropy(logits[:, :n].T, answers)) / 2
    return loss


def find_duplicates(query_hash: Tensor, code_hash: Tensor, *, columns: int | None = None) -> Tensor:
    """(n, f) bool: column j is not query i's answer, yet has its documentation or its code.

    Args:
        query_hash: (f,) of the documentation of every column.
        code_hash: (f,) of its code.
        columns: n, the number of queries; all columns where not given.
    """
    n = len(query_hash) if columns is None else columns
    same = (query_hash[:n, None] == query_hash[None]) | (code_hash[:n, None] == code_hash[None])
    same[torch.arange(n), torch.arange(n)] = False
    return same


def check_negatives(duplicates: Tensor) -> None:
    """Refuse a batch in which no query has a negative left."""
    n, f = duplicates.shape
    if f < 2:
        raise DataError("a batch of 1 pair has no negatives: use a batch size of at least 2")
    if bool((duplicates.sum(1) >= f - 1).all()):
        raise DataError(
            f"all {n} pairs of the batch are duplicates of each other, so there are no negatives: "
            "remove duplicates from the training file"
        )


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine over rows; the teacher gets no gradient."""
    if student.shape != teacher.shape:
        raise ConfigError(
            f"student vectors {tuple(student.shape)} and teacher vectors {tuple(teacher.shape)} "
            "differ in shape: give the student the teacher's hidden size"
        )
    return 1 - F.cosine_similarity(student.float(), teacher.detach().float(), dim=-1).mean()


def score_divergence(
    student: Tensor, teacher: Tensor, *, temperature: float, duplicates: Tensor | None = None
) -> Tensor:
    """KL divergence of the student's ranking of the batch from the teacher's.

    Args:
        student: (n, f) scores.
        teacher: (n, f) scores of the same pairs; no gradient.
        temperature: Divides both.
        duplicates: As in `contrastive_loss`; left out of both rankings.
    """
    wanted = teacher.detach().float() / temperature
    given = student.float() / temperature
    if duplicates is not None:
        # A large negative number, not -inf: 0 * -inf would be NaN inside the divergence.
        wanted = wanted.masked_fill(duplicates, -1e4)
        given = given.masked_fill(duplicates, -1e4)
    return F.kl_div(
        given.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True
    )
