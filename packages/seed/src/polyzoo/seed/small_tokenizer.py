"""The small language model's tokenizer: the text branch's pieces, with beginning and end."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer

from polyzoo.seed.text_pieces import TextPieces


def small_tokenizer(pieces: TextPieces) -> Any:
    """Return a transformers tokenizer over a text branch's pieces.

    [CLS] begins and [SEP] ends a text; nothing is added on its own.
    """
    from transformers import PreTrainedTokenizerFast

    content = json.loads(pieces.tokenizer.to_str())
    content["post_processor"] = None
    markers = {
        "bos_token": "[CLS]",
        "eos_token": "[SEP]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), **markers
    )
