"""The risk of the rows a rule was fitted on, threshold by threshold, as it is kept beside the rule for its picture."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ...json_files import Fields
from .bounds import upper_end
from .search import Prefixes

#: Points that are kept; rows may be a million.
MOST_POINTS = 200


class RiskCurve(NamedTuple):
    """Sets of the surest rows: how many, and how many of them are wrong."""

    accepted: np.ndarray  # `(P,)` ascending, the last are all rows
    errors: np.ndarray  # `(P,)`
    tail: float  # Error probability of each bound

    @property
    def coverage(self) -> np.ndarray:
        """`(P,)` share of the rows."""
        return self.accepted / self.accepted[-1]

    @property
    def risk(self) -> np.ndarray:
        """`(P,)` share of errors."""
        return self.errors / self.accepted

    @property
    def upper(self) -> np.ndarray:
        """`(P,)` exact upper bound of the risk at each point, at the error probability of a single test."""
        return np.asarray(upper_end(self.errors, self.accepted, self.tail))

    def to_dict(self) -> dict[str, Any]:
        return {"accepted": self.accepted.tolist(), "errors": self.errors.tolist(), "tail": self.tail}

    @classmethod
    def from_fields(cls, fields: Fields) -> RiskCurve:
        """The inverse of `to_dict`, from the fields of a file."""
        accepted, errors = (np.array(fields.listing(name, int), np.int64) for name in ("accepted", "errors"))
        if len(accepted) == 0 or accepted[0] < 1 or (np.diff(accepted) <= 0).any():
            raise fields.wrong("accepted", "ascending numbers of rows")
        if len(errors) != len(accepted) or (errors < 0).any() or (errors > accepted).any():
            raise fields.wrong("errors", "a number of wrong rows for each entry of accepted, no larger than it")
        return cls(accepted, errors, float(fields.number("tail", above=0.0, most=1.0)))


def curve_of(prefixes: Prefixes, tail: float) -> RiskCurve:
    """At most `MOST_POINTS` of the sets, evenly spread, the first and the last among them."""
    size = len(prefixes.accepted)
    chosen = np.unique(np.linspace(0, size - 1, min(size, MOST_POINTS)).round().astype(np.int64))
    return RiskCurve(prefixes.accepted[chosen], prefixes.errors[chosen], tail)
