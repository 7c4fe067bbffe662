"""Prompts to captions: cleaning, tokens, and warnings about what is lost on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from polyzoo.core.errors import DataError
from polyzoo.core.log import get_logger
from polyzoo.pixart_delta.captions import PackedCaptions
from polyzoo.pixart_delta.cleaning import clean_prompt
from polyzoo.pixart_delta.t5 import T5Encoder
from polyzoo.pixart_delta.words import WordEncoder

_log = get_logger(__name__)
LENGTH_STEP = 16
"""Token rows are padded to a multiple of this, so that few shapes occur."""


@torch.no_grad()
def encode_prompts(
    prompts: Sequence[str],
    *,
    encoder: T5Encoder | WordEncoder | Any,
    tokenizer: Any = None,
    length: int = 120,
    cleaning: bool = True,
    negative: bool = False,
) -> PackedCaptions:
    """Encode prompts; each gets its real tokens and no padding.

    Args:
        prompts: One or more.
        encoder: A T5Encoder with its tokenizer, or a WordEncoder.
        tokenizer: transformers' T5 tokenizer.
        length: Most tokens of a prompt; the rest is cut, and named in a warning.
        cleaning: Clean as in training; else only lower-case and strip.
        negative: An empty prompt is then wanted, and causes no warning.

    Raises:
        DataError: A prompt is no text, or there is none.
    """
    if not prompts:
        raise DataError("there is no prompt: give one, or prompt_embeds")
    cleaned: list[str] = []
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise DataError(f"a prompt is text, not {type(prompt).__name__}")
        text = clean_prompt(prompt, cleaning=cleaning)
        if not text and not negative:
            _log.warning(
                "the prompt %r is empty after cleaning: an image of nothing in particular "
                "will be drawn", prompt[:60],
            )  # fmt: skip
        cleaned.append(text)
    if isinstance(encoder, WordEncoder):
        return encoder.encode(cleaned)
    return _encode_t5(cleaned, encoder, tokenizer, length)


def _encode_t5(
    prompts: Sequence[str], encoder: T5Encoder | Any, tokenizer: Any, length: int
) -> PackedCaptions:
    if tokenizer is None:
        raise DataError("the text encoder has no tokenizer; load the pipeline with both")
    rows = [_token_ids(tokenizer, prompt, length) for prompt in prompts]
    lengths = tuple(len(row) for row in rows)
    n = -(-max(lengths) // LENGTH_STEP) * LENGTH_STEP
    ids = torch.zeros(len(rows), n, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    device = encoder.device
    kv_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    states = encoder(ids.to(device), kv_lens)
    packed = [states[index, :count] for index, count in enumerate(lengths)]
    return PackedCaptions(torch.cat(packed), lengths)


def _token_ids(tokenizer: Any, prompt: str, length: int) -> list[int]:
    ids: list[int] = tokenizer(prompt, truncation=False, add_special_tokens=True).input_ids
    if len(ids) > length:
        lost = tokenizer.decode(ids[length - 1 : -1])
        _log.warning("the prompt is longer than %d tokens; left out: %r", length, lost)
        ids = [*ids[: length - 1], ids[-1]]
    return ids
