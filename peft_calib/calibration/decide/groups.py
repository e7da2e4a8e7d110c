"""For which parts of the rows a coverage holds: none, classes, predicted classes, or groups given by name."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..inputs import as_numpy

#: By the right class, by the predicted one, or by names that come with the rows.
BY_LABEL, BY_PREDICTION, BY_NAME = "label", "predicted", "given"
KINDS = (BY_LABEL, BY_PREDICTION, BY_NAME)


def grouping_of(groups: Any) -> tuple[str | None, Any]:
    """The kind of groups that an argument asks for, and the names of rows if it holds them."""
    if groups is None:
        return None, None
    if isinstance(groups, str):
        if groups not in KINDS:
            raise ValueError(f"`groups` must be None, one of {KINDS} or the name of each row's group, got {groups!r}.")
        return groups, None
    return BY_NAME, groups


def as_names(groups: Any, num_rows: int) -> np.ndarray:
    """`(N,)` names, texts or whole numbers, one for every row."""
    if groups is None:
        raise ValueError("These sets go by groups: pass `groups`, the name of every row's group.")
    names = as_numpy(groups, "groups")
    if names.dtype == object and all(isinstance(name, str) for name in names.flat):
        names = names.astype(str)
    if names.dtype.kind not in "iuU":
        raise TypeError(f"groups must be texts or whole numbers, got dtype {names.dtype}.")
    if names.shape != (num_rows,):
        raise ValueError(f"groups have shape {names.shape}, but there are {num_rows} rows; give one for each.")
    return names


def called(kind: str | None, group: Any) -> str:
    """A group as it is named in a message."""
    return {BY_LABEL: f"class {group}", BY_PREDICTION: f"predicted class {group}"}.get(kind or "", f"group {group!r}")
