"""The methods are registered as soon as PEFT is loaded, and PEFT is not loaded for it.

Who measures calibration needs no adapter, and PEFT with transformers is nearly all of what importing them costs. So
importing `peft_calib` registers at once where PEFT is there already, and else leaves a finder that waits for it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_with_peft() -> None:
    """Register the methods now, or when PEFT has been imported."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _WaitingForPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WaitingForPeft())


def _register() -> None:
    """The tuners register themselves as they are imported."""
    from . import tuners  # noqa: F401
    from .classes import name_classes_of_adapters

    name_classes_of_adapters()


class _WaitingForPeft(MetaPathFinder):
    """Finds PEFT and our modules where the others find them, and registers when the import that brought PEFT is over.

    Over, and not merely when PEFT is there: the first to import it may be a module that the tuners need themselves
    (`peft_calib.identity`), and they would find half of it. So imports of ours count as one with what they import.
    """

    def __init__(self) -> None:
        self.running = threading.local()  # each thread has imports of its own

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft" and not fullname.startswith(f"{__package__}."):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def then_register(module: ModuleType) -> None:
                self.running.depth = getattr(self.running, "depth", 0) + 1
                try:
                    load(module)
                finally:
                    self.running.depth -= 1
                if not self.running.depth and "peft" in sys.modules and self in sys.meta_path:
                    sys.meta_path.remove(self)
                    _register()

            # on this one loader: a wrapper class would have to pass on resources, source and all else that is asked
            spec.loader.exec_module = then_register  # type: ignore[method-assign]
        return spec
