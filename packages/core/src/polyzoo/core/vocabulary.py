"""Smaller vocabularies for tokenizers of the tokenizers library. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def keep_pieces(tokenizer: dict[str, Any], kept: Sequence[str]) -> dict[str, Any]:
    """Return a tokenizer.json with only these pieces, numbered in this order.

    Truncation and padding are switched off; everything else stays.

    Args:
        tokenizer: Content of tokenizer.json, with a vocabulary that maps pieces to numbers.
        kept: Pieces, among them every one that the post-processor puts around a text.
    """
    new = {piece: number for number, piece in enumerate(kept)}
    smaller = {**tokenizer, "truncation": None, "padding": None}
    smaller["model"] = {**tokenizer["model"], "vocab": new}
    smaller["added_tokens"] = [
        {**token, "id": new[token["content"]]}
        for token in tokenizer.get("added_tokens", [])
        if token["content"] in new
    ]
    template = tokenizer.get("post_processor") or {}
    if template.get("special_tokens"):
        special = {
            name: {**entry, "ids": [new[piece] for piece in entry["tokens"]]}
            for name, entry in template["special_tokens"].items()
        }
        smaller["post_processor"] = {**template, "special_tokens": special}
    return smaller
