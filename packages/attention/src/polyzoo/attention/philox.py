"""Random numbers that depend on their position only: every backend drops the same ones."""

from __future__ import annotations

import math
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_ROUNDS = 10


def philox(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Return the first output word of philox4x32-10.

    Words are int64 tensors holding uint32 values; counters broadcast, so the first rounds, which
    see each of them alone, cost next to nothing. Products wrap around at 64 bits, as they must.

    Args:
        key: Low and high word of the seed.
        counter: The four counter words.
    """
    key0, key1 = key
    word0, word1, word2, word3 = counter
    for _ in range(_ROUNDS):
        product0 = word0 * _MULTIPLIERS[0]
        product1 = word2 * _MULTIPLIERS[1]
        word0 = ((product1 >> 32) & _WORD) ^ word1 ^ key0
        word2 = ((product0 >> 32) & _WORD) ^ word3 ^ key1
        word1 = product1 & _WORD
        word3 = product0 & _WORD
        key0 = (key0 + _KEY_STEPS[0]) & _WORD
        key1 = (key1 + _KEY_STEPS[1]) & _WORD
    return word0


def keep_mask(
    rng: Tensor, *, batch: Tensor, heads: int, queries: Tensor, keys: int, dropout: float
) -> Tensor:
    """Tell which probabilities dropout keeps: bool `(batch, heads, queries, keys)`.

    The word of (b, h, i, j) has the seed as key and `(j, i, b * heads + h, offset)` as counter; it
    is kept iff `word * 2**-32 >= dropout`.

    Args:
        rng: int64 `(2,)`, seed and offset.
        batch: Batch indices, or sequence numbers of a packed batch.
        heads: All query heads.
        queries: Query positions within their sequence.
        keys: Number of keys.
        dropout: Probability of dropping.
    """
    # A float times a power of two is exact, and torch would compare with a float in fp32.
    threshold = math.ceil(dropout * 2.0**32)
    device = rng.device
    if device.type == "cuda" and not torch.compiler.is_compiling() and _has_triton():
        from polyzoo.attention.kernels import dropout_mask

        return dropout_mask.keep_mask(
            rng, batch=batch, heads=heads, queries=queries, keys=keys, threshold=threshold
        )
    seed, offset = rng[0], rng[1]
    head = torch.arange(heads, device=device)
    batch_head = (batch.to(torch.int64)[:, None] * heads + head)[..., None, None]
    word = philox(
        (seed & _WORD, (seed >> 32) & _WORD),
        (
            torch.arange(keys, device=device),
            queries.to(torch.int64)[:, None],
            batch_head & _WORD,
            offset & _WORD,
        ),
    )
    kept = word >= threshold
    return kept.expand(batch.shape[0], heads, queries.shape[0], keys)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def draw_rng(generator: torch.Generator | Tensor | None, device: torch.device) -> Tensor:
    """Return seed and offset as int64 `(2,)` on `device`, without waiting for it.

    Args:
        generator: Draws the seed; None is torch's own. A tensor is the state itself.
        device: Where the call runs.
    """
    if isinstance(generator, Tensor):
        return generator
    source = device if generator is None else generator.device
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator, device=source)
    return torch.cat([seed, torch.zeros_like(seed)]).to(device, non_blocking=True)
