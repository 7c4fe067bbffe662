"""Text in, vectors out, without torch: what `index` and `search` use while there is little to do.

The same vectors as SeaPipeline's within float32's rounding, under the same model id.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from polyzoo.core import config as configs
from polyzoo.core.errors import ConfigError
from polyzoo.core.weight_files import FILE_NAME
from polyzoo.sea.config import SeaConfig
from polyzoo.sea.encoding.numpy_encoder import Array, NumpyEncoder, Shape, read_arrays
from polyzoo.sea.encoding.tokenizer import SeaTokenizer
from polyzoo.sea.entries import CodeEmbeddings, Entries, check_finite, split_code
from polyzoo.sea.identity import fingerprint, model_id
from polyzoo.sea.model_sources import CONFIG_NAME, encoder_folder

_ENCODER = "encoder.model."
_PLAIN = frozenset({"first", "mean", "max", "maxsim", "soft_maxsim", "attn1", "attn1_mean"})


class NumpyPipeline:
    """A model folder that holds its whole encoder, such as the embedded one.

    Example:
        >>> pipeline = NumpyPipeline.load(Path("models/sea-embedded"))
        >>> pipeline.embed_queries(["sum of two numbers"]).shape
        (1, 384)
    """

    def __init__(
        self,
        config: SeaConfig,
        *,
        encoder: NumpyEncoder,
        score: tuple[Array, Array] | None,
        tokenizer: SeaTokenizer,
        model_id: str,
    ) -> None:
        """Put the parts together; see `load`.

        Args:
            config: The model's.
            encoder: Its encoder.
            score: Weight (1, d) and bias (1,) of the attention over entries, if it has one.
            tokenizer: Its tokenizer.
            model_id: As SeaPipeline names it.
        """
        self.config = config
        self.model_id = model_id
        self.tokenizer = tokenizer
        self._encoder = encoder
        self._score = score

    @classmethod
    def load(cls, folder: Path) -> NumpyPipeline | None:
        """Read a model's folder; None if this kind of model needs torch."""
        config = configs.load(SeaConfig, folder / CONFIG_NAME)
        if config.encoder != "self" or config.pooling != "mean" or config.adapter is not None:
            return None
        base = encoder_folder("self", beside=folder)
        shape = Shape.read(base / CONFIG_NAME)
        if shape is None or config.aggregator not in _PLAIN:
            return None
        if max(config.split.longest, config.max_query_tokens) + 2 > shape.positions:
            return None  # the other loader refuses it, and says why
        tensors = read_arrays(folder / FILE_NAME)
        inside = {
            name.removeprefix(_ENCODER): tensor
            for name, tensor in tensors.items()
            if name.startswith(_ENCODER)
        }
        score = None
        if config.aggregator.startswith("attn1"):
            score = tensors["aggregation.score.0.weight"], tensors["aggregation.score.0.bias"]
        tokenizer = SeaTokenizer.from_folder(base, split_identifiers=config.split_identifiers)
        if config.tokenizer_sha256 and config.tokenizer_sha256 != tokenizer.sha256:
            raise ConfigError(f"{base}: its tokenizer is not the one the model was trained with")
        return cls(
            config,
            encoder=NumpyEncoder(inside, shape),
            score=score,
            tokenizer=tokenizer,
            model_id=model_id(folder.name, fingerprint(config, folder)),
        )

    @property
    def dim(self) -> int:
        """Channels of a vector."""
        return self._encoder.dim

    def embed_queries(self, queries: Sequence[str]) -> Array:
        """(n, d) float32 vectors of natural-language queries."""
        limit = self.config.max_query_tokens
        ids = [self.tokenizer.query(query, limit=limit)[0] for query in queries]
        vectors = self._scaled(self._encoder.encode(ids))
        check_finite(vectors, [f"query {query!r}" for query in queries])
        return vectors

    def embed_code(self, codes: Sequence[str], *, language: str | Sequence[str]) -> CodeEmbeddings:
        """Embed functions; `language` is one for all, or one each."""
        splits = split_code(codes, language=language, config=self.config, tokenizer=self.tokenizer)
        entries = Entries.of(splits, config=self.config, tokenizer=self.tokenizer)
        own = self._scaled(self._encoder.encode(entries.sequences))
        vectors = np.zeros((len(splits), self.dim), np.float32)
        shares = np.zeros(len(own), np.float32)
        for row, (first, last) in enumerate(
            zip(entries.starts[:-1], entries.starts[1:], strict=True)
        ):
            vectors[row], shares[first:last] = self._aggregate(own[first:last])
        return entries.embeddings(self._scaled(vectors), own, shares, config=self.config)

    def _aggregate(self, x: Array) -> tuple[Array, Array]:
        """One vector of a function's (k, d) entries, and the share of each; as `Aggregation`."""
        count, kind = len(x), self.config.aggregator
        equal = np.full(count, 1 / count, np.float32)
        first = np.eye(1, count, dtype=np.float32)[0]
        if kind in ("mean", "maxsim", "soft_maxsim"):
            return x.mean(axis=0), equal
        if kind == "max":
            return x.max(axis=0), equal
        if kind == "first":
            return x[0], first
        assert self._score is not None  # noqa: S101 - our own promise
        weight, bias = self._score
        scores = x @ weight[0] + bias[0]
        share = np.exp(scores - scores.max())
        share /= share.sum()
        attended = share @ x
        if kind == "attn1":
            return attended, share
        raw = {
            "mean": (x.mean(axis=0), equal),
            "max": (x.max(axis=0), equal),
            "whole": (x[0], first),
        }[self.config.raw]
        return (attended + raw[0]) / 2, (share + raw[1]) / 2

    def _scaled(self, x: Array) -> Array:
        if not self.config.normalize:
            return x
        return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.float32(1e-12))
