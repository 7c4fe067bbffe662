"""SeaPipeline: text in, vectors out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from polyzoo.core.device import resolve_device, resolve_dtype
from polyzoo.core.errors import ConfigError
from polyzoo.sea.config import Language, SeaConfig
from polyzoo.sea.entries import (
    CodeEmbeddings,
    Entries,
    check_finite,
    entry_score,
    split_code,
    split_one,
)
from polyzoo.sea.folders import LoadedModel, build_bare, load_folder
from polyzoo.sea.identity import model_id
from polyzoo.sea.model import CodeVectors
from polyzoo.sea.model_sources import BARE, encoder_folder, model_folder
from polyzoo.sea.splitting import Split

_CPU_TOKENS = 4096


@dataclass(frozen=True)
class Hit:
    """One ranked function."""

    index: int
    """Position in the codes given."""
    score: float
    best_block: int
    """Block of its split that is nearest to the query."""


class SeaPipeline:
    """Embeds code and natural-language queries into one space.

    Example:
        >>> pipeline = SeaPipeline.from_pretrained("embedded")
        >>> code = pipeline.embed_code(["def add(a, b): return a + b"], language="python")
        >>> float(pipeline.embed_queries(["sum of two numbers"])[0] @ code.vectors[0])
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        device: str = "auto",
        dtype: str | torch.dtype | None = None,
        name: str = "model",
    ) -> None:
        """Move a loaded model to its device and make it ready for inference.

        Args:
            loaded: From `polyzoo.sea.folders`.
            device: auto, cpu, cuda, ...
            dtype: Of the encoder's arithmetic; float32 on the CPU and bfloat16 on a GPU where not
                given. Vectors are float32 always.
            name: Shown in `model_id`.
        """
        self.config: SeaConfig = loaded.config
        self.tokenizer = loaded.tokenizer
        self.tokenizer_folder = loaded.tokenizer_folder
        self.model = loaded.model
        self.model_id = model_id(name, loaded.fingerprint)
        self.device = resolve_device(device)
        if dtype is None:
            dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        elif isinstance(dtype, str):
            dtype = resolve_dtype(dtype, self.device)
        self.model.to(self.device).eval().requires_grad_(False)
        self.model.encoder.to(dtype)
        self.model.encoder.fuse()
        if self.device.type == "cpu":  # a chunk's states then stay in the cache
            self.model.encoder.max_tokens_per_forward = _CPU_TOKENS

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = "embedded",
        *,
        device: str = "auto",
        dtype: str | torch.dtype | None = None,
        local_files_only: bool = False,
        config: SeaConfig | None = None,
    ) -> SeaPipeline:
        """Load a model.

        Args:
            name_or_path: "embedded" (in this package), "minilm" (its adapter is in this package,
                the encoder is an asset), a folder written by training, a hub id, or
                "encoder:NAME" for an encoder without SEA training.
            device: auto, cpu, cuda, ...
            dtype: Of the encoder's arithmetic.
            local_files_only: Never use the network.
            config: Splitter and aggregation of an "encoder:NAME"; refused for trained models.
        """
        name = str(name_or_path)
        if name.startswith(BARE):
            shape = config or bare_config(name.removeprefix(BARE), local_files_only)
            loaded = build_bare(shape, local_files_only=local_files_only)
            label = Path(name.removeprefix(BARE)).name
            return cls(loaded, device=device, dtype=dtype, name=label)
        if config is not None:
            raise ConfigError(
                f"{name}: a trained model brings its own configuration; config is only for "
                "encoder:NAME"
            )
        folder = model_folder(name, local_files_only=local_files_only)
        loaded = load_folder(folder, local_files_only=local_files_only)
        return cls(loaded, device=device, dtype=dtype, name=folder.name)

    @staticmethod
    def bulk_dtype() -> str | None:
        """What to compute in where speed matters: bfloat16 on a CPU that multiplies in it."""
        # Before torch 2.12 there is no public way to ask.
        known = getattr(torch.cpu, "get_capabilities", dict)()
        native = known.get("avx512_bf16") or known.get("amx_bf16")
        return "bfloat16" if native and not torch.cuda.is_available() else None

    @property
    def dim(self) -> int:
        """Channels of a vector."""
        return self.model.dim

    def embed_queries(self, queries: Sequence[str]) -> np.ndarray:
        """(n, d) float32 vectors of natural-language queries."""
        if not queries:
            return np.zeros((0, self.dim), dtype=np.float32)
        limit = self.config.max_query_tokens
        ids = [self.tokenizer.query(query, limit=limit)[0] for query in queries]
        vectors = self.model.embed_queries(ids).float().cpu().numpy()
        check_finite(vectors, [f"query {query!r}" for query in queries])
        return vectors

    def split(self, code: str, *, language: Language | str) -> Split:
        """Blocks of one function as this model sees them."""
        return split_one(code, language=language, config=self.config, tokenizer=self.tokenizer)

    def embed_code(self, codes: Sequence[str], *, language: str | Sequence[str]) -> CodeEmbeddings:
        """Embed functions; results are in the given order whatever the batching.

        Args:
            codes: Source text of each function.
            language: Of all, or one for each.
        """
        splits = split_code(codes, language=language, config=self.config, tokenizer=self.tokenizer)
        return self.embed_splits(splits)

    def embed_splits(self, splits: Sequence[Split]) -> CodeEmbeddings:
        """Embed functions that are already split."""
        if not splits:
            return CodeEmbeddings(np.zeros((0, self.dim), dtype=np.float32), [], [], [], [])
        entries = Entries.of(splits, config=self.config, tokenizer=self.tokenizer)
        codes = self.model.embed_codes(entries.sequences, entries.starts)
        return entries.embeddings(
            codes.vectors.float().cpu().numpy(),
            codes.entries.float().cpu().numpy(),
            codes.weights.float().cpu().numpy(),
            config=self.config,
        )

    def rank(
        self,
        queries: Sequence[str],
        codes: Sequence[str],
        *,
        language: str | Sequence[str],
        top_k: int = 10,
    ) -> list[list[Hit]]:
        """The best functions for each query, best first; equal scores keep the given order."""
        if top_k < 1:
            raise ConfigError(f"top_k={top_k} must be at least 1")
        wanted = self.embed_queries(queries)
        found = self.embed_code(codes, language=language)
        scores = self.score(wanted, found)
        results: list[list[Hit]] = []
        for row, line in enumerate(scores):
            best = np.argsort(-line, kind="stable")[:top_k]
            results.append(
                [
                    Hit(
                        index=int(i),
                        score=float(line[i]),
                        best_block=int(np.argmax(found.block_vectors[i] @ wanted[row])),
                    )
                    for i in best
                ]
            )
        return results

    def score(self, queries: np.ndarray, codes: CodeEmbeddings) -> np.ndarray:
        """(n, k) scores: inner products, or by entries with "maxsim" and "soft_maxsim"."""
        if not self.config.keeps_entries:
            return queries @ codes.vectors.T
        found = [entry_score(rows @ queries.T, self.config) for rows in codes.entry_vectors]
        return np.stack(found, axis=1) if found else np.zeros((len(queries), 0), np.float32)


def bare_config(encoder: str, local_files_only: bool = False) -> SeaConfig:
    """Settings for an encoder as it comes: its own pooling where it says so, and no training.

    Half the truncated whole, half the mean of all entries: the best untrained combination.
    """
    folder = encoder_folder(encoder, local_files_only=local_files_only)
    pooling = "mean"
    stated = folder / "1_Pooling" / "config.json"
    if stated.is_file() and '"pooling_mode_cls_token": true' in stated.read_text():
        pooling = "cls"
    return SeaConfig(encoder=encoder, pooling=pooling, aggregator="attn1_mean", raw="whole")


def codes_to_numpy(codes: CodeVectors) -> np.ndarray:
    """(f, d) float32 vectors on the host."""
    return codes.vectors.float().cpu().numpy()
