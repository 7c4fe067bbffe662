"""Towers that turn text into vectors: a small transformer, and a table of word pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, cast

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from polyzoo.core.assets import asset_folder
from polyzoo.core.device import resolve_device
from polyzoo.core.errors import ConfigError, DataError
from polyzoo.core.weights import load_into, read_weights

if TYPE_CHECKING:
    from transformers import BertConfig

Name = Literal["minilm", "wordllama"]
_BATCH = 64


class TextTower(Protocol):
    """What text towers have in common."""

    dim: int
    """Channels of a vector and of a state."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return one vector a text: `(k, dim)` float32 of length 1 (0 for a text of no pieces)."""
        ...

    def states(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return one vector a word piece, and how many pieces each text has.

        Returns:
            `(k, n, dim)`, zero beyond a text's end, and int64 `(k,)`.
        """
        ...


class MiniLM(nn.Module):
    """all-MiniLM-L6-v2: a BERT of six layers; a text's vector is the mean of its states.

    Reimers and Gurevych, "Sentence-BERT", 2019; Wang et al., "MiniLM", 2020.
    """

    def __init__(self, encoder: nn.Module, tokenizer: Tokenizer, *, max_pieces: int = 256) -> None:
        super().__init__()
        self.encoder = encoder
        config = cast("BertConfig", encoder.config)
        self.dim: int = config.hidden_size
        tokenizer.no_padding()
        tokenizer.enable_truncation(min(max_pieces, config.max_position_embeddings))
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return `(k, dim)` float32 vectors of length 1."""
        rows = self._tokens(texts)
        out = torch.empty(len(rows), self.dim, device=self._device)
        for places, states, lens in self._batches(rows):
            out[places] = F.normalize(states.float().sum(1) / lens[:, None], dim=1)
        return out

    def states(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return `(k, n, dim)` states in the weights' dtype, zero beyond each end, and lengths.

        The first and last piece of a text are the model's own marks.
        """
        rows = self._tokens(texts)
        dtype = next(self.parameters()).dtype
        lens = torch.tensor([len(row) for row in rows], device=self._device)
        longest = max(map(len, rows))
        out = torch.zeros(len(rows), longest, self.dim, device=self._device, dtype=dtype)
        for places, states, _ in self._batches(rows):
            out[places, : states.shape[1]] = states
        return out, lens

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(_checked(texts))]

    @torch.no_grad()
    def _batches(self, rows: list[list[int]]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield places, masked states and lengths; texts of like length go together."""
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        for start in range(0, len(order), _BATCH):
            places = order[start : start + _BATCH]
            chosen = [torch.tensor(rows[place]) for place in places]
            lens = torch.tensor([len(row) for row in chosen], device=self._device)
            ids = nn.utils.rnn.pad_sequence(chosen, batch_first=True).to(self._device)
            mask = torch.arange(ids.shape[1], device=self._device) < lens[:, None]
            out = self.encoder(input_ids=ids, attention_mask=mask.long())
            states = out.last_hidden_state * mask[..., None]
            yield torch.tensor(places, device=self._device), states, lens


class WordLlama(nn.Module):
    """A table of word-piece vectors; a text's vector is their mean: no network at all."""

    def __init__(self, table: Tensor, tokenizer: Tokenizer, *, max_pieces: int = 512) -> None:
        super().__init__()
        self.table = nn.Parameter(table, requires_grad=False)
        self.dim: int = table.shape[1]
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_pieces)
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return `(k, dim)` float32 vectors of length 1; 0 for a text without a word piece."""
        states, lens = self.states(texts)
        return F.normalize(states.float().sum(1) / lens[:, None].clamp(min=1), dim=1)

    def states(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the table's rows of each piece, `(k, n, dim)`, zero beyond each end; lengths."""
        encodings = self._tokenizer.encode_batch(_checked(texts), add_special_tokens=False)
        rows = [torch.tensor(encoding.ids, dtype=torch.long) for encoding in encodings]
        lens = torch.tensor([len(row) for row in rows], device=self.table.device)
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.table.device)
        mask = torch.arange(ids.shape[1], device=self.table.device) < lens[:, None]
        return self.table[ids] * mask[..., None], lens


def load_text_tower(
    name: Name, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> MiniLM | WordLlama:
    """Return a real text tower, frozen, from its fetched asset.

    Args:
        name: "minilm" (384 channels, 22.7 M parameters) or "wordllama" (256, a table of 8.2 M).
        device: Where it computes.
        dtype: Of its weights.

    Raises:
        AssetError: The asset has not been fetched; the message says how to.
        ConfigError: There is no tower of that name.
    """
    if name not in ("minilm", "wordllama"):
        raise ConfigError(f"no text tower {name!r}; there are minilm and wordllama")
    folder, place = asset_folder(name), resolve_device(device)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    weights = read_weights(folder, dtype=torch.float32)
    if name == "wordllama":
        tower = WordLlama(weights["embedding.weight"], tokenizer)
    else:
        tower = MiniLM(_bert(folder, weights), tokenizer)
    return tower.eval().requires_grad_(False).to(place, dtype)


def _bert(folder: Path, weights: dict[str, Tensor]) -> nn.Module:
    from transformers import BertConfig, BertModel

    from polyzoo.attention.integrations.transformers import NAME, register

    register()
    config = BertConfig.from_pretrained(str(folder), local_files_only=True)
    config._attn_implementation = NAME
    with torch.random.fork_rng(devices=[]):  # its random weights must not move the caller's state
        model = BertModel(config, add_pooling_layer=False)
    unused = ("pooler.", "embeddings.position_ids")
    wanted = {key: value for key, value in weights.items() if not key.startswith(unused)}
    load_into(model, wanted, source=str(folder))  # in float32: rounded once, by the caller
    return model


def _checked(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise DataError(f"texts is one string ({texts!r}); give a list of strings")
    if not texts:
        raise DataError("no texts: give at least one")
    return list(texts)
