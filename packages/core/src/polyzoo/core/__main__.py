"""`python -m polyzoo.core` is `polyzoo`."""

from polyzoo.core.cli import main

raise SystemExit(main())
