"""Index a repository in a process of its own, slowly enough to be killed anywhere.

python tests/support/index_child.py REPO OUT SECONDS_PER_BATCH
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from polyzoo.core.errors import PolyzooError
from polyzoo.sea.search.config import IndexConfig
from polyzoo.sea.search.update import build_index
from support.identifier_encoder import IdentifierEncoder


class SlowEncoder(IdentifierEncoder):
    """Takes its time, as a model does."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def embed_code(self, codes, *, language):
        time.sleep(self.seconds)
        return super().embed_code(codes, language=language)


def main() -> int:
    repo, out, seconds = sys.argv[1:4]
    rebuild = "--rebuild" in sys.argv
    config = IndexConfig(repo=Path(repo), out=Path(out), model="identifiers", rebuild=rebuild)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    try:
        build_index(config, embedder=SlowEncoder(float(seconds)))
    except PolyzooError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
