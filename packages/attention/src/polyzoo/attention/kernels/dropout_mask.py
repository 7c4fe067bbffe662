"""The dropout mask in one Triton kernel: in torch's operators it takes some seventy passes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def keep_mask(
    rng: Tensor, *, batch: Tensor, heads: int, queries: Tensor, keys: int, threshold: int
) -> Tensor:
    """Do as `polyzoo.attention.philox.keep_mask`.

    Args:
        rng: int64 `(2,)`, seed and offset.
        batch: Batch indices.
        heads: All query heads.
        queries: Query positions.
        keys: Number of keys.
        threshold: Words below it are dropped.

    Returns:
        bool `(batch, heads, queries, keys)`.
    """
    shape = (batch.shape[0], heads, queries.shape[0], keys)
    kept = torch.empty(shape, dtype=torch.bool, device=rng.device)
    count = kept.numel()
    if count:
        _kernel[(triton.cdiv(count, _BLOCK),)](
            kept.view(torch.uint8),
            rng,
            batch.contiguous(),
            queries.contiguous(),
            threshold,
            count,
            heads,
            queries.shape[0],
            keys,
            BLOCK=_BLOCK,  # pyright: ignore[reportArgumentType]
        )
    return kept


@triton.jit
def _kernel(  # noqa: ANN202 - Triton compiles it
    kept,  # noqa: ANN001
    rng,  # noqa: ANN001
    batch,  # noqa: ANN001
    queries,  # noqa: ANN001
    threshold,  # noqa: ANN001
    count,  # noqa: ANN001
    heads,  # noqa: ANN001
    n,  # noqa: ANN001
    m,  # noqa: ANN001
    BLOCK: tl.constexpr,
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < count
    j = element % m
    row = element // m
    i = tl.load(queries + row % n, mask=inside, other=0)
    item = row // n
    b = tl.load(batch + item // heads, mask=inside, other=0)
    seed, offset = tl.load(rng), tl.load(rng + 1)
    word, _, _, _ = tl.philox(
        seed,
        j.to(tl.uint32),
        i.to(tl.uint32),
        (b * heads + item % heads).to(tl.uint32),
        (offset + j * 0).to(tl.uint32),
    )
    tl.store(kept + element, (word.to(tl.int64) >= threshold).to(tl.uint8), mask=inside)
