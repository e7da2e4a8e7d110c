"""What a watch says: how the newest rows compare with the reference, in words, as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...json_files import without_nan
from ..decide.bounds import percent
from .estimates import SAME_ERROR, Expected

LABELS_TELL = "After any other change no estimate holds: only labels of some of these rows tell."


@dataclass(frozen=True)
class Alarm:
    """One signal.

    Attributes:
        signal: What is watched: `"confidence"`, `"class 3"`, `"mutual_information"` or `"error_probability"`.
        raised_at: Row, counted from 1, at which the evidence reached what is needed; None where it has not.
        evidence: Wealth of the bets against "nothing has changed" now, as a natural logarithm.
        peak: The largest it has been.
        needed: At how much there is an alarm, as a logarithm.
    """

    signal: str
    raised_at: int | None
    evidence: float
    peak: float
    needed: float


@dataclass(frozen=True)
class WatchReport:
    """Where a watch stands.

    Attributes:
        rows: Unlabelled rows since the start.
        window_rows: The newest of them, which the estimates are of.
        reference_rows: Labelled rows of the reference.
        reference_accuracy: Their accuracy.
        reference_interval: Its interval (Wilson).
        reference_overconfidence: Their mean confidence less accuracy.
        confidence: Mean confidence of the window; None without a row.
        expected: Estimates of the accuracy, each with what it rests on; empty without rows enough.
        brier: Brier score of the confidence to be expected where the first estimate holds, and its interval.
        alarms: One entry a signal.
        false_alarm: Highest probability of any alarm, however many rows come, as long as nothing changes.
        confidence_level: Of the intervals.
    """

    rows: int
    window_rows: int
    reference_rows: int
    reference_accuracy: float
    reference_interval: tuple[float, float]
    reference_overconfidence: float
    confidence: float | None
    expected: tuple[Expected, ...]
    brier: tuple[float, tuple[float, float]] | None
    alarms: tuple[Alarm, ...]
    false_alarm: float
    confidence_level: float

    @property
    def alarmed(self) -> bool:
        """Whether any signal has raised an alarm since the start."""
        return any(one.raised_at is not None for one in self.alarms)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        parts = {
            "alarmed": self.alarmed,
            "expected": {one.name: one.to_dict() for one in self.expected},
            "alarms": [vars(one) for one in self.alarms],
        }
        return without_nan({**vars(self), **parts})

    def to_markdown(self) -> str:
        """The alarm, the estimates and what each rests on."""
        level = percent(self.confidence_level)
        reference = (
            f"{self.rows:,} unlabelled rows, held against {self.reference_rows:,} labelled ones with accuracy "
            f"{_told(self.reference_accuracy, self.reference_interval)} ({level} intervals)."
        )
        return "\n".join([*self._alarm_lines(), reference, *self._estimate_lines()])

    def _alarm_lines(self) -> list[str]:
        raised = [one for one in self.alarms if one.raised_at is not None]
        rate = percent(self.false_alarm)
        if not raised:
            return [
                f"No alarm. (Chance alone raises one with a probability of at most {rate}, however many rows come.)"
            ]
        lines = [
            f"ALARM: the distribution of {one.signal} is not that of the reference (row {one.raised_at:,})."
            for one in raised
        ]
        return [*lines, f"Chance alone raises any alarm, ever, with a probability of at most {rate}."]

    def _estimate_lines(self) -> list[str]:
        if not self.expected:
            return ["Too few rows yet to expect an accuracy of."]
        lines = [f"Accuracy to be expected of the newest {self.window_rows:,} rows:"]
        for one in self.expected:
            if one.accuracy is None or one.interval is None:
                lines.append(f"- not to be had if {one.holds_if}: {one.why_not};")
                continue
            sure = f"surer than right by {100 * (one.overconfidence or 0.0):+.1f} points"
            lines.append(f"- {_told(one.accuracy, one.interval)} if {one.holds_if}; {sure};")
        if self.brier is not None:
            lines.append(f"- a Brier score of {self.brier[0]:.4f} [{self.brier[1][0]:.4f}, {self.brier[1][1]:.4f}] "
                         f"if {SAME_ERROR}.")  # fmt: skip
        return [*lines, LABELS_TELL]

    def __str__(self) -> str:
        return self.to_markdown()


def _told(value: float, interval: tuple[float, float]) -> str:
    return f"{100 * value:.1f} % [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
