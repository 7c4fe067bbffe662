"""The text branch's word pieces: a WordPiece vocabulary cut out of a larger one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from polyzoo.core.errors import ConfigError, DataError
from polyzoo.core.vocabulary import keep_pieces

FILE_NAME = "tokenizer.json"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_CONTINUES = "##"


class TextPieces:
    """From texts to padded ids and masks, [CLS] first.

    Example:
        >>> ids, mask = TextPieces.load("models/seed").encode(["a red apple"], length=16)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        pad = tokenizer.token_to_id("[PAD]")
        if pad is None or tokenizer.token_to_id("[CLS]") is None:
            raise DataError("the text branch needs a tokenizer with [PAD] and [CLS]")
        self.pad: int = pad

    @classmethod
    def load(cls, path: str | Path) -> TextPieces:
        """Read tokenizer.json, or the one in a folder."""
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        if not path.is_file():
            raise DataError(f"{path}: no such file; `polyzoo seed prepare` writes one")
        return cls(Tokenizer.from_file(str(path)))

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, texts: Sequence[str], *, length: int) -> tuple[Tensor, Tensor]:
        """Return int64 ids (b, n) and bool mask (b, n), n the longest or `length`."""
        rows = [found.ids[:length] for found in self.tokenizer.encode_batch(list(texts))]
        width = max((len(row) for row in rows), default=1)
        ids = torch.full((len(rows), width), self.pad)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        lengths = torch.tensor([len(row) for row in rows])
        return ids, torch.arange(width)[None] < lengths[:, None]


def cut_vocabulary(tokenizer: dict[str, Any], texts: Iterable[str], *, size: int) -> dict[str, Any]:
    """Return a WordPiece tokenizer.json with the pieces that matter, in the old order.

    Kept: special pieces, every letter as beginning and continuation (so nothing becomes unknown),
    the pieces of the texts by frequency, then whole words in the old order, which is by frequency.

    Args:
        tokenizer: The larger tokenizer.json.
        texts: What will be read most.
        size: Pieces to keep.
    """
    if tokenizer["model"].get("type") != "WordPiece":
        raise ConfigError("the vocabulary can only be cut out of a WordPiece tokenizer")
    old: dict[str, int] = tokenizer["model"]["vocab"]
    full = Tokenizer.from_str(json.dumps(tokenizer))
    counts: Counter[str] = Counter()
    for found in full.encode_batch(list(texts), add_special_tokens=False):
        counts.update(found.tokens)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    must = [*SPECIAL, *letters, *(_CONTINUES + x for x in letters), *",.!?'-:&()/"]
    kept = dict.fromkeys(piece for piece in must if piece in old)
    for piece, _ in counts.most_common():
        if len(kept) >= size:
            break
        kept.setdefault(piece)
    for piece in sorted(old, key=lambda piece: old[piece]):
        if len(kept) >= size:
            break
        if piece.isalpha() and piece.isascii() and len(piece) > 2:
            kept.setdefault(piece)
    chosen = sorted(kept, key=lambda piece: (piece not in SPECIAL, old[piece]))
    return keep_pieces(tokenizer, chosen)


def whole_words(tokenizer: Tokenizer) -> list[str]:
    """Return the vocabulary's whole words, to teach the text branch one by one."""
    vocabulary = tokenizer.get_vocab()
    words = (w for w in vocabulary if w.isalpha() and w.isascii() and len(w) > 2)
    return sorted(words, key=lambda word: vocabulary[word])
