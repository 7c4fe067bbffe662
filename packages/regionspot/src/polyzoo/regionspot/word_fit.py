"""Making a table of words whose combinations say what a sentence encoder says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from polyzoo.core.log import get_logger
from polyzoo.regionspot.words import STOP, WordTable, split_words

_log = get_logger(__name__)
Encode = Callable[[Sequence[str]], Tensor]
_NEAR = 6
_FREQUENT = 0.12
_OFTEN = 4


def choose_words(
    names: Mapping[str, float],
    common: Sequence[str],
    encode: Encode,
    reference: Tensor,
    *,
    count: int,
    extra: Sequence[str] = (),
) -> list[str]:
    """Choose words that name visible things: those of the names, then those near to them.

    Args:
        names: Texts with weights; their words come first.
        common: Words of the language, most frequent first.
        encode: Unit vectors of texts.
        reference: Unit `(n, t)` vectors of things; a word that is near several of them is chosen
            before others.
        count: How many words.
        extra: Words that are taken in any case.
    """
    counts: Counter[str] = Counter()
    for text, weight in names.items():
        for word in split_words(text):
            counts[word] += weight  # pyright: ignore[reportArgumentType]
    rank = {word: place for place, word in enumerate(common)}
    candidates = [
        word
        for word in dict.fromkeys([*extra, *counts, *common])
        if len(word) > 1 and word not in STOP and (word in rank or counts[word] >= 2)
    ] + [word for word in extra if word not in rank and counts[word] < 2]
    vectors = encode(candidates)
    near = torch.cat(
        [(part @ reference.T).topk(min(_NEAR, len(reference)), 1).values.mean(1)
         for part in vectors.split(2000)]
    )  # fmt: skip
    certain = {word for word in candidates if counts[word] >= _OFTEN} | set(extra)
    last = len(common) + 1
    bonus = torch.tensor(
        [
            _FREQUENT * (1 - rank.get(word, last) / last) + (10.0 if word in certain else 0.0)
            for word in candidates
        ]
    )
    best = (near + bonus).topk(min(count, len(candidates))).indices.tolist()
    return sorted({candidates[row] for row in best})


def fit_table(
    words: Sequence[str],
    vectors: Tensor,
    phrases: Sequence[str],
    phrase_vectors: Tensor,
    *,
    steps: int = 120,
) -> WordTable:
    """Fit vectors and weights so that the mean of a phrase's words is the phrase's own vector.

    Args:
        words: Distinct.
        vectors: Unit `(n, t)`: what the encoder says about each word; the fit stays near them.
        phrases: Several words each; those with an unknown word are passed over.
        phrase_vectors: Unit `(p, t)`.
        steps: Of Adam.
    """
    rows = {word: row for row, word in enumerate(words)}
    parts: list[tuple[int, list[int]]] = []
    for place, phrase in enumerate(phrases):
        found = split_words(phrase)
        if len(found) > 1 and all(word in rows for word in found):
            parts.append((place, [rows[word] for word in found]))
    table = vectors.clone().requires_grad_()
    weights = torch.zeros(len(words), requires_grad=True)
    last = torch.zeros((), requires_grad=True)
    if parts and steps:
        _fit(table, weights, last, vectors, parts, phrase_vectors, steps)
    return WordTable(words, table.detach(), weights.detach(), float(last.detach()))


def _fit(
    table: Tensor,
    weights: Tensor,
    last: Tensor,
    vectors: Tensor,
    parts: Sequence[tuple[int, list[int]]],
    phrase_vectors: Tensor,
    steps: int,
) -> None:
    longest = max(len(part) for _, part in parts)
    index = torch.zeros(len(parts), longest, dtype=torch.long)
    used, ending = torch.zeros(len(parts), longest), torch.zeros(len(parts), longest)
    for row, (_, part) in enumerate(parts):
        index[row, : len(part)] = torch.tensor(part)
        used[row, : len(part)] = 1
        ending[row, len(part) - 1] = 1
    wanted = phrase_vectors[[place for place, _ in parts]]
    optimizer = torch.optim.Adam(
        [{"params": [table], "lr": 2e-3}, {"params": [weights, last], "lr": 2e-2}]
    )
    near = torch.ones(())
    for _ in range(steps):
        share = (weights[index] + last * ending).exp() * used
        made = F.normalize((table[index] * share[..., None]).sum(1), dim=-1)
        near = (1 - (made * wanted).sum(1)).mean()
        moved = (1 - (F.normalize(table, dim=-1) * vectors).sum(1)).sum()
        loss = near + moved / 4000
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _log.info("words: phrases at a cosine of %.3f to the encoder's", 1 - float(near.detach()))
