"""`SelectiveThreshold`: answer the rows a model is sure of, pass the others on, and say what that guarantees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...json_files import Fields
from ..answers import as_given
from ..bins import top_label
from ..inputs import check_seed
from ..recalibrate.temperature import TemperatureScaling
from .base import DecisionRule, Taken, refuse_weights
from .bounds import NoGuaranteeError, check_share, percent
from .curve import RiskCurve, curve_of
from .search import NEVER, Found, Prefixes, checked_costs, for_costs, for_coverage, for_risk
from .selective_report import SelectiveReport, named, reached_by
from .threshold_part import ThresholdPart, read_part

#: The risk that is asked for where nothing is.
DEFAULT_RISK = 0.05


class SelectiveThreshold(DecisionRule):
    """A threshold on the confidence, with a guarantee for finitely many rows.

    What is asked for is one of three:

    - `risk` (the default, 0.05): of what is answered at most this share is wrong;
    - `target_coverage`: at least this share of all rows is answered;
    - `costs=(wrong, passed_on)`: the mean cost a row is as low as can be shown, with an upper bound.

    Each holds with probability `confidence` over the rows the rule is fitted on, for new rows drawn like them,
    whatever the model: it need not be calibrated. The bounds are exact (Clopper & Pearson, 1934) and corrected for
    having looked at many thresholds; `decide/search.py` says how and why. Nothing is promised for rows that are drawn
    otherwise.

    Args:
        risk: Highest share of wrong answers, in (0, 1).
        confidence: Probability with which the promise holds.
        target_coverage: Lowest share of rows answered, in (0, 1), instead of a risk.
        costs: Costs of a wrong answer and of a row passed on, instead of a risk.
        per_class: A threshold for each predicted class, so that the risk holds for each, all at once (Bonferroni). A
            class whose rows do not allow it is passed on.
        seed: Of the one thing left to chance: which of many rows of equal confidence a test begins with.
        temperature: Divides the logarithms of the probabilities first; a number or a fitted `TemperatureScaling`, from
            other rows than those of `fit`.

    Attributes:
        threshold: Rows of at least this confidence are answered; `(C,)` with `per_class`, infinite where never.
        bound: The claim as a number: the risk or the mean cost is at most this, the coverage at least. For a risk it
            is the target, or less where every row is answered; per class the largest.
        coverage: Share of rows answered among those of `fit`.
        parts: The thresholds with their rows and errors.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> p = generator.random(1000)
        >>> rows, labels = np.stack([1 - p, p], axis=1), (generator.random(1000) < p).astype(int)
        >>> rule = SelectiveThreshold(risk=0.2).fit(rows, labels)
        >>> round(rule.threshold, 2), int(rule.accept(rows).sum())
        (0.68, 639)
    """

    kinds = ("probabilities", "logits", "confidence")
    kind = "threshold"

    def __init__(
        self,
        risk: float | None = None,
        confidence: float = 0.95,
        *,
        target_coverage: float | None = None,
        costs: tuple[float, float] | None = None,
        per_class: bool = False,
        seed: int = 0,
        temperature: float | TemperatureScaling | None = None,
    ) -> None:
        super().__init__(temperature)
        asked = [value is not None for value in (risk, target_coverage, costs)]
        if sum(asked) > 1:
            raise ValueError("Ask for one of `risk`, `target_coverage` and `costs`; a threshold has one purpose.")
        self.risk = check_share(risk, "risk", 0.05) if risk is not None else None if any(asked) else DEFAULT_RISK
        self.confidence = check_share(confidence, "confidence", 0.95)
        self.target_coverage = target_coverage
        if target_coverage is not None:
            self.target_coverage = check_share(target_coverage, "target_coverage", 0.8)
        self.costs = None if costs is None else checked_costs(costs)
        if per_class and self.risk is None:
            raise ValueError("`per_class` goes with a `risk`: a coverage or costs are of all rows together.")
        self.per_class = bool(per_class)
        self.seed = check_seed(seed)
        self.parts: tuple[ThresholdPart, ...] = ()
        self.curve: RiskCurve | None = None

    def fit(
        self,
        probabilities: Any,
        labels: Any,
        *,
        input: str = "probabilities",
        mask: Any = None,
        ignore_index: int | None = -100,
        sample_weight: Any = None,
        label_names: Sequence[str] | None = None,
    ) -> SelectiveThreshold:
        """Finds the threshold on labelled rows that the model was not trained on.

        Args:
            probabilities: `(N, C)` rows (the mean over draws, say), or `(N,)` for the probability of class 1; numpy,
                torch or lists. Logits if `input="logits"`. With `input="confidence"` `(N,)` numbers in [0, 1], larger
                where surer, of whatever is answered: an entity, a text.
            labels: `(N,)` integer class ids; for confidences 1 where the answer is right and 0 where it is wrong.
            input: `"probabilities"`, `"logits"` or `"confidence"`.
            mask: Boolean; False leaves the row out.
            ignore_index: Label of rows to leave out, or None.
            sample_weight: Refused, with the reason and what to do instead.
            label_names: What to call the classes where none can be answered; their numbers if not given.

        Returns:
            The object itself.

        Raises:
            NoGuaranteeError: If no threshold can be shown to keep the promise; a ValueError that says how many rows it
                would take.
            ValueError: For bad input, or a temperature that was fitted on these rows.
        """
        refuse_weights(
            sample_weight,
            "a threshold rests on exact binomial tests, which count rows, each an independent draw like the rows to "
            "come; no exact test counts weights.",
        )
        options = {"input": input, "mask": mask, "ignore_index": ignore_index}
        taken = self._take(probabilities, labels, **options)
        confidence, predicted, correct = _outcomes(taken.values, taken.labels)
        if self.per_class:
            names = label_names or [f"class {k}" for k in range(taken.values.shape[1])]
            parts = self._fit_classes(confidence, predicted, correct, names)
        else:
            prefixes = Prefixes.of(confidence, correct)
            parts = (ThresholdPart.of(self._search(prefixes), prefixes.num_rows),)
        self._remember(taken, probabilities, labels, options)
        self.parts = parts
        self.curve = curve_of(Prefixes.of(confidence, correct), parts[0].tail)
        return self

    def _search(self, prefixes: Prefixes) -> Found:
        tail = 1.0 - self.confidence
        if self.costs is not None:
            return for_costs(prefixes, *self.costs, tail)
        if self.target_coverage is not None:
            return for_coverage(prefixes, self.target_coverage, tail)
        assert self.risk is not None
        return for_risk(prefixes, self.risk, tail, self.seed)

    def _fit_classes(
        self, confidence: np.ndarray, predicted: np.ndarray, correct: np.ndarray, names: Sequence[str]
    ) -> tuple[ThresholdPart, ...]:
        """A part for each class; the error probability is shared evenly, whichever classes have rows."""
        assert self.risk is not None
        if len(names) == 1:
            raise ValueError('`per_class` needs classes; input="confidence" has none.')
        tail = (1.0 - self.confidence) / len(names)
        parts, reasons = [], []
        for k in range(len(names)):
            mine = predicted == k
            part = ThresholdPart(NEVER, self.risk, int(mine.sum()), 0, 0, tail, k)
            if mine.any():
                try:
                    prefixes = Prefixes.of(confidence[mine], correct[mine])
                    part = ThresholdPart.of(for_risk(prefixes, self.risk, tail, self.seed), prefixes.num_rows, k)
                except NoGuaranteeError as error:
                    reasons.append((k, error))
            parts.append(part)
        if not any(part.answers for part in parts):
            k, least = min(reasons, key=lambda pair: pair[1].rows_needed or math.inf)
            raise NoGuaranteeError(
                f"No predicted class can be answered; {names[k]} is nearest to it. {least}", least.rows,
                least.rows_needed,
            )  # fmt: skip
        return tuple(parts)

    @property
    def threshold(self) -> Any:
        """Rows of at least this confidence are answered; `(C,)` with `per_class`."""
        self._check_fitted()
        if self.per_class:
            return np.array([part.threshold for part in self.parts])
        return self.parts[0].threshold

    @property
    def bound(self) -> float:
        """What is claimed, as a number."""
        self._check_fitted()
        answered = [part.bound for part in self.parts if part.answers]
        return max(answered) if answered else self.parts[0].bound

    @property
    def num_rows(self) -> int:
        """Rows it was fitted on."""
        return sum(part.num_rows for part in self.parts)

    @property
    def coverage(self) -> float:
        """Share of the rows it was fitted on that are answered."""
        self._check_fitted()
        return sum(part.accepted for part in self.parts) / self.num_rows

    def accept(self, probabilities: Any, *, input: str = "probabilities") -> Any:
        """Which rows to answer.

        Args:
            probabilities: As for `fit`, of any rows.
            input: `"probabilities"`, `"logits"` or `"confidence"`.

        Returns:
            `(N,)` booleans, False where to pass on: a torch tensor on the device of a torch tensor, numpy otherwise.

        Raises:
            ValueError: If the rule is not fitted, or was for another number of classes.
        """
        return as_given(self._accepted(self._unlabelled(probabilities, input)), probabilities)

    def _accepted(self, values: np.ndarray) -> np.ndarray:
        confidence, predicted, _ = _outcomes(values, None)
        return confidence >= (self.threshold[predicted] if self.per_class else self.threshold)

    def evaluate(
        self,
        probabilities: Any,
        labels: Any,
        *,
        input: str = "probabilities",
        mask: Any = None,
        ignore_index: int | None = -100,
        confidence_level: float = 0.95,
    ) -> SelectiveReport:
        """Risk and coverage reached on rows that the rule was not fitted on, with exact intervals.

        Args:
            probabilities: As for `fit`.
            labels: As for `fit`.
            input: As for `fit`.
            mask: Boolean; False leaves the row out.
            ignore_index: Label of rows to leave out, or None.
            confidence_level: Of the intervals.

        Raises:
            ValueError: If more than 5 % of the rows were fitted on: such a report would flatter.
        """
        level = check_share(confidence_level, "confidence_level", 0.95)
        taken = self._unseen(probabilities, labels, input, mask, ignore_index)
        _, predicted, correct = _outcomes(taken.values, taken.labels)
        groups = predicted if self.per_class else None
        return reached_by(self._accepted(taken.values), correct, level, self.promise(), self._target(), groups)

    def _decided(self, taken: Taken) -> tuple[np.ndarray, np.ndarray]:
        """`(N,)` which rows are answered, and which predictions are right."""
        return self._accepted(taken.values), _outcomes(taken.values, taken.labels)[2]

    def _target(self) -> dict[str, Any]:
        asked = {"risk": self.risk, "coverage": self.target_coverage, "costs": self.costs}
        return {"target": {key: value for key, value in asked.items() if value is not None}, "bound": self.bound}

    def promise(self) -> str:
        """What the rule guarantees, in one sentence."""
        with_confidence = f"with {percent(self.confidence)} confidence"
        if self.costs is not None:
            wrong, passed_on = self.costs
            return (
                f"At costs of {wrong:g} for a wrong answer and {passed_on:g} for a row passed on, a row costs at most "
                f"{self.bound:.4g} on average, {with_confidence}."
            )
        if self.target_coverage is not None:
            return f"At least {percent(self.target_coverage)} of the rows are answered, {with_confidence}."
        assert self.risk is not None
        most = percent(self.risk)
        if self.per_class:
            return f"Of what is answered as any one class at most {most} is wrong, for all classes {with_confidence}."
        return f"Of what is answered at most {most} is wrong, {with_confidence}."

    def to_markdown(self, class_names: Sequence[str] | None = None) -> str:
        """The promise, what the rows showed, and what is not promised; classes by their names, if these are given."""
        self._check_fitted()
        lines = [self.promise(), ""]
        if self.per_class:
            lines += ["| predicted class | answered from | answered | wrong |", "|---:|---:|---:|---:|"]
            for part in self.parts:
                name = named(part.predicted, class_names)
                lines.append(f"| {name} | {part.where} | {part.accepted} of {part.num_rows} | {part.errors} |")
        else:
            part = self.parts[0]
            lines.append(
                f"Answered {part.where}: {part.accepted} of the {part.num_rows} rows it was fitted on "
                f"({percent(self.coverage)}), {part.errors} of them wrong."
            )
        divided = "" if self.temperature is None else f" Probabilities are taken at T = {self.temperature:.4g}."
        lines += ["", f"This holds for rows drawn like those it was fitted on, and not after a shift.{divided}"]
        return "\n".join(lines)

    def _settings(self) -> dict[str, Any]:
        return {
            "risk": self.risk,
            "confidence": self.confidence,
            "target_coverage": self.target_coverage,
            "costs": None if self.costs is None else list(self.costs),
            "per_class": self.per_class,
            "seed": self.seed,
        }

    def _fitted(self) -> dict[str, Any]:
        assert self.curve is not None
        return {"parts": [part.to_dict() for part in self.parts], "curve": self.curve.to_dict()}

    @classmethod
    def _from_fields(
        cls, settings: Fields, fitted: Fields, num_classes: int, temperature: float | None
    ) -> SelectiveThreshold:
        costs = settings.listing("costs", float, default=None)
        rule = cls(
            settings.number("risk", default=None),
            settings.number("confidence"),
            target_coverage=settings.number("target_coverage", default=None),
            costs=None if costs is None else tuple(costs),
            per_class=settings.flag("per_class"),
            seed=settings.integer("seed", least=0),
            temperature=temperature,
        )
        parts = fitted.listing("parts", dict)
        if len(parts) != (num_classes if rule.per_class else 1):
            raise fitted.wrong("parts", f"{num_classes if rule.per_class else 1} thresholds")
        rule.parts = tuple(
            read_part(Fields(part, fitted.source, fitted.mend, f"{fitted.prefix}parts[{k}]."), k, rule.per_class)
            for k, part in enumerate(parts)
        )
        rule.curve = RiskCurve.from_fields(fitted.mapping("curve"))
        return rule


def _outcomes(values: np.ndarray, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence, predicted class, and whether it is right (False without labels)."""
    if values.shape[1] == 1:
        confidence, predicted = values[:, 0], np.zeros(len(values), np.int64)
        return confidence, predicted, np.zeros(len(values), bool) if labels is None else labels == 1
    confidence, predicted = top_label(values)
    return confidence, predicted, np.zeros(len(values), bool) if labels is None else predicted == labels
