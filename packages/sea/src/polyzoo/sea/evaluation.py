"""Protocols: who competes with whom, how ties and cut-offs count (README, "Train, evaluate").

Every candidate is treated alike: its vector does not depend on whether it is an answer. The one
exception is the protocol named `released`, which repeats the published procedure with its faults.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from polyzoo.core.errors import ConfigError, DataError
from polyzoo.core.io import atomic_write
from polyzoo.sea.encoding.segments import inner_products
from polyzoo.sea.metrics import Figures, answer_ranks, by_length
from polyzoo.sea.model import CodeVectors, SeaModel
from polyzoo.sea.options import Protocol, Ties
from polyzoo.sea.prepared import Prepared

_QUERIES_AT_ONCE = 512
_CSN_POOL = 1000
_CUTOFF = {"full": None, "released": None, "csn1000": None, "graphcodebert": 1000}

ScoreRows = Callable[[int, int], np.ndarray]
"""Scores of queries first..last - 1 against all candidates."""


@dataclass(frozen=True)
class Ranking:
    """Ranks of one way of scoring, with the figures made of them."""

    all: Figures
    by_length: dict[str, Figures]
    tied: int
    """Queries whose answer shares its score with another candidate."""
    ranks: list[float] = field(repr=False, default_factory=list)


def find_answers(queries: Prepared, codebase: Prepared) -> np.ndarray:
    """(q,) column of each query's function in the codebase."""
    column = {url: index for index, url in enumerate(codebase.urls)}
    if len(column) != len(codebase):
        raise DataError(
            f"{len(codebase) - len(column)} urls occur twice in the codebase; "
            "each function needs its own"
        )
    missing = [url for url in queries.urls if url not in column]
    if missing:
        raise DataError(
            f"{len(missing)} queries have no function in the codebase, first {missing[:3]}; "
            "the `url` joins them"
        )
    return np.array([column[url] for url in queries.urls])


def rank(
    score_rows: ScoreRows,
    answers: np.ndarray,
    lengths: np.ndarray,
    *,
    protocol: Protocol = "full",
    ties: Ties = "pessimistic",
) -> Ranking:
    """Rank all queries by one scoring.

    Args:
        score_rows: Gives some rows of the score matrix.
        answers: (q,) column of each answer.
        lengths: (q,) pieces of each answer.
        protocol: As in `EvalConfig`.
        ties: As in `EvalConfig`.
    """
    if protocol == "csn1000":
        return _rank_in_pools(score_rows, answers, lengths, ties)
    ranks, tied = [], 0
    for first in range(0, len(answers), _QUERIES_AT_ONCE):
        last = min(first + _QUERIES_AT_ONCE, len(answers))
        part = answer_ranks(score_rows(first, last), answers[first:last], ties=ties)
        ranks.append(part.ranks)
        tied += part.tied
    together = np.concatenate(ranks)
    cutoff = _CUTOFF[protocol]
    return Ranking(
        all=Figures.of(together, cutoff=cutoff),
        by_length=by_length(together, lengths, cutoff=cutoff),
        tied=tied,
        ranks=together.tolist(),
    )


def _rank_in_pools(
    score_rows: ScoreRows, answers: np.ndarray, lengths: np.ndarray, ties: Ties
) -> Ranking:
    """1,000 queries in file order against each other's functions; an incomplete pool is dropped."""
    pools = len(answers) // _CSN_POOL
    if not pools:
        raise DataError(
            f"protocol csn1000 needs at least {_CSN_POOL} queries, there are {len(answers)}"
        )
    ranks, tied = [], 0
    for first in range(0, pools * _CSN_POOL, _CSN_POOL):
        last = first + _CSN_POOL
        scores = score_rows(first, last)[:, answers[first:last]]
        part = answer_ranks(scores, np.arange(_CSN_POOL), ties=ties)
        ranks.append(part.ranks)
        tied += part.tied
    together = np.concatenate(ranks)
    return Ranking(
        all=Figures.of(together),
        by_length=by_length(together, lengths[: len(together)]),
        tied=tied,
        ranks=together.tolist(),
    )


