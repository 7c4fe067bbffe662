"""Where SEA keeps what can be made again. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path


def prepared_folder() -> Path:
    """Folder of split files; their names are hashes of all that decides their content."""
    home = os.environ.get("POLYZOO_HOME")
    root = Path(home) if home else Path.home() / ".cache" / "polyzoo"
    return root / "sea" / "prepared"
