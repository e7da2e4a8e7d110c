"""What the script `peft-calib` runs: a command, whose error is one line."""

from __future__ import annotations

import sys
from collections.abc import Callable

from ..files import disk_is_full
from .command import app


def main(arguments: list[str] | None = None, load: Callable[[], None] | None = None) -> None:
    """Run a command; an error is one line, with `--debug` a traceback.

    `load` is called once the words are known to make sense, before the command runs.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        app([word for word in words if word != "--debug"], obj=load)
    except (ValueError, OSError, ImportError) as error:  # written for the user
        if debug:
            raise
        sys.exit(f"peft-calib: {_full_disk(error) or error}")
    except Exception as error:
        if debug:
            raise
        first = str(error).strip().partition("\n")[0]
        fault = f"{type(error).__name__}: {first} (--debug shows where)"
        sys.exit(f"peft-calib: {_full_disk(error) or fault}")


def _full_disk(error: Exception) -> str | None:
    """What a user can do where there was no room to write; None for other errors."""
    if not disk_is_full(error):
        return None
    where = getattr(error, "filename", None)
    return (
        f"the disk is full, or a limit for the size of files is reached{f' ({where})' if where else ''}. What was "
        "complete is as it was; make room, and run the same command again"
    )