@dataclass(frozen=True)
class Embedded:
    """Vectors of all queries and candidates, on the model's device."""

    queries: torch.Tensor
    codes: CodeVectors


def embed(model: SeaModel, queries: Prepared, codebase: Prepared) -> Embedded:
    """Encode everything once; each candidate alike."""
    entries, starts = codebase.all_entries(
        include_whole=model.config.whole_entry,
        only_whole=model.config.aggregator == "first",
        head_pieces=model.config.head_pieces,
    )
    codes = model.embed_codes(entries, starts)
    asked = model.embed_queries([queries.query(row) for row in range(len(queries))])
    check_finite(asked, [f"query of {url}" for url in queries.urls])
    check_finite(codes.vectors, codebase.urls)
    return Embedded(asked.float(), codes)


def model_scores(model: SeaModel, embedded: Embedded) -> ScoreRows:
    """Scores by the model's own rule."""
    return lambda first, last: (
        model.scores(embedded.queries[first:last], embedded.codes).float().cpu().numpy()
    )


def truncated_scores(embedded: Embedded) -> ScoreRows:
    """Scores by the first entry alone: the truncated function."""
    first_entries = embedded.codes.entries[embedded.codes.starts[:-1].long()]
    return lambda first, last: (
        inner_products(embedded.queries[first:last], first_entries).cpu().numpy()
    )


@torch.no_grad()
def released_scores(model: SeaModel, embedded: Embedded, answers: np.ndarray) -> ScoreRows:
    """Scores of the published procedure, which favours the answers.

    Functions that answer a query of this set are aggregated over [whole, whole, blocks...], all
    others over [whole] alone. With the published sum formula an answer's vector is thereby at least
    1.5 times as long as a distractor's, and scores are plain inner products.
    """
    rows, starts = released_rows(embedded.codes.starts.cpu().numpy(), answers)
    device = embedded.codes.entries.device
    out = model.aggregate(
        embedded.codes.entries[torch.from_numpy(rows).to(device)],
        torch.from_numpy(starts).to(device),
    )
    return lambda first, last: (
        inner_products(embedded.queries[first:last], out.vectors).cpu().numpy()
    )


def released_rows(
    starts: np.ndarray, answers: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the entries that the published inference aggregates, and where functions start.

    Args:
        starts: (f + 1,) first entry of each function; entry 0 of a function is the whole.
        answers: Functions that answer a query of the evaluated set.
    """
    truth = {int(answer) for answer in answers}
    rows: list[int] = []
    new_starts = [0]
    for function in range(len(starts) - 1):
        first, last = int(starts[function]), int(starts[function + 1])
        rows += [first, *range(first, last)] if function in truth else [first]
        new_starts.append(len(rows))
    return np.array(rows), np.array(new_starts)


def check_released(model: SeaModel) -> None:
    """The published procedure only differs from `full` where lengths are not normalised."""
    if model.config.normalize:
        raise ConfigError(
            "protocol released needs a model without normalisation (as published): with it the "
            "favoured answers would be scaled back"
        )


def check_finite(vectors: torch.Tensor, names: Sequence[str]) -> None:
    """Name the first function whose vector is not finite."""
    bad = ~torch.isfinite(vectors).all(dim=1)
    if bool(bad.any()):
        index = int(bad.float().argmax())
        raise DataError(
            f"{names[index]}: its vector holds NaN or inf ({int(bad.sum())} such vectors); the "
            "weights are broken, or half precision overflowed: try float32"
        )


def write_ranks(path: Path, urls: Sequence[str], rankings: dict[str, Ranking]) -> None:
    """One JSON object per query: its url and its rank under every scoring."""
    with atomic_write(path, "w") as file:
        for row, url in enumerate(urls):
            ranks = {
                name: ranking.ranks[row]
                for name, ranking in rankings.items()
                if row < len(ranking.ranks)
            }
            file.write(json.dumps({"url": url, **ranks}) + "\n")
