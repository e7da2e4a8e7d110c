"""Tables that were predicted, read back: how sure each row is, and of which class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from ..calibration.watch.taken import FURTHER
from ..json_files import read_json
from ..predictor.shards import MANIFEST
from ..predictor.table import LABEL, PROBABILITY
from .sources import FileFormat, read_splits

MEND = "Make the predictions again"


class PredictedRows(NamedTuple):
    """Columns that a prediction adds."""

    confidence: np.ndarray  # `(N,)` float64
    predicted: np.ndarray  # `(N,)` int64
    further: dict[str, np.ndarray]  # `(N,)` float64 each


@dataclass(frozen=True)
class PredictedFile:
    """One file, and how it was made where that is written beside it."""

    path: Path
    manifest: Mapping[str, Any] | None = None

    def rows(self, form: FileFormat) -> Dataset:
        """Its rows."""
        return next(iter(read_splits(self.path, form=form).values()))

    def check_made_by(self, of: Mapping[str, Any]) -> None:
        """Refuse predictions of another adapter, temperature or way, as far as the folder says how it was made."""
        if self.manifest is None:
            return
        made = {
            "adapters": sorted(self.manifest["adapters"].values()),
            "temperature": self.manifest["temperature"] or 1.0,
            "how": "mean" if self.manifest["how"] == "mean" else "sample",
        }
        wanted = {"adapters": sorted(of["adapters"].values()), "temperature": of["temperature"], "how": of["how"]}
        differing = [name for name, value in wanted.items() if made[name] != value]
        if differing:
            told = "; ".join(f"{name}: {made[name]} there, {wanted[name]} watched" for name in differing)
            raise ValueError(f"{self.path.parent} was not predicted by what is watched ({told})")


def predicted_files(place: Path) -> list[PredictedFile]:
    """A file, or the shards of a folder that `predict_to` wrote, as many as there are."""
    if place.is_file():
        return [PredictedFile(place)]
    if not place.is_dir():
        raise FileNotFoundError(f"there are no predictions {place}")
    if not (place / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{place} is no folder of predictions (it has no {MANIFEST}): name a file that peft-calib predict wrote, "
            "or a folder of predict_to"
        )
    fields = read_json(place / MANIFEST, MEND)
    manifest = {
        "adapters": fields.mapping("adapters").content,
        "temperature": fields.number("temperature", above=0, default=None),
        "how": fields.text("how"),
    }
    return [PredictedFile(path, manifest) for path in sorted(place.glob("shard-*.parquet"))]


def read_predicted(rows: Dataset, source: str, label_names: Sequence[str], prefix: str = "") -> PredictedRows:
    """The added columns of a table, checked; a ValueError says what is missing or cannot be."""
    missing = [f"{prefix}{name}" for name in (LABEL, PROBABILITY) if f"{prefix}{name}" not in rows.column_names]
    if missing:
        raise ValueError(
            f"{source} has no column {', '.join(missing)}, as peft-calib predict adds them; if they have another name "
            "in front, give it with --prefix"
        )
    places = {name: k for k, name in enumerate(label_names)}
    names = [str(name) for name in rows[f"{prefix}{LABEL}"][:]]
    unknown = next((row for row, name in enumerate(names) if name not in places), None)
    if unknown is not None:
        raise ValueError(
            f"{source}: row {unknown} was predicted as {names[unknown]!r}, which is no class of the run "
            f"({', '.join(label_names[:8])})"
        )
    columns = [name for name in FURTHER if f"{prefix}{name}" in rows.column_names]
    return PredictedRows(
        _numbers(rows, f"{prefix}{PROBABILITY}", source),
        np.array([places[name] for name in names], np.int64),
        {name: _numbers(rows, f"{prefix}{name}", source) for name in columns},
    )


def _numbers(rows: Dataset, column: str, source: str) -> np.ndarray:
    try:
        values = np.array(rows[column][:], np.float64)
    except (TypeError, ValueError):
        values = np.array([np.nan])
    if not np.isfinite(values).all() or (values < -1e-5).any():
        raise ValueError(f"{source}: the column {column} must hold a number of at least 0 in every row")
    return values
