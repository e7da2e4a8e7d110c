"""For which parts of the rows a coverage holds: none, classes, predicted classes, or groups given by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...json_files import Fields, describe
from ..grouping import Grouping, as_groups, exact, names_of

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


def as_names(groups: Any, labels: Any, kept: np.ndarray | None = None) -> Grouping:
    """The groups of the rows that are left of `labels`, whose values a file can hold."""
    if groups is None:
        raise ValueError("These sets go by groups: pass `groups`, the name of every row's group.")
    found = as_groups(groups, labels, kept, most=None)
    for value in found.values:
        if not _can_be_stored(value):
            raise TypeError(
                f"groups must be texts, finite numbers, booleans or tuples of them, which a file can hold; got "
                f"{describe(value)}. Give its text, `str(value)`."
            )
    return found


def as_classes(classes: np.ndarray) -> Grouping:
    """The groups of `(N,)` class ids."""
    values, member = np.unique(classes, return_inverse=True)
    return Grouping(tuple(values.tolist()), names_of(values.tolist()), member)


def places_in(known: Sequence[Any], rows: Grouping, kind: str | None) -> np.ndarray:
    """`(N,)` place of each row's group among the known ones; value and type must be the same.

    Raises:
        ValueError: For a group that is not known.
    """
    place = {exact(value): index for index, value in enumerate(known)}
    for value in rows.values:
        if exact(value) not in place:
            told = ", ".join(map(repr, known[:8])) + (f" and {len(known) - 8} more" if len(known) > 8 else "")
            same_text = any(str(value) == str(other) or value == other for other in known)
            raise ValueError(
                f"There is no cut for {called(kind, value)}: the rows of the fit have none of it. Known are {told}. "
                + ("Give groups in the type they had in the fit." if same_text else
                   "Fit again with rows of every group, or without groups.")
            )  # fmt: skip
    return np.array([place[exact(value)] for value in rows.values], np.int64)[rows.member]


def called(kind: str | None, group: Any) -> str:
    """A group as it is named in a message."""
    return {BY_LABEL: f"class {group}", BY_PREDICTION: f"predicted class {group}"}.get(kind or "", f"group {group!r}")


def read_group(fields: Fields, kind: str | None) -> Any:
    """A group out of a file, where a tuple is a list."""
    group = _with_tuples(fields.get("group"))
    is_class = isinstance(group, int) and not isinstance(group, bool)
    if not {None: group is None, BY_NAME: _can_be_stored(group)}.get(kind, is_class):
        raise fields.wrong("group", "null without groups, and otherwise a class or the value of a group")
    return group


def _can_be_stored(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_can_be_stored, value))
    return type(value) in (str, int, bool) or (type(value) is float and math.isfinite(value))


def _with_tuples(value: Any) -> Any:
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
