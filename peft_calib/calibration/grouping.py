"""Groups of rows: one value a row, in any kind of array, turned into names and the group of each row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..json_files import describe
from .inputs import as_numpy

#: Every group is measured by itself. More are a number or an identity, not a kind of row.
MOST_GROUPS = 1000
# What pandas has for a missing value; it is not imported to be asked.
_MISSING = ("NAType", "NaTType")


@dataclass(frozen=True)
class Grouping:
    """Which group each row is in; groups are in the order of their values."""

    values: tuple[Any, ...]  # No two of equal value and type
    names: tuple[str, ...]  # As they are told, no two alike
    member: np.ndarray  # `(N,)` int64 index of each row's group

    def rows_of(self, group: int) -> np.ndarray:
        """Indices of its rows, ascending."""
        return np.flatnonzero(self.member == group)


def as_groups(values: Any, labels: Any, kept: np.ndarray | None = None, most: int | None = MOST_GROUPS) -> Grouping:
    """The groups of the rows that are left of `labels`; 1, "1", 1.0 and True are four.

    Args:
        values: One hashable value a row, of the labels' shape; or one for each entry of their first axis, for all
            tokens of a sequence. Numpy, torch, pandas or lists.
        labels: The labels that were given, whose shape it is.
        kept: `(M,)` bool, rows that were not left out; None for all. Values of the others are not looked at.
        most: Groups that are allowed; None for any number.

    Raises:
        ValueError, TypeError: For another shape, a missing value, one that cannot be hashed, or too many groups.
    """
    found: dict[Any, tuple[int, Any]] = {}
    chosen = values_of_rows(values, labels, kept).tolist()
    member, missing = np.empty(len(chosen), np.int64), []
    for row, value in enumerate(chosen):
        value = _plain(value)
        if _is_missing(value):
            missing.append(row)
            continue
        try:
            member[row], _ = found.setdefault(exact(value), (len(found), value))
        except TypeError:
            raise TypeError(
                f"groups must be hashable values (text, numbers, tuples of them); row {row} has {describe(value)}."
            ) from None
    if missing:
        raise ValueError(
            f"groups has no value (None or NaN) in {len(missing)} of {len(chosen)} rows, first in row {missing[0]}. "
            'Give these rows a group of their own (`groups.fillna("unknown")`), or leave them out with `mask`.'
        )
    if most is not None and len(found) > most:
        raise ValueError(
            f"groups has {len(found):,} different values in {len(chosen):,} rows; at most {most:,} are "
            "measured. Cut a number into ranges, or join rare values."
        )
    order = _in_order([value for _, value in found.values()])
    rank = np.empty(len(order), np.int64)
    rank[[found[exact(value)][0] for value in order]] = np.arange(len(order))
    return Grouping(tuple(order), names_of(order), rank[member])


def exact(value: Any) -> Any:
    """A key that tells values of different types apart, which Python takes for one where they are numbers."""
    return (tuple, *map(exact, value)) if isinstance(value, tuple) else (type(value), value)


def values_of_rows(values: Any, labels: Any, kept: np.ndarray | None = None) -> np.ndarray:
    """`(N,)` the values of the rows that are left, whatever they are."""
    shape = as_numpy(labels, "labels").shape
    array = _as_array(values, shape)
    if array.shape == shape[:1]:
        array = np.repeat(array, int(np.prod(shape[1:])))
    elif array.shape != shape:
        raise ValueError(
            f"groups has shape {array.shape}, but the rows have shape {shape}: give one value a row. Several "
            "columns become one value a row as tuples, `list(zip(first, second))`."
        )
    array = array.reshape(-1)
    return array if kept is None else array[kept]


def _as_array(values: Any, shape: tuple[int, ...]) -> np.ndarray:
    if not isinstance(values, (list, tuple)):
        array = as_numpy(values, "groups")
        # Dates would come out as whole numbers of nanoseconds.
        if array.dtype.kind not in "mM":
            return array
        missing, array = np.isnat(array), array.astype(str).astype(object)
        array[missing] = None
        return array
    if len(shape) > 1 and any(isinstance(value, list) for value in values):
        return np.array(values, dtype=object)
    array = np.empty(len(values), object)
    for row, value in enumerate(values):  # numpy would take tuples for columns
        array[row] = value
    return array


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's: a tensor is hashed by where it lies, not by what it holds."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def _is_missing(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(map(_is_missing, value))
    is_nan = isinstance(value, float) and value != value
    return value is None or is_nan or type(value).__name__ in _MISSING


def _in_order(values: list[Any]) -> list[Any]:
    try:
        return sorted(sorted(values, key=repr))  # 1, 1.0 and True are equal, and still have an order
    except TypeError:  # of several types
        return sorted(values, key=lambda value: (str(value), repr(value)))


def names_of(values: Iterable[Any]) -> tuple[str, ...]:
    """Texts as they are where that tells them apart and something can be seen; else as Python writes them."""
    values = list(values)
    names = [str(value) for value in values]
    told = tuple(
        name if name.strip() and names.count(name) == 1 else repr(value)
        for name, value in zip(names, values, strict=True)
    )
    if len(set(told)) < len(told):
        raise ValueError(f"groups has different values of one name, {describe(told)}; give them names.")
    return told
