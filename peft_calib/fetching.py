"""Files of a repository on the Hub, fetched where there is no folder of that name here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError


def local_folder(name: str | Path, patterns: Sequence[str], what: str, **hub: Any) -> Path:
    """The folder of that name here, or else the files of that Hub id.

    Args:
        name: A folder, or a Hub id.
        patterns: Of the files to fetch.
        what: What is looked for, for the message where there is neither.
        hub: Arguments of `snapshot_download`: `revision`, `token`, `cache_dir`.

    Raises:
        FileNotFoundError: If there is neither, or the Hub cannot be read.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(patterns), **hub))
    except HFValidationError:
        raise FileNotFoundError(f"{name} is no folder here and no Hub id, so there is no {what} to load.") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        told = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"{name} is no folder here, and cannot be read from the Hub: {told}") from error
