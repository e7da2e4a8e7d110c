"""`LabelThresholds`: which labels to give a row, and which to rule out, with a guarantee for finitely many rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...json_files import Fields
from ..answers import as_given
from ..decide.base import DecisionRule
from ..decide.bounds import NoGuaranteeError, check_share, percent
from ..decide.search import ALWAYS, NEVER, Prefixes, for_coverage, for_risk
from ..decide.selective_report import named
from ..fingerprint import SplitFingerprint
from ..inputs import check_seed
from .decided import LabelsDecided, labels_decided
from .rows import LabelRows, as_label_probabilities, as_label_rows

#: The share of wrong ones among the rows that are given a label, where nothing else is asked for.
DEFAULT_RISK = 0.1


@dataclass(frozen=True)
class LabelPart:
    """The thresholds of one label, and what the rows of the fit showed."""

    given_from: float  # Rows of at least this probability are given the label; infinite: none is
    ruled_out_below: float  # Rows below it are said not to have it; 0: none is
    num_rows: int  # Rows of the fit that have the label
    given: int  # Rows of the fit that are given it
    errors: int  # Of those, rows that do not have it
    needed: int | None = None  # How many rows it would take to give it, where it is never given and that is known

    @property
    def gives(self) -> bool:
        """Whether any row can be given the label."""
        return self.given_from < NEVER

    def to_dict(self) -> dict[str, Any]:
        """Its fields; a threshold that no row reaches is null."""
        return {**vars(self), "given_from": self.given_from if self.gives else None}

    @classmethod
    def from_fields(cls, fields: Fields) -> LabelPart:
        """The inverse of `to_dict`."""
        start = fields.number("given_from", least=ALWAYS, most=2.0, default=None)
        given, errors = fields.integer("given", least=0), fields.integer("errors", least=0)
        if errors > given:
            raise fields.wrong("errors", f"at most {given}, the rows that are given the label")
        below = float(fields.number("ruled_out_below", least=0.0, most=1.0))
        needed = fields.integer("needed", least=1, default=None)
        num_rows = fields.integer("num_rows", least=0)
        return cls(NEVER if start is None else float(start), below, num_rows, given, errors, needed)


class LabelThresholds(DecisionRule):
    """A threshold for each of several labels, with a guarantee for finitely many rows.

    A label is given to a row where its probability reaches the label's threshold: of the rows that are given a label
    at most `risk` do not have it. With `miss` it is also ruled out where its probability is low: of the rows that have
    a label at most `miss` are said not to. What is neither is left open, for a person.

    Each promise holds with probability `confidence` over the rows of the fit, for new rows drawn like them, whatever
    the model: for all labels at once (`joint`), or for each by itself. Thresholds of given labels come from chains of
    exact binomial tests (`decide/search.py` says why that is valid), on the rows of probability 1/2 and more; those of
    ruled-out labels from the order statistics of the rows that have the label (Wilks, 1941).

    Args:
        risk: In (0, 1); 0.1 if not given.
        miss: In (0, 1), or None: no label is ruled out.
        confidence: In (0, 1).
        joint: Whether the promises hold for all labels at once; the error probability is then shared evenly.
        seed: For ties that a start of a chain falls into.

    Attributes:
        parts: One for each label.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> p = generator.random((2000, 2))
        >>> rule = LabelThresholds(risk=0.2, miss=0.1).fit(p, generator.random(p.shape) < p)
        >>> [round(part.given_from, 2) for part in rule.parts], [round(part.ruled_out_below, 2) for part in rule.parts]
        ([0.76, 0.66], [0.28, 0.27])
    """

    kind = "labels"

    def __init__(
        self,
        risk: float | None = None,
        miss: float | None = None,
        confidence: float = 0.95,
        *,
        joint: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(None)
        self.risk = DEFAULT_RISK if risk is None else check_share(risk, "risk", DEFAULT_RISK)
        self.miss = None if miss is None else check_share(miss, "miss", 0.1)
        self.confidence = check_share(confidence, "confidence", 0.95)
        self.joint, self.seed = bool(joint), check_seed(seed)
        self.parts: tuple[LabelPart, ...] = ()
        self.num_rows = 0

    def fit(
        self, probabilities: Any, labels: Any, *, input: str = "probabilities",
        label_names: Sequence[str] | None = None,
    ) -> LabelThresholds:  # fmt: skip
        """Find the thresholds on labelled rows that the model was not trained on.

        Args:
            probabilities: `(N, L)` probabilities of the labels, or logits.
            labels: `(N, L)` zeros and ones.
            input: `"probabilities"` or `"logits"`.
            label_names: What to call the labels where none can be given; their numbers if not given.

        Returns:
            The object itself.

        Raises:
            NoGuaranteeError: If no label can be given; a ValueError that says how many rows it takes.
            ValueError: For bad input.
        """
        rows = as_label_rows(probabilities, labels, input=input)
        tail = (1.0 - self.confidence) / (1 if self.miss is None else 2) / (rows.num_labels if self.joint else 1)
        found = [self._fit_label(rows, k, tail) for k in range(rows.num_labels)]
        if not any(part.gives for part, _ in found):
            errors = [error for _, error in found if error is not None]
            short = [((error.rows_needed or math.inf) - error.rows, -error.rows) for error in errors]
            nearest = short.index(min(short))
            error = errors[nearest]
            least = (
                "Nearest to it is" if error.rows_needed else "No number of such rows would do for any of them, as for"
            )
            told = f"label {nearest}" if label_names is None else repr(label_names[nearest])
            at_once = f" for all {rows.num_labels} labels at once" if self.joint and rows.num_labels > 1 else ""
            raise NoGuaranteeError(
                f"No label can be given at a risk of {percent(self.risk)} with {percent(self.confidence)} confidence"
                f"{at_once}. {least} {told}, by the rows where its probability is 1/2 "
                f"and more: {error}",
                error.rows, error.rows_needed,
            )  # fmt: skip
        self.parts = tuple(part for part, _ in found)
        self.num_classes, self.num_rows = rows.num_labels, len(rows.labels)
        self.fitted_on = SplitFingerprint.of_hashes(rows.hashes)
        return self

    def _fit_label(self, rows: LabelRows, k: int, tail: float) -> tuple[LabelPart, NoGuaranteeError | None]:
        p, y = rows.probabilities[:, k], rows.labels[:, k] == 1
        part, error = LabelPart(NEVER, 0.0, int(y.sum()), 0, 0), None
        likely = p >= 0.5
        try:
            if not likely.any():
                raise NoGuaranteeError("No row of the fit has a probability of 1/2 for it.", 0, None)
            found = for_risk(Prefixes.of(p[likely], y[likely]), self.risk, tail, self.seed)
            # all rows that were looked at are those from 1/2 on
            part = replace(part, given_from=max(found.threshold, 0.5), given=found.accepted, errors=found.errors)
        except NoGuaranteeError as told:
            part, error = replace(part, needed=told.rows_needed), told
        if self.miss is not None and y.any():
            try:
                below = for_coverage(Prefixes.of(p[y], np.ones(int(y.sum()), bool)), 1.0 - self.miss, tail).threshold
                part = replace(part, ruled_out_below=min(below, part.given_from, 1.0))
            except NoGuaranteeError:
                pass  # it is never ruled out, which breaks no promise
        return part, error

    def predict(self, probabilities: Any, *, input: str = "probabilities") -> Any:
        """Which labels are given: `(N, L)` booleans, a torch tensor for one.

        Raises:
            ValueError: If the rule is not fitted, or was for another number of labels.
        """
        return as_given(self._checked(probabilities, input) >= self._starts, probabilities)

    def ruled_out(self, probabilities: Any, *, input: str = "probabilities") -> Any:
        """Which labels are ruled out, `(N, L)` booleans likewise."""
        below = np.array([part.ruled_out_below for part in self.parts])
        return as_given(self._checked(probabilities, input) < below, probabilities)

    @property
    def _starts(self) -> np.ndarray:
        return np.array([part.given_from for part in self.parts])

    def _checked(self, probabilities: Any, input: str) -> np.ndarray:
        self._check_fitted()
        p = as_label_probabilities(probabilities, input=input)
        if p.shape[1] != self.num_classes:
            raise ValueError(f"{type(self).__name__} was fitted for {self.num_classes} labels, got {p.shape[1]}.")
        return p

    def evaluate(
        self, probabilities: Any, labels: Any, *, input: str = "probabilities", mask: Any = None,
        confidence_level: float = 0.95,
    ) -> LabelsDecided:  # fmt: skip
        """What is reached on rows that the rule was not fitted on, with exact intervals; `mask` leaves rows out.

        Raises:
            ValueError: If more than 5 % of the rows were fitted on: such a report would flatter.
        """
        level = check_share(confidence_level, "confidence_level", 0.95)
        rows = as_label_rows(probabilities, labels, input=input)
        if mask is not None:
            rows = LabelRows(*(part[np.asarray(mask, bool)] for part in rows))
        self._refuse_own(rows.hashes)
        given, out = self.predict(rows.probabilities), self.ruled_out(rows.probabilities)
        asked = {"risk": self.risk, "miss": self.miss}
        return labels_decided(given, out, rows.labels == 1, level, self.promise(), asked)

    def promise(self) -> str:
        """What the rule guarantees, in one sentence."""
        missed = "" if self.miss is None else (
            f", and of the rows that have a label at most {percent(self.miss)} are said not to"
        )  # fmt: skip
        of = "for all labels at once" if self.joint else "for each label by itself"
        return (
            f"Of the rows that are given a label at most {percent(self.risk)} do not have it{missed}, {of} with "
            f"{percent(self.confidence)} confidence."
        )

    def to_markdown(self, class_names: Sequence[str] | None = None) -> str:
        """The promise, one line a label, and what is not promised."""
        self._check_fitted()
        lines = [self.promise(), "", "| label | rows with it | given from | given | of them wrong | ruled out below |"]
        lines.append("|---|---:|---:|---:|---:|---:|")
        for k, part in enumerate(self.parts):
            start = f"{part.given_from:.4f}" if part.gives else "never"
            start += f" (some {part.needed} likely rows needed)" if not part.gives and part.needed else ""
            below = f"{part.ruled_out_below:.4f}" if part.ruled_out_below > 0 else "never"
            cells = [named(k, class_names), str(part.num_rows), start, str(part.given), str(part.errors), below]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", f"Fitted on {self.num_rows} rows. This holds for rows drawn like those, and not after a shift."]
        return "\n".join(lines)

    def _settings(self) -> dict[str, Any]:
        own = {"risk": self.risk, "miss": self.miss, "confidence": self.confidence}
        return {**own, "joint": self.joint, "seed": self.seed}

    def _fitted(self) -> dict[str, Any]:
        return {"num_rows": self.num_rows, "parts": [part.to_dict() for part in self.parts]}

    @classmethod
    def _from_fields(
        cls, settings: Fields, fitted: Fields, num_classes: int, temperature: float | None
    ) -> LabelThresholds:
        rule = cls(
            settings.number("risk"), settings.number("miss", default=None), settings.number("confidence"),
            joint=settings.flag("joint"), seed=settings.integer("seed", least=0),
        )  # fmt: skip
        parts = fitted.listing("parts", dict)
        if len(parts) != num_classes:
            raise fitted.wrong("parts", f"{num_classes} labels")
        places = (f"{fitted.prefix}parts[{k}]." for k in range(num_classes))
        rule.parts = tuple(
            LabelPart.from_fields(Fields(part, fitted.source, fitted.mend, place))
            for part, place in zip(parts, places, strict=True)
        )
        rule.num_rows = fitted.integer("num_rows", least=1)
        return rule
