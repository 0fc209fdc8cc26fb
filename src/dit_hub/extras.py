"""Optional packages: imported where they are used, and named with their extra where they are missing."""

import importlib
from typing import Any


def require(module: str, extra: str) -> Any:
    """Import an optional package.

    Args:
        module: its import name.
        extra: the extra of dit-hub that installs it.

    Raises:
        ImportError: it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
        raise ImportError(f'This needs {module}, which is not installed: pip install "dit-hub[{extra}]".') from None
