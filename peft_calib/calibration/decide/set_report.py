"""What prediction sets reach on rows they have not seen, beside the law that their coverage follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.special import betaincinv, betaln, gammaln

from ...json_files import without_nan
from ..grouping import names_of
from .bounds import band_text, exact_interval, percent
from .selective_report import named


class CoverageLaw(NamedTuple):
    """Coverage of split-conformal sets over calibration splits: Beta(first, second) where no scores are tied.

    With ties it is larger. `P(V <= S_(k))` of a new V is the k-th of n uniform numbers (Vovk, 2012).
    """

    first: float
    second: float

    @property
    def mean(self) -> float:
        """Expected coverage."""
        return self.first / (self.first + self.second)

    def interval(self, confidence_level: float) -> tuple[float, float]:
        """Between which coverages a split's lies, with this probability."""
        tail = 0.5 * (1.0 - confidence_level)
        low, high = betaincinv(self.first, self.second, [tail, 1.0 - tail])
        return float(low), float(high)

    def band(self, num_rows: int, confidence_level: float) -> tuple[float, float]:
        """Between which shares of `num_rows` new rows are covered: central quantiles of the beta-binomial law.

        `P(k) = C(m, k) B(k + a, m - k + b) / B(a, b)`, summed exactly.

        Example:
            >>> CoverageLaw(90, 10).band(100, 0.95)
            (0.81, 0.97)
        """
        k = np.arange(num_rows + 1.0)
        log_mass = (
            gammaln(num_rows + 1.0) - gammaln(k + 1.0) - gammaln(num_rows - k + 1.0)
            + betaln(k + self.first, num_rows - k + self.second) - betaln(self.first, self.second)
        )  # fmt: skip
        below = np.cumsum(np.exp(log_mass))
        tail = 0.5 * (1.0 - confidence_level)
        low, high = (min(int(np.searchsorted(below, share)), num_rows) for share in (tail, 1.0 - tail))
        return low / num_rows, high / num_rows


@dataclass(frozen=True)
class GroupCoverage:
    """Coverage in one group of rows, beside the band it should lie in."""

    group: Any  # Its name, or the class
    num_rows: int
    coverage: float
    band: tuple[float, float]  # All groups' bands hold at once


@dataclass(frozen=True)
class SetReport:
    """Coverage and sizes of prediction sets on new rows.

    Attributes:
        num_rows: Rows.
        alpha: Highest share of rows whose set may miss the label.
        coverage: Share of sets that hold the label.
        coverage_interval: Its exact interval (Clopper & Pearson) for these sets and rows like these.
        expected_coverage: What it is on average over calibration splits, without ties; None with groups.
        band: Where the coverage of so many rows falls, calibration split and new rows both being random
            (beta-binomial); None with groups or weights. Ties and scores without randomisation may lift it above.
        groups: The same for each group, or each class.
        mean_size: Classes in a set.
        sizes: `sizes[k]` sets have k classes.
        singletons: Share of sets of one class.
        singleton_accuracy: Share of these whose class is the label; NaN without one.
        empty: Share of sets without a class.
        confidence_level: Of interval and bands.
    """

    num_rows: int
    alpha: float
    coverage: float
    coverage_interval: tuple[float, float]
    expected_coverage: float | None
    band: tuple[float, float] | None
    groups: tuple[GroupCoverage, ...]
    mean_size: float
    sizes: tuple[int, ...]
    singletons: float
    singleton_accuracy: float
    empty: float
    confidence_level: float

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values; what is not defined is null."""
        return without_nan({**vars(self), "groups": [vars(group) for group in self.groups]})

    def verdict(self, class_names: Sequence[str] | None = None) -> str:
        """In words: how the coverage compares with what the guarantee leads one to expect on these rows."""
        told = f"{percent(self.coverage)} of {self.num_rows} sets hold the label {band_text(self.coverage_interval)}"
        if self.band is None and not self.groups:  # of weighted rows no law is known
            told += f"; {percent(1.0 - self.alpha)} were asked for"
            is_low = self.coverage_interval[1] < 1.0 - self.alpha
            return f"{told}{': too few, these rows are not drawn as the weights say' if is_low else ''}."
        if self.band is None:
            low = [name for name, group in self._named(class_names) if group.coverage < group.band[0]]
            if not low:
                return f"{told}; no group lies below its band."
            return f"{told}; below its band: {', '.join(low[:5])}. These rows are not drawn like those of the fit."
        told += f"; {percent(1.0 - self.alpha)} were asked for, so many rows give {band_text(self.band)}"
        if self.coverage < self.band[0]:
            return f"{told}: too few, these rows are not drawn like those of the fit."
        above = ", or the scores are tied or not randomised" if self.coverage > self.band[1] else ""
        return f"{told}{': more than that, these rows are easier' + above if above else ''}."

    def to_markdown(self, class_names: Sequence[str] | None = None) -> str:
        """The verdict, the sizes, and the groups; those that are classes by their names, if these are given."""
        right = "" if not self.singletons else f" ({percent(self.singleton_accuracy)} of those are right)"
        lines = [
            f"{self.verdict(class_names)} ({percent(self.confidence_level)} interval and band)",
            "",
            f"A set holds {self.mean_size:.2f} classes on average; {percent(self.singletons)} hold one{right}, "
            f"{percent(self.empty)} none.",
        ]
        if self.groups:
            lines += ["", "| group | rows | coverage | band |", "|---|---:|---:|---:|"]
            lines += [
                f"| {name} | {group.num_rows} | {percent(group.coverage)} | {band_text(group.band)} |"
                for name, group in self._named(class_names)
            ]
        return "\n".join(lines)

    def _named(self, class_names: Sequence[str] | None) -> list[tuple[str, GroupCoverage]]:
        if class_names is not None:
            return [(named(group.group, class_names), group) for group in self.groups]
        return list(zip(names_of(group.group for group in self.groups), self.groups, strict=True))

    def __str__(self) -> str:
        return self.to_markdown()


def report_on(
    sets: np.ndarray,
    labels: np.ndarray,
    alpha: float,
    confidence_level: float,
    law: CoverageLaw | None,
    groups: list[tuple[Any, np.ndarray, CoverageLaw | None]],
) -> SetReport:
    """The report of `(N, C)` sets; groups are names, which rows they have, and their laws."""
    covered, sizes = sets[np.arange(len(labels)), labels], sets.sum(axis=1)
    single = sizes == 1
    level = 1.0 - (1.0 - confidence_level) / max(1, len(groups))
    told = tuple(
        GroupCoverage(name, int(mine.sum()), float(covered[mine].mean()), of.band(int(mine.sum()), level))
        for name, mine, of in groups
        if of is not None
    )
    return SetReport(
        num_rows=len(labels),
        alpha=alpha,
        coverage=float(covered.mean()),
        coverage_interval=exact_interval(int(covered.sum()), len(labels), confidence_level),
        expected_coverage=None if law is None else law.mean,
        band=None if law is None else law.band(len(labels), confidence_level),
        groups=told,
        mean_size=float(sizes.mean()),
        sizes=tuple(np.bincount(sizes, minlength=sets.shape[1] + 1).tolist()),
        singletons=float(single.mean()),
        singleton_accuracy=float(covered[single].mean()) if single.any() else float("nan"),
        empty=float((sizes == 0).mean()),
        confidence_level=confidence_level,
    )
