"""The `polyzoo seed` commands. Torch-free: what a command runs is named, and imported only then."""

from __future__ import annotations

from polyzoo.core.cli import Command, CommandGroup
from polyzoo.seed.options import (
    CaptionConfig,
    ChatConfig,
    ConvertConfig,
    DetokenizeConfig,
    DrawConfig,
    EvalConfig,
    PrepareConfig,
    TokenizeConfig,
)
from polyzoo.seed.presets import (
    LANGUAGE_PRESETS,
    TOKENIZER_PRESETS,
    LanguageTrainConfig,
    TokenizerTrainConfig,
)

GROUP = CommandGroup(
    summary="Images as sentences of codes that a language model reads and writes",
    commands={
        "prepare": Command(
            summary="Make the text side of a training: word pieces and sentence vectors",
            config=PrepareConfig,
            run="polyzoo.seed.prepare:main",
        ),
        "train-tokenizer": Command(
            summary="Train one stage of a tokenizer",
            config=TokenizerTrainConfig,
            run="polyzoo.seed.train:train_tokenizer",
            render="polyzoo.seed.tokenizer_stages:render",
            presets=TOKENIZER_PRESETS,
        ),
        "train-lm": Command(
            summary="Teach a language model a tokenizer's codes, whole or by adapters",
            config=LanguageTrainConfig,
            run="polyzoo.seed.train:train_language",
            render="polyzoo.seed.language_training:render",
            presets=LANGUAGE_PRESETS,
        ),
        "tokenize": Command(
            summary="Turn many pictures into token shards, resumable",
            config=TokenizeConfig,
            run="polyzoo.seed.tokenizing:main",
            render="polyzoo.seed.tokenizing:render",
        ),
        "detokenize": Command(
            summary="Draw codes",
            config=DetokenizeConfig,
            run="polyzoo.seed.commands:detokenize",
        ),
        "caption": Command(
            summary="Say what pictures show",
            config=CaptionConfig,
            run="polyzoo.seed.commands:caption",
            render="polyzoo.seed.commands:render_captions",
        ),
        "draw": Command(
            summary="Draw texts",
            config=DrawConfig,
            run="polyzoo.seed.commands:draw",
        ),
        "chat": Command(
            summary="Talk in text and pictures",
            config=ChatConfig,
            run="polyzoo.seed.chat:main",
        ),
        "convert": Command(
            summary="Convert published checkpoints or token tars, or merge adapters",
            config=ConvertConfig,
            run="polyzoo.seed.convert:main",
        ),
        "eval": Command(
            summary="Measure what codes keep, captions, and drawings",
            config=EvalConfig,
            run="polyzoo.seed.evaluation:main",
            render="polyzoo.seed.evaluation:render",
        ),
    },
)
