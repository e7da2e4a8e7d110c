"""One threshold, for all rows or for those of one predicted class, as it is kept in a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...json_files import Fields
from .search import ALWAYS, NEVER, Found


@dataclass(frozen=True)
class ThresholdPart:
    """A threshold for all rows, or for those of one predicted class."""

    threshold: float  # Rows of at least this confidence are answered; infinite: none is
    bound: float  # What is claimed: see `SelectiveThreshold.bound`
    num_rows: int  # Rows it was fitted on
    accepted: int  # Answered rows among them
    errors: int  # Wrong ones among the answered
    tail: float  # Error probability of each single test or bound
    predicted: int | None = None  # The class, or None for all rows

    @classmethod
    def of(cls, found: Found, num_rows: int, predicted: int | None = None) -> ThresholdPart:
        return cls(found.threshold, found.bound, num_rows, found.accepted, found.errors, found.tail, predicted)

    @property
    def answers(self) -> bool:
        """Whether any row can be answered."""
        return self.threshold < NEVER

    @property
    def where(self) -> str:
        """From which confidence on, in words."""
        if not self.answers:
            return "never"
        return "always" if self.threshold == ALWAYS else f"from a confidence of {self.threshold:.4f} on"

    def to_dict(self) -> dict[str, Any]:
        """Its fields; a threshold that no row reaches is null."""
        return {**vars(self), "threshold": self.threshold if self.answers else None}


def read_part(fields: Fields, k: int, per_class: bool) -> ThresholdPart:
    """The inverse of `to_dict`, of the k-th class or of all rows."""
    threshold = fields.number("threshold", least=ALWAYS, most=2.0, default=None)
    num_rows, accepted, errors = (
        fields.integer("num_rows", least=0), fields.integer("accepted", least=0), fields.integer("errors", least=0)
    )  # fmt: skip
    if not errors <= accepted <= num_rows:
        raise fields.wrong("accepted", f"a number of rows from {errors} (the wrong ones) to {num_rows} (all)")
    if fields.integer("predicted", default=None) != (k if per_class else None):
        raise fields.wrong("predicted", f"{k if per_class else 'null'}")
    return ThresholdPart(
        NEVER if threshold is None else float(threshold),
        float(fields.number("bound", least=0.0)),
        num_rows, accepted, errors,
        float(fields.number("tail", above=0.0, most=1.0)),
        k if per_class else None,
    )  # fmt: skip
