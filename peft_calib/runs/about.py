"""What the page of an evaluation says it reports on."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .embedded import called
from .loading import FinishedRun
from .rows import TestRows

PACKAGES = ("peft-calib", "torch", "transformers", "peft")


def told_of(run: FinishedRun, rows: TestRows, variant: str, num_samples: int) -> dict[str, str]:
    """Run, model, data, temperature, date and versions, each as a line.

    Args:
        run: That is reported on.
        rows: That it is measured on.
        variant: Its way of predicting, `"mean"` or `"sample"`.
        num_samples: With so many draws.
    """
    config, fit = run.task.config, run.temperature_fit(variant)
    way = "mean adapter" if variant == "mean" else f"{num_samples} draws, their probabilities averaged"
    left_out = f"; {rows.left_out} that the run has seen are left out" if rows.left_out else ""
    cut = f"; {rows.cut} of them cut to {config.max_length} tokens, as in training" if rows.cut else ""
    return {
        "method": f"{config.method}, {way}",
        "base model": called(config.model),
        "trained on": _without_folders(config.data),
        "measured on": f"{_without_folders(rows.name)}, {len(rows.rows):,} rows{cut}{left_out}",
        "temperature": fit["reason"] if fit is not None else "none",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
    }


def _without_folders(source: str) -> str:
    """A file by its name: a page is shown to others, whom the folders of one machine tell nothing. Hub ids stay."""
    return Path(source).name if Path(source).is_absolute() else source


def class_names(run: FinishedRun, probabilities: Any) -> tuple[str, ...] | None:
    """Names of the columns of probabilities; none where not every one of them is a class of the task."""
    names = None if run.task.labels is None else run.task.labels.names
    return names if names is not None and len(names) == probabilities.shape[-1] else None
