"""Whole numbers as users give them: Python's or numpy's, and neither true nor 3.0."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np


def check_whole(value: Any, name: str, least: int | None = None, most: int | None = None, told: str = "") -> int:
    """Returns a whole number in range as an int, and raises ValueError for anything else.

    Args:
        value: What was given.
        name: What it is called in the message.
        least: The smallest that will do; None for any.
        most: The largest, beside a smallest.
        told: What the message says of the range beyond that.

    Returns:
        The number.

    Example:
        >>> check_whole(np.int64(500), "window", 10)
        500
        >>> check_whole(True, "num_samples", 1)
        Traceback (most recent call last):
        ...
        ValueError: num_samples must be a whole number of at least 1, got True.
    """
    fits = is_whole(value) and (least is None or value >= least) and (most is None or value <= most)
    if not fits:
        ends = "" if least is None else f" of at least {least}" if most is None else f" from {least} to {most:,}"
        raise ValueError(f"{name} must be a whole number{ends}{told}, got {value!r}.")
    return int(value)


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, of any library that registers its own; true and false are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def plain_whole(value: Any) -> Any:
    """The same with numpy's whole numbers as Python's, also inside lists, sets and mappings: JSON has no other."""
    if isinstance(value, np.integer):
        return int(value)
    if type(value) in (list, tuple, set):
        return type(value)(map(plain_whole, value))
    if type(value) is dict:
        return {plain_whole(key): plain_whole(entry) for key, entry in value.items()}
    return value
