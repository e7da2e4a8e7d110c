"""Modules for `evaluate`, each a folder that `evaluate.load` takes by path."""

from __future__ import annotations

from pathlib import Path


def metric_path(name: str = "calibration") -> str:
    """Absolute path of a bundled `evaluate` module.

    Args:
        name: `"calibration"`, `"decision"`, `"selective_prediction"` or `"uncertainty"`.

    Returns:
        The folder, for `evaluate.load`.

    Raises:
        ValueError: For an unknown name. (Given a path that does not exist, `evaluate` would look on the Hub and run
            whatever it finds there under that name.)

    Example:
        >>> metric_path("calibration").endswith("calibration")
        True
    """
    root = Path(__file__).resolve().parent
    known = sorted(folder.name for folder in root.iterdir() if (folder / f"{folder.name}.py").is_file())
    if name not in known:
        raise ValueError(f"No bundled metric is called {name!r}; there are {', '.join(known)}.")
    return str(root / name)
