"""Optional packages: imported when first needed, with an error that names the extra to install."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType


class MissingExtraError(ImportError):
    """An optional package is not installed."""


def is_installed(module: str) -> bool:
    """Whether a module is there, without importing it; of a dotted one the packages that hold it are imported."""
    return importlib.util.find_spec(module) is not None


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module.

    Parameters
    ----------
    module : str
        Dotted name, such as ``"transformers"`` or ``"matplotlib.pyplot"``.
    extra : str
        The extra of this package that brings it.

    Raises
    ------
    MissingExtraError
        If the package is absent; an ImportError whose message is the command that installs it. A package that is
        present and fails to import raises its own error.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise
        raise MissingExtraError(f'{top} is not installed; run: pip install "sketch_walk[{extra}]"', name=top) from error
