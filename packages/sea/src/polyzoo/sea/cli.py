"""The `polyzoo sea` commands. Torch-free: what a command runs is named, and imported only then."""

from __future__ import annotations

from polyzoo.core.cli import Command, CommandGroup
from polyzoo.sea.corpus_config import CorpusConfig

GROUP = CommandGroup(
    summary="Natural-language search over long code",
    commands={
        "build-corpus": Command(
            summary="Mine documented functions from packages, to train and evaluate on",
            config=CorpusConfig,
            run="polyzoo.sea.corpus:build_corpus",
            render="polyzoo.sea.corpus_report:render",
        ),
    },
)
