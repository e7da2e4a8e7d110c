"""What thresholds of labels reach on rows that they have not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...json_files import without_nan
from ..decide.bounds import band_text, exact_interval, percent
from ..decide.selective_report import named


@dataclass(frozen=True)
class LabelReached:
    """One label: how many rows are given it, how many of them wrongly, and how many that have it are ruled out."""

    num_rows: int
    given: int
    errors: int
    ruled_out: int
    missed: int
    risk: float
    risk_interval: tuple[float, float]
    miss: float
    miss_interval: tuple[float, float]


@dataclass(frozen=True)
class LabelsDecided:
    """What `LabelThresholds` reach on new rows.

    Attributes:
        num_rows: Rows.
        labels: One entry a label; its intervals are exact (Clopper & Pearson) and hold one by one.
        found: Share of the labels that hold which are given.
        open: Share of answers that are neither given nor ruled out.
        above: Labels whose risk, or share of missed ones, is above the target beyond what chance explains.
        confidence_level: Of the intervals.
        promise: What the rule guarantees.
        settings: Its targets.
    """

    num_rows: int
    labels: tuple[LabelReached, ...]
    found: float
    open: float
    above: tuple[int, ...]
    confidence_level: float
    promise: str
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values; a share of nothing is null."""
        return without_nan({**vars(self), "labels": [vars(one) for one in self.labels], "above": list(self.above)})

    def verdict(self) -> str:
        """In one sentence."""
        given, errors = sum(one.given for one in self.labels), sum(one.errors for one in self.labels)
        held = sum(one.num_rows for one in self.labels)
        told = f"On {self.num_rows} rows {given} labels are given, {errors} of them wrongly; "
        told += f"of the {held} labels that hold {percent(self.found)} are given." if held else "no label holds."
        if self.above:
            told += f" {len(self.above)} label(s) are above the target by more than chance explains."
        return told

    def to_markdown(self, class_names: Sequence[str] | None = None) -> str:
        """The verdict, one line a label and the promise."""
        rules_out = self.settings["miss"] is not None
        header = ["label", "rows with it", "given", "wrong", "risk", "interval"]
        header += ["ruled out", "missed", "interval"] if rules_out else []
        lines = [self.verdict(), "", f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
        for k, one in enumerate(self.labels):
            cells = [named(k, class_names), str(one.num_rows), str(one.given), str(one.errors)]
            cells += _share(one.risk, one.risk_interval, one.given)
            if rules_out:
                cells += [str(one.ruled_out), *_share(one.miss, one.miss_interval, one.num_rows)]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join([*lines, "", f"Promised: {self.promise}"])

    def __str__(self) -> str:
        return self.to_markdown()


def _share(share: float, ends: tuple[float, float], of: int) -> list[str]:
    return [percent(share), band_text(ends)] if of else ["–", "–"]


def labels_decided(
    given: np.ndarray, out: np.ndarray, held: np.ndarray, level: float, promise: str, settings: dict[str, Any]
) -> LabelsDecided:
    """The report of `(N, L)` booleans: labels that are given, that are ruled out, and that hold."""
    found, above = [], []
    for k in range(given.shape[1]):
        rows, number, errors = int(held[:, k].sum()), int(given[:, k].sum()), int((given & ~held)[:, k].sum())
        missed = int((out & held)[:, k].sum())
        risk, miss = (a / b if b else float("nan") for a, b in ((errors, number), (missed, rows)))
        risks, misses = exact_interval(errors, number, level), exact_interval(missed, rows, level)
        found.append(LabelReached(rows, number, errors, int(out[:, k].sum()), missed, risk, risks, miss, misses))
        limits = ((risks, settings["risk"]), (misses, settings["miss"]))
        if any(limit is not None and ends[0] > limit for ends, limit in limits):
            above.append(k)
    share = float((given & held).sum() / held.sum()) if held.any() else float("nan")
    still = float((~given & ~out).mean())
    return LabelsDecided(len(given), tuple(found), share, still, tuple(above), level, promise, settings)
