"""The command line: `peft-calib`, one small file a command.

`command` says what all commands share, `options` what several take; nothing here loads torch before a command runs.
"""

# In the order of the help. Importing a command's module registers it.
from . import demo, train, train_head, decide, evaluate, compare, predict, watch, export, card, push, push_metric  # noqa: I001
from .command import INTERRUPTED, app
from .main import main

__all__ = [
    "INTERRUPTED", "app", "card", "compare", "decide", "demo", "evaluate", "export", "main", "predict", "push",
    "push_metric", "train", "train_head", "watch",
]  # fmt: skip
