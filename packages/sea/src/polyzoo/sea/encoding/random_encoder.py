"""An untrained encoder with a vocabulary of its own, for tests and for the tiny recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from polyzoo.core.io import atomic_folder
from polyzoo.core.weights import write_weights

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTINUES = "##"


def build_random(
    target: str | Path,
    *,
    texts: Sequence[str],
    vocab_size: int = 1000,
    layers: int = 2,
    hidden: int = 64,
    max_positions: int = 256,
    seed: int = 0,
) -> Path:
    """Write an untrained BERT encoder with a vocabulary learnt from texts: for tests and demos.

    Args:
        target: Where it goes.
        texts: What the vocabulary is learnt from.
        vocab_size: Most pieces.
        layers: Transformer layers.
        hidden: Channels; heads have 32 of them.
        max_positions: Longest sequence, special tokens included.
        seed: Of the weights.
    """
    from transformers import BertConfig, BertModel

    normalizer = normalizers.BertNormalizer(lowercase=True)
    cutter = pre_tokenizers.BertPreTokenizer()
    words = Counter(
        word
        for text in texts
        for word, _ in cutter.pre_tokenize_str(normalizer.normalize_str(text))
    )
    tokenizer = Tokenizer(
        models.WordPiece(learn_vocabulary(words, size=vocab_size), unk_token="[UNK]")  # noqa: S106
    )
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = cutter
    cls_id, sep_id = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", cls_id), ("[SEP]", sep_id)]
    )
    shape = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 32),
        intermediate_size=2 * hidden,
        max_position_embeddings=max_positions,
        pad_token_id=tokenizer.token_to_id("[PAD]"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(shape, add_pooling_layer=False)
    with atomic_folder(target, replace=True) as folder:
        shape.save_pretrained(folder)
        write_weights(folder / "model.safetensors", model.state_dict())
        tokenizer.save(str(folder / "tokenizer.json"))
    return Path(target)


def learn_vocabulary(words: Mapping[str, int], *, size: int) -> dict[str, int]:
    """Special pieces, all letters, then the most frequent words; the same for the same words.

    (The trainers of `tokenizers` break ties at random.)
    """
    letters = sorted({letter for word in words for letter in word})
    pieces = [*SPECIAL, *letters, *(CONTINUES + letter for letter in letters)]
    known = set(pieces)
    frequent = sorted(words, key=lambda word: (-words[word], word))
    pieces += [word for word in frequent if word not in known][: max(0, size - len(pieces))]
    return {piece: number for number, piece in enumerate(pieces)}
