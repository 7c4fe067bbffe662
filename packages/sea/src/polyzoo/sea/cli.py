"""The `polyzoo sea` commands. Torch-free: what a command runs is named, and imported only then."""

from __future__ import annotations

from polyzoo.core.cli import Command, CommandGroup
from polyzoo.sea.corpus.config import CorpusConfig
from polyzoo.sea.options import ConvertConfig, EmbedConfig, EvalConfig, PrepareConfig
from polyzoo.sea.presets import PRESETS, SeaTrainConfig
from polyzoo.sea.search.config import IndexConfig, SearchConfig, ServeConfig, StatusConfig

GROUP = CommandGroup(
    summary="Natural-language search over long code",
    commands={
        "build-corpus": Command(
            summary="Mine documented functions from packages, to train and evaluate on",
            config=CorpusConfig,
            run="polyzoo.sea.corpus.build:build_corpus",
            render="polyzoo.sea.corpus.report:render",
        ),
        "prepare": Command(
            summary="Tokenise and split a file once, to train or evaluate elsewhere",
            config=PrepareConfig,
            run="polyzoo.sea.commands:prepare",
        ),
        "train": Command(
            summary="Train a model on pairs of documentation and code",
            config=SeaTrainConfig,
            run="polyzoo.sea.train:main",
            render="polyzoo.sea.train:render",
            presets=PRESETS,
        ),
        "eval": Command(
            summary="Measure how well a model finds functions by their documentation",
            config=EvalConfig,
            run="polyzoo.sea.evaluate:main",
            render="polyzoo.sea.evaluate:render",
        ),
        "embed": Command(
            summary="Write vectors of functions or queries",
            config=EmbedConfig,
            run="polyzoo.sea.commands:embed",
        ),
        "convert": Command(
            summary="Convert an official SEA checkpoint or the CoSQA files",
            config=ConvertConfig,
            run="polyzoo.sea.convert:main",
        ),
        "index": Command(
            summary="Make the index of a repository, or bring it up to date",
            config=IndexConfig,
            run="polyzoo.sea.search.update:main",
            render="polyzoo.sea.search.index_report:render",
        ),
        "search": Command(
            summary="Find code by what it does",
            config=SearchConfig,
            run="polyzoo.sea.search.searcher:main",
            render="polyzoo.sea.search.results:render",
        ),
        "status": Command(
            summary="Describe an index: counts, coverage, freshness",
            config=StatusConfig,
            run="polyzoo.sea.search.status:main",
            render="polyzoo.sea.search.status:render",
        ),
        "serve": Command(
            summary="Answer searches over loopback HTTP or stdio",
            config=ServeConfig,
            run="polyzoo.sea.search.serve:main",
        ),
    },
)
