"""Source text to code blocks: tree-sitter grammars, borders, cuts, and the published splitters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyzoo.core.lazy import attach

if TYPE_CHECKING:
    from polyzoo.sea.splitting.blocks import Block as Block
    from polyzoo.sea.splitting.blocks import Split as Split
    from polyzoo.sea.splitting.blocks import split as split
    from polyzoo.sea.splitting.pieces import Pieces as Pieces
    from polyzoo.sea.splitting.pieces import Tokenize as Tokenize

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Block": ".blocks",
        "Pieces": ".pieces",
        "Split": ".blocks",
        "Tokenize": ".pieces",
        "split": ".blocks",
    },
)
