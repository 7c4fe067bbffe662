"""What two or more polyzoo packages share. Importing it loads neither torch nor pydantic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyzoo.core.lazy import attach

if TYPE_CHECKING:
    from polyzoo.core.errors import AssetError as AssetError
    from polyzoo.core.errors import ConfigError as ConfigError
    from polyzoo.core.errors import DataError as DataError
    from polyzoo.core.errors import Interrupted as Interrupted
    from polyzoo.core.errors import LockedError as LockedError
    from polyzoo.core.errors import MissingExtraError as MissingExtraError
    from polyzoo.core.errors import PolyzooError as PolyzooError
    from polyzoo.core.errors import UsageError as UsageError
    from polyzoo.core.errors import WeightsError as WeightsError

__getattr__, __dir__, __all__ = attach(
    __name__,
    dict.fromkeys(
        (
            "AssetError",
            "ConfigError",
            "DataError",
            "Interrupted",
            "LockedError",
            "MissingExtraError",
            "PolyzooError",
            "UsageError",
            "WeightsError",
        ),
        ".errors",
    ),
)
