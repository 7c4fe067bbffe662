"""Serve an index with the tests' encoder, in a process of its own.

python tests/support/serve_child.py INDEX '{"port": 0}' [SECONDS_PER_QUERY]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from polyzoo.core.errors import PolyzooError
from polyzoo.sea.search.config import ServeConfig
from polyzoo.sea.search.serve import serve
from support.identifier_encoder import IdentifierEncoder


class SlowEncoder(IdentifierEncoder):
    """Takes its time over a query, as a large model does."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def embed_queries(self, queries):
        time.sleep(self.seconds)
        return super().embed_queries(queries)


def main() -> int:
    settings = json.loads(sys.argv[2])
    seconds = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
    try:
        config = ServeConfig(index=Path(sys.argv[1]), **settings)
        report = serve(config, embedder=SlowEncoder(seconds))
    except PolyzooError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return error.exit_code
    sys.stderr.write(
        f"requests {report.requests} refused {report.refused} failed {report.failed}\n"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
