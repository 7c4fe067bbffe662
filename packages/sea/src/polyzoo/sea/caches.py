"""Where SEA keeps what can be made again. Torch-free."""

from __future__ import annotations

from pathlib import Path

from polyzoo.core.assets.cache import cache_home


def prepared_folder() -> Path:
    """Folder of split files; their names are hashes of all that decides their content."""
    return cache_home() / "sea" / "prepared"
