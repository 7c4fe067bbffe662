"""The `polyzoo sea` commands. Torch-free: what a command runs is named, and imported only then."""

from __future__ import annotations

from polyzoo.core.cli import Command, CommandGroup
from polyzoo.sea.search_config import IndexConfig, SearchConfig, ServeConfig, StatusConfig

GROUP = CommandGroup(
    summary="Natural-language search over long code",
    commands={
        "index": Command(
            summary="Make the index of a repository, or bring it up to date",
            config=IndexConfig,
            run="polyzoo.sea.update:main",
            render="polyzoo.sea.update:render",
        ),
        "search": Command(
            summary="Find code by what it does",
            config=SearchConfig,
            run="polyzoo.sea.search:main",
            render="polyzoo.sea.results:render",
        ),
        "status": Command(
            summary="Describe an index: counts, coverage, freshness",
            config=StatusConfig,
            run="polyzoo.sea.status:main",
            render="polyzoo.sea.status:render",
        ),
        "serve": Command(
            summary="Answer searches over loopback HTTP or stdio",
            config=ServeConfig,
            run="polyzoo.sea.serve:main",
        ),
    },
)
