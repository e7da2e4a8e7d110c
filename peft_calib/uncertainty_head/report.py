"""What was fitted, on what, and what it is worth: the record of an uncertainty head."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..json_files import Fields
from .grid import Trial
from .verdict import Verdict


@dataclass(frozen=True)
class TrialResult:
    """One trial of the grid and how it did on held-out items.

    Attributes:
        trial: Its setting.
        epochs: Epochs after which it was kept.
        error_auroc: Of its scores.
        squared_distance: Of its parameters from their start.
    """

    trial: Trial
    epochs: int
    error_auroc: float
    squared_distance: float


@dataclass(frozen=True)
class HeadReport:
    """What was fitted, on what, and what it is worth.

    Attributes:
        split: `"cross"`, `"train"` or `"validation"`.
        num_fit, num_fit_errors: Items that were trained on, and errors among them.
        num_held, num_held_errors: Items that chose among the trials; of folds, the same ones.
        why_base: Why the frozen model's own score stayed; None where a head is used.
        chosen: Place of the chosen trial in `trials`; None where the base score stayed.
        trials: All of the grid, in order; none where nothing was fitted.
        verdict: Whether it helps; None where nothing was fitted or the base score stayed.
        calibration: Which map gives P(error), and why.
    """

    split: str
    num_fit: int
    num_fit_errors: int
    num_held: int
    num_held_errors: int
    why_base: str | None
    chosen: int | None
    trials: tuple[TrialResult, ...]
    verdict: Verdict | None
    calibration: str

    @property
    def helps(self) -> bool:
        """Whether the head is better than the base score by a 95 % interval that is above 0."""
        return self.verdict is not None and self.verdict.helps

    def __str__(self) -> str:
        fitted = f"{self.num_fit:,} items with {self.num_fit_errors:,} errors ({_WORDS[self.split]})"
        if self.why_base is not None:
            return f"The base score stays: {self.why_base}\n{self.calibration}"
        best = self.trials[self.chosen or 0]
        trial = ", ".join(f"{name} {value:g}" for name, value in asdict(best.trial).items() if name != "epochs")
        lines = [
            f"Fitted on {fitted}; {len(self.trials)} trials, chosen: {trial}, {best.epochs} epochs.",
            *([] if self.verdict is None else [str(self.verdict)]),
            self.calibration,
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_fields(cls, fields: Fields) -> HeadReport:
        """The inverse of `to_dict`, checked."""
        trials = tuple(_trial(fields.source, entry) for entry in fields.listing("trials", dict))
        verdict, chosen = fields.mapping("verdict", None), fields.integer("chosen", least=0, default=None)
        if chosen is not None and chosen >= len(trials):
            raise fields.wrong("chosen", f"below {len(trials)}, the number of trials")
        counts = ("num_fit", "num_fit_errors", "num_held", "num_held_errors")
        return cls(
            split=fields.text("split", among=tuple(_WORDS)),
            **{name: fields.integer(name, least=0) for name in counts},
            why_base=fields.text("why_base", default=None),
            chosen=chosen,
            trials=trials,
            verdict=None if verdict is None else Verdict.from_fields(verdict),
            calibration=fields.text("calibration"),
        )


_WORDS = {
    "cross": "validation rows, each left out once",
    "train": "training rows",
    "validation": "a part of the validation rows",
}


def _trial(source: str, entry: dict[str, Any]) -> TrialResult:
    fields = Fields(entry, source, prefix="trials.")
    own = fields.mapping("trial")
    trial = Trial(own.number("lr"), own.integer("epochs"), own.number("alpha"), own.number("beta"))
    return TrialResult(
        trial, fields.integer("epochs"), fields.number("error_auroc"), fields.number("squared_distance")
    )
