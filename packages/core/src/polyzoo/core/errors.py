"""The errors polyzoo raises for reasons a person can act on. Any other that escapes is a bug."""

from __future__ import annotations

from typing import ClassVar


class PolyzooError(Exception):
    """What was given, what is allowed, and what to do about it.

    Example:
        >>> raise PolyzooError("out/: disk full; free 3 MB or choose another folder")
        Traceback (most recent call last):
        polyzoo.core.errors.PolyzooError: out/: disk full; free 3 MB or choose another folder
    """

    exit_code: ClassVar[int] = 1
    """Process exit status when the error ends a command."""


class ConfigError(PolyzooError, ValueError):
    """A configuration names an unknown field, or holds a value its rule forbids."""


class DataError(PolyzooError, ValueError):
    """An input (image, archive, record, text) is broken, too large, or of the wrong kind."""


class WeightsError(PolyzooError, ValueError):
    """A weight file is unreadable, unsafe, or does not fit the model."""


class AssetError(PolyzooError):
    """An asset is absent, or is not the file that was pinned."""


class MissingExtraError(PolyzooError, ImportError):
    """An optional dependency is needed; the message names what to install."""


class LockedError(PolyzooError):
    """Another process is using the folder."""


class UsageError(PolyzooError):
    """The command line is wrong."""

    exit_code: ClassVar[int] = 2


class Interrupted(PolyzooError):  # noqa: N818 - an outcome to resume from, not a failure
    """Work was stopped by a signal after saving; the same command resumes it."""

    exit_code: ClassVar[int] = 75
