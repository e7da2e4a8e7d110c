"""The cut of one group of rows: how it is fitted, and how it is read again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...json_files import Fields
from .bounds import NoGuaranteeError, fewest_rows, percent
from .groups import called, read_group
from .set_report import CoverageLaw
from .set_scores import Cut, cut_at, rank_for, smoothed_cut
from .weighted_cut import WeightedCut


@dataclass(frozen=True)
class SetPart:
    """The cut of one group of rows, or of one class; of all rows where there is no group."""

    group: Any  # None, a class, or the group's name
    num_rows: int  # Rows it was fitted on
    cut: Cut | WeightedCut
    law: CoverageLaw | None  # None where rows are weighed

    def chance(self, scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """With which chance classes of these scores are in the set; `weights` of the rows where the cut takes them."""
        if isinstance(self.cut, WeightedCut):
            assert weights is not None
            return self.cut.chance(scores, weights)
        return self.cut.chance(scores)

    def to_dict(self) -> dict[str, Any]:
        law = None if self.law is None else list(self.law)
        return {"group": self.group, "num_rows": self.num_rows, "cut": self.cut.to_list(), "law": law}


def fit_part(
    scores: np.ndarray, group: Any, grouping: str | None, *, alpha: float, confidence: float | None, smoothed: bool
) -> SetPart:
    """The cut of `(n,)` scores of right classes; a NoGuaranteeError says how many rows it takes."""
    num_rows = len(scores)
    rank = rank_for(num_rows, alpha, confidence)
    if rank > num_rows:
        needed = rows_needed(alpha, confidence)
        where = "" if group is None else f" of {called(grouping, group)}"
        sure = "" if confidence is None else f" in {percent(confidence)} of the splits"
        raise NoGuaranteeError(
            f"{num_rows} rows{where} cannot bound the share of sets that miss the label by {percent(alpha)}{sure}: "
            f"that takes {needed} rows. Label more, take a larger alpha, or put groups together.",
            num_rows, needed,
        )  # fmt: skip
    if smoothed:
        allowed = alpha * (num_rows + 1)
        return SetPart(group, num_rows, smoothed_cut(scores, alpha), CoverageLaw(num_rows + 1 - allowed, allowed))
    return SetPart(group, num_rows, cut_at(scores, rank), CoverageLaw(rank, num_rows + 1 - rank))


def rows_needed(alpha: float, confidence: float | None) -> int:
    """The fewest rows whose largest score is a cut.

    Example:
        >>> rows_needed(0.1, None), rows_needed(0.05, None), rows_needed(0.1, 0.95)
        (9, 19, 29)
    """
    if confidence is not None:  # the largest of n scores covers with Beta(n, 1): (1 - alpha)^n at most 1 - confidence
        return fewest_rows(alpha, 1.0 - confidence)
    rows = max(1, int(1.0 / alpha) - 2)
    while rank_for(rows, alpha, None) > rows:
        rows += 1
    return rows


def read_part(fields: Fields, grouping: str | None, alpha: float, smoothed: bool) -> SetPart:
    """The inverse of `to_dict`; `alpha` and whether chance decides are the rule's."""
    group = read_group(fields, grouping)
    if isinstance(fields.get("cut"), dict) and grouping is None:
        weighted = WeightedCut.from_fields(fields, "cut", alpha, smoothed)
        return SetPart(group, len(weighted.scores), weighted, None)
    law = fields.array("law", (2,))
    if (law <= 0.0).any():
        raise fields.wrong("law", "two numbers above 0")
    return SetPart(
        group, fields.integer("num_rows", least=1), Cut.from_fields(fields, "cut"), CoverageLaw(*map(float, law))
    )
