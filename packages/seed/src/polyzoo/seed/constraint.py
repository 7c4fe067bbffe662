"""Constrained decoding: whatever a model samples, every image it writes is well formed."""

from __future__ import annotations

import torch
from torch import Tensor

from polyzoo.core.errors import ConfigError
from polyzoo.seed.vocabulary import ImageVocabulary


class WellFormedImages:
    """A logits processor for `generate`.

    Behind `<img>` only codes are allowed, for exactly `tokens_per_image` steps, then only `</img>`.
    Elsewhere codes and `</img>` are forbidden, and `<img>` too where no whole image fits any more.

    Example:
        >>> model.generate(ids, logits_processor=[WellFormedImages(vocabulary, max_length=96)])
    """

    def __init__(
        self, vocabulary: ImageVocabulary, *, max_length: int, images: bool = True
    ) -> None:
        """Keep the rules.

        Args:
            vocabulary: The model's images.
            max_length: Ids of prompt and answer together, at most.
            images: Whether the model may begin an image; a begun one is always finished.
        """
        if max_length < 1:
            raise ConfigError(f"max_length={max_length} must be at least 1")
        self.vocabulary, self.max_length, self.images = vocabulary, max_length, images

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (b, v) with what is not allowed at -inf, for ids (b, n) so far."""
        v, n = self.vocabulary, ids.shape[1]
        if scores.shape[1] <= max(v.end, v.begin):
            raise ConfigError(
                f"the model scores {scores.shape[1]} tokens and the vocabulary reaches "
                f"{max(v.end, v.begin)}: resize the model's embeddings"
            )
        places = torch.arange(n, device=ids.device)
        begun = torch.where(ids == v.begin, places, -1).amax(1)
        ended = torch.where(ids == v.end, places, -1).amax(1)
        inside = begun > ended
        written = n - 1 - begun
        codes = torch.zeros(scores.shape[1], dtype=torch.bool, device=ids.device)
        codes[v.shift : v.shift + v.codes] = True
        outside = ~codes
        outside[v.end] = False
        if not self.images or n + v.tokens_per_image + 2 > self.max_length:
            outside[v.begin] = False
        only_end = torch.zeros_like(codes)
        only_end[v.end] = True
        full = written >= v.tokens_per_image
        allowed = torch.where(inside[:, None], torch.where(full[:, None], only_end, codes), outside)
        return scores.masked_fill(~allowed, -torch.inf)
