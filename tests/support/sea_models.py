"""Tiny real encoders and functions for the SEA tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from polyzoo.sea.config import SeaConfig, SplitConfig
from polyzoo.sea.encoding.encoder import PackedEncoder
from polyzoo.sea.encoding.encoder_loading import register_attention
from polyzoo.sea.encoding.random_encoder import build_random

VERBS = ("read", "write", "sort", "merge", "count", "hash", "open", "close", "print", "parse")
NOUNS = ("file", "list", "table", "index", "user", "image", "number", "word", "path", "date")


def function(verb: str, noun: str, *, lines: int = 3) -> str:
    """Python source whose names say what it does."""
    body = "\n".join(f"    {noun}_{i} = {verb}_step({noun}, {i})" for i in range(lines))
    return f"def {verb}_{noun}({noun}):\n{body}\n    return {verb}({noun})\n"


def records(*, long_every: int = 5) -> list[dict[str, Any]]:
    """100 documented functions; every fifth one has several blocks."""
    found = []
    for i, verb in enumerate(VERBS):
        for j, noun in enumerate(NOUNS):
            lines = 30 if (i * 10 + j) % long_every == 0 else 3
            found.append(
                {
                    "url": f"u/{verb}/{noun}",
                    "language": "python",
                    "original_string": function(verb, noun, lines=lines),
                    "code": function(verb, noun, lines=lines),
                    "docstring_tokens": ["how", "to", verb, "a", noun],
                }
            )
    return found


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def encoder_folder(folder: Path, *, layers: int = 2, hidden: int = 64) -> Path:
    """A random BERT encoder with a vocabulary of the functions above."""
    texts = [text for row in records() for text in (row["code"], " ".join(row["docstring_tokens"]))]
    return build_random(folder, texts=texts, vocab_size=400, layers=layers, hidden=hidden, seed=1)


def shape(encoder: Path | str, **changes: Any) -> SeaConfig:
    """A model configuration with small blocks."""
    split = SplitConfig(budget=62, min_tokens=4)
    return SeaConfig(**{"encoder": str(encoder), "split": split, "max_query_tokens": 16, **changes})


def tiny_roberta(*, pooling: str = "pooler") -> PackedEncoder:
    """A RoBERTa whose positions start behind its padding id."""
    from transformers import RobertaConfig, RobertaModel

    register_attention()
    torch.manual_seed(3)
    config = RobertaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=40, type_vocab_size=1, pad_token_id=1,
        initializer_range=0.3, attn_implementation="polyzoo",
    )  # fmt: skip
    return PackedEncoder(RobertaModel(config), pooling=pooling).eval()  # pyright: ignore[reportArgumentType]


def sequences(
    count: int = 9, *, low: int = 4, high: int = 58, longest: int = 30
) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(low, high, (n,), generator=generator).tolist() for n in lengths]
