"""Classes of one's own on the command line: `module:Class`."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def named_class(name: str, what: str, base: type) -> Any:
    """The class under `module:Class`, also from the folder its user is in."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:  # as for a script, whose folder Python looks in by itself
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise ValueError(f"{what} is {name!r}, but {module} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{what} is {name!r}, which names no subclass of {base.__module__}.{base.__name__}")
    return found
