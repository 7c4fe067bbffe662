"""A small encoder made out of a larger one of the BERT family: fewer layers, a pruned vocabulary.

The small encoder keeps the rows of the pieces a corpus uses most, so it starts from what the large
one knows. Pieces that are left out are spelled with shorter ones, never lost: the characters and
continuation characters of the old vocabulary stay.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyzoo.core.errors import ConfigError, DataError
from polyzoo.core.io import atomic_folder
from polyzoo.core.vocabulary import keep_pieces
from polyzoo.core.weights import write_weights
from polyzoo.sea.config import StudentConfig
from polyzoo.sea.encoding.random_encoder import CONTINUES, SPECIAL
from polyzoo.sea.encoding.tokenizer import SeaTokenizer
from polyzoo.sea.prepared import Prepared, Ragged


def build_student(
    target: str | Path,
    *,
    teacher_folder: str | Path,
    teacher_weights: Mapping[str, torch.Tensor],
    prepared: Sequence[Prepared],
    config: StudentConfig,
) -> Path:
    """Write a small encoder's folder: config.json, model.safetensors, tokenizer.json.

    Args:
        target: Where it goes.
        teacher_folder: Folder of a BERT encoder with tokenizer.json and config.json.
        teacher_weights: Its weights by Hugging Face name (from training, possibly changed).
        prepared: Corpora in the teacher's pieces; their frequency decides which are kept.
        config: Shape.
    """
    from transformers import AutoConfig

    teacher = Path(teacher_folder)
    shape: Any = AutoConfig.from_pretrained(str(teacher), local_files_only=True)
    if shape.model_type != "bert":
        raise ConfigError(f"a student is cut out of a BERT encoder, not of {shape.model_type!r}")
    if max(config.layers) >= shape.num_hidden_layers:
        raise ConfigError(
            f"layers={config.layers}: the teacher has layers 0 to {shape.num_hidden_layers - 1}"
        )
    if config.max_positions > shape.max_position_embeddings:
        raise ConfigError(
            f"max_positions={config.max_positions}: the teacher has {shape.max_position_embeddings}"
        )
    tokenizer = json.loads((teacher / "tokenizer.json").read_text(encoding="utf-8"))
    if tokenizer["model"].get("type") != "WordPiece":
        raise ConfigError(f"{teacher}: its tokenizer is not WordPiece")
    old: dict[str, int] = tokenizer["model"]["vocab"]
    kept = choose_pieces(old, count_pieces(prepared, size=len(old)), size=config.vocab_size)
    rows = torch.tensor([old[piece] for piece in kept])

    weights: dict[str, torch.Tensor] = {}
    for name, tensor in teacher_weights.items():
        if name.startswith("pooler."):
            continue
        if name == "embeddings.word_embeddings.weight":
            weights[name] = tensor[rows]
        elif name == "embeddings.position_embeddings.weight":
            weights[name] = tensor[: config.max_positions]
        elif name.startswith("encoder.layer."):
            _, _, number, rest = name.split(".", 3)
            for place, layer in enumerate(config.layers):
                if int(number) == layer:
                    weights[f"encoder.layer.{place}.{rest}"] = tensor
        elif not name.endswith("position_ids"):
            weights[name] = tensor
    shape.vocab_size = len(kept)
    shape.num_hidden_layers = len(config.layers)
    shape.max_position_embeddings = config.max_positions
    shape.pad_token_id = kept.index("[PAD]")
    with atomic_folder(target, replace=True) as folder:
        shape.save_pretrained(folder)
        write_weights(
            folder / "model.safetensors", {name: x.float() for name, x in weights.items()}
        )
        smaller = keep_pieces(tokenizer, kept)
        (folder / "tokenizer.json").write_text(
            json.dumps(smaller, ensure_ascii=False, separators=(",", ":")), encoding="utf-8"
        )
    return Path(target)


def count_pieces(prepared: Sequence[Prepared], *, size: int) -> np.ndarray:
    """(size,) how often each piece occurs in queries and blocks."""
    counts = np.zeros(size, dtype=np.int64)
    for part in prepared:
        for rows in (part.queries, part.blocks):
            counts += np.bincount(rows.flat, minlength=size)[:size]
    return counts


def choose_pieces(vocab: Mapping[str, int], counts: np.ndarray, *, size: int) -> list[str]:
    """Special pieces, single characters that occur, then the most frequent, in the old order.

    With every letter of a word kept both as a beginning and as a continuation, any word can be
    spelled, so nothing becomes unknown that was known.
    """
    by_count = sorted(vocab, key=lambda piece: (-counts[vocab[piece]], vocab[piece]))
    letters = {
        character
        for piece in by_count
        if counts[vocab[piece]] and piece not in SPECIAL
        for character in piece.removeprefix(CONTINUES)
    }
    must = [piece for piece in SPECIAL if piece in vocab]
    for letter in sorted(letters):
        must += [piece for piece in (letter, CONTINUES + letter) if piece in vocab]
    chosen = set(must)
    if len(chosen) > size:
        raise ConfigError(
            f"vocab_size={size} does not hold the {len(chosen)} special pieces and characters "
            "of the corpus"
        )
    for piece in by_count:
        if len(chosen) >= size:
            break
        chosen.add(piece)
    return sorted(chosen, key=lambda piece: vocab[piece])


def retokenize(
    prepared: Prepared, *, old: SeaTokenizer, new: SeaTokenizer, max_length: int
) -> Prepared:
    """Spell pieces of one WordPiece vocabulary in a smaller one, keeping queries and blocks.

    Words are put together again and cut greedily, as the tokenizer itself would. Sequences that
    grow beyond `max_length` (special tokens included) are cut there.
    """
    if prepared.origin.tokenizer_sha256 != old.sha256:
        raise DataError("the prepared file was not made with the teacher's tokenizer")
    speller = _Speller(old.vocabulary(), new.vocabulary())
    room = max_length - new.special.count
    return replace(
        prepared,
        origin=replace(
            prepared.origin,
            tokenizer_sha256=new.sha256,
            prefix=new.special.prefix,
            suffix=new.special.suffix,
            vocab_size=new.vocab_size,
        ),
        queries=speller.rows(prepared.queries, room),
        blocks=speller.rows(prepared.blocks, room),
        wholes=speller.rows(prepared.wholes, room),
    )


class _Speller:
    """Spells words of one vocabulary in another, remembering each word."""

    def __init__(self, old: Mapping[str, int], new: Mapping[str, int]) -> None:
        self._pieces = {number: piece for piece, number in old.items()}
        self._continues = np.zeros(max(old.values()) + 1, dtype=bool)
        for piece, number in old.items():
            self._continues[number] = piece.startswith(CONTINUES) and len(piece) > 2
        self._new = new
        self._unknown = new["[UNK]"]
        self._known: dict[tuple[int, ...], list[int]] = {}

    def rows(self, rows: Ragged, room: int) -> Ragged:
        return Ragged.of([self._row(rows[row])[:room] for row in range(len(rows))])

    def _row(self, ids: np.ndarray) -> list[int]:
        if not len(ids):
            return []
        begins = np.flatnonzero(~self._continues[ids])
        if not len(begins) or begins[0] != 0:
            begins = np.concatenate([[0], begins])
        numbers = ids.tolist()
        ends = [*begins[1:].tolist(), len(numbers)]
        result: list[int] = []
        for first, last in zip(begins.tolist(), ends, strict=True):
            word = tuple(numbers[first:last])
            spelled = self._known.get(word)
            if spelled is None:
                spelled = self._known[word] = self._spell(word)
            result += spelled
        return result

    def _spell(self, word: tuple[int, ...]) -> list[int]:
        pieces = [self._pieces[number] for number in word]
        if pieces[0] in SPECIAL:
            return [self._new[pieces[0]]]
        begins_inside = pieces[0].startswith(CONTINUES) and len(pieces[0]) > 2
        text = "".join(piece.removeprefix(CONTINUES) if i or begins_inside else piece
                       for i, piece in enumerate(pieces))  # fmt: skip
        spelled: list[int] = []
        start = 0
        while start < len(text):
            mark = CONTINUES if start or begins_inside else ""
            for end in range(len(text), start, -1):
                number = self._new.get(mark + text[start:end])
                if number is not None:
                    break
            else:
                return [self._unknown]
            spelled.append(number)
            start = end
        return spelled
