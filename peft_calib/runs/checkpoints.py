"""Which checkpoint a killed run may be resumed from."""

from __future__ import annotations

import json
from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

__all__ = ["last_complete_checkpoint"]


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint that was written to its end.

    The Trainer writes its state file last, so a checkpoint without a readable one was interrupted; the adapter's
    weights are opened as well.

    Args:
        folder: the Trainer's output folder.

    Returns:
        The checkpoint's folder, or `None`.

    Example:
        >>> last_complete_checkpoint("nowhere") is None
        True
    """
    places = [
        path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()
    ]
    for path in sorted(places, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if _is_complete(path):
            return path
    return None


def _is_complete(checkpoint: Path) -> bool:
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        weights = checkpoint / SAFETENSORS_WEIGHTS_NAME
        if weights.exists():  # a sharded checkpoint has other files
            with safe_open(weights, framework="pt") as file:
                file.keys()
    except (OSError, json.JSONDecodeError, SafetensorError):
        return False
    return isinstance(state, dict) and "global_step" in state
