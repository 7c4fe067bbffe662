"""Package roots that cost nothing to import, and optional packages that name their extra."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from polyzoo.core.errors import MissingExtraError


def attach(
    module_name: str, names: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make a package serve its public names on first use.

    Args:
        module_name: The package's `__name__`.
        names: Public name to the relative module that defines it. A name mapped to its own module
            (`{"reference": ".reference"}`) is served as that module.

    Returns:
        `__getattr__`, `__dir__` and `__all__` for the package.

    Example:
        >>> __getattr__, __dir__, __all__ = attach(__name__, {"SeaModel": ".model"})
    """
    public = sorted(names)

    def __getattr__(name: str) -> Any:  # noqa: N807 - it becomes the package's
        if name not in names:
            raise AttributeError(f"module {module_name!r} has no attribute {name!r}")
        module = importlib.import_module(names[name], module_name)
        value = module if names[name] == f".{name}" else getattr(module, name)
        setattr(sys.modules[module_name], name, value)
        return value

    def __dir__() -> list[str]:  # noqa: N807
        return sorted({*vars(sys.modules[module_name]), *public})

    return __getattr__, __dir__, public


def import_extra(module: str, *, install: str) -> ModuleType:
    """Import an optional package, or say what to install.

    Args:
        module: The module to import.
        install: What pip is to be given, such as "polyzoo-core[onnx]".

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module} is needed here and cannot be imported ({error}); run: "
            f"pip install '{install}'"
        ) from error
