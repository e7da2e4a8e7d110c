"""What the script `peft-calib` starts with: its help, and what is wrong with a command, are told without torch.

Measuring needs torch and scipy, seconds of work. Here the packages that load them stand in `sys.modules` with their
folders and without their content, so that the command line below them can be imported; a command that is about to run
has them filled (`load` of `peft_calib.cli`).
"""

import importlib
import sys
from importlib.util import find_spec, module_from_spec

#: From the outermost on; the modules of the command line import no other package with a content.
PACKAGES = ("peft_calib.calibration", "peft_calib.calibration.scores")


def main() -> None:
    """Run the command that the script was called with."""
    try:
        _run()
    except KeyboardInterrupt:  # before a command could say what becomes of it
        print("Interrupted before anything began.", file=sys.stderr)
        sys.exit(130)


def _run() -> None:
    empty: list[str] = []
    for name in PACKAGES:
        if name not in sys.modules and (spec := find_spec(name)) is not None:
            sys.modules[name] = module_from_spec(spec)
            empty.insert(0, name)

    def load() -> None:
        while empty:  # the innermost first: what has been imported from it stays the same object
            importlib.reload(sys.modules[empty.pop(0)])

    importlib.import_module("peft_calib.cli").main(load=load)
