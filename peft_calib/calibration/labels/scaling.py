"""Temperatures of labels: one for all, one for each, or one with a bias for each; left off where rows say too little.

With independent sigmoids a label is a question of two classes with logits `(0, z)`, so everything that holds of a
temperature of classes holds here. A joint temperature is that of all labels of all rows; those of one row are added up
before their scatter is taken, because they lean the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import chdtrc, expit

from ...json_files import Fields
from ..answers import as_given
from ..fingerprint import SplitFingerprint
from ..inputs import LogitRows
from ..recalibrate.fitted import FittedMethod
from ..recalibrate.per_class import logistic_regression
from ..recalibrate.temperature import POSSIBLE
from ..recalibrate.temperature_fit import BOUNDS, LEVEL, TemperatureFit, check_enough_rows, temperature_fit
from .report import LabelsReport, labels_report
from .rows import as_label_probabilities, as_label_rows, label_logits

#: One temperature for all labels, one for each, or one with a bias for each (Platt, 1999).
KINDS = ("joint", "label", "platt")
#: How far a bias may move a label's logit.
MOST_BIAS = 100.0


class LabelScaling(FittedMethod):
    """`sigmoid(z_l / T_l + b_l)` for each label, with what least negative log-likelihood says (Guo et al., 2017).

    Args:
        kind: `"joint"`: one temperature for all labels, no bias. `"label"`: one for each. `"platt"`: one for each,
            and a bias, which also mends a base rate that has moved; with few rows the least sure of the three.

    Attributes:
        temperatures: `(L,)`, 1 where the rows do not support one.
        biases: `(L,)`, 0 but for `"platt"`.
        reason: In one sentence, what was fitted and whether it is applied.

    Raises:
        ValueError: For another kind.

    Example:
        >>> z = np.tile([[4.0, -2.0]], (40, 1))
        >>> y = np.array([[1, 0], [1, 0], [1, 1], [0, 0]] * 10)
        >>> LabelScaling("label").fit(z, y, input="logits").temperatures.round(2).tolist()
        [3.64, 1.82]
    """

    parameter_names = ("temperatures", "biases")
    temperatures: np.ndarray
    biases: np.ndarray

    def __init__(self, kind: str = "joint") -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"`kind` must be one of {KINDS}, got {kind!r}.")
        self.kind = kind
        self.reason = ""
        self.fits: tuple[TemperatureFit, ...] = ()

    def fit(self, predictions: Any, labels: Any, *, input: str = "probabilities") -> LabelScaling:
        """Fit on a calibration split.

        Args:
            predictions: `(N, L)` probabilities of the labels (of draws: their mean), or logits.
            labels: `(N, L)` zeros and ones.
            input: `"probabilities"` or `"logits"`.

        Returns:
            The object itself.

        Raises:
            ValueError: For bad input, or fewer than 10 rows.
        """
        rows = as_label_rows(predictions, labels, input=input)
        check_enough_rows(len(rows.labels))
        logits = label_logits(rows.probabilities)
        size = rows.num_labels
        self.temperatures, self.biases, self.fits = np.ones(size), np.zeros(size), ()
        if self.kind == "platt":
            self._fit_platt(logits, rows.labels)
        elif self.kind == "joint":
            sequences = np.repeat(np.arange(len(logits)), size)
            self.fits = (_binary_fit(logits.reshape(-1), rows.labels.reshape(-1), sequences),)
            self.temperatures[:] = self.fits[0].temperature
            self.reason = self.fits[0].reason.replace(f"{logits.size:,} rows", _answers(*logits.shape))
        else:
            order = np.arange(len(logits))
            self.fits = tuple(_binary_fit(logits[:, k], rows.labels[:, k], order) for k in range(size))
            self.temperatures = np.array([fit.temperature for fit in self.fits])
            self.reason = _reason_of_each(self.fits)
        self.num_classes = size
        self.fitted_on = SplitFingerprint.of_hashes(rows.hashes)
        return self

    def _fit_platt(self, logits: np.ndarray, labels: np.ndarray) -> None:
        kept = 0
        for k in range(logits.shape[1]):
            slope, bias = platt(logits[:, k], labels[:, k])
            if slope is not None:
                self.temperatures[k], self.biases[k], kept = 1.0 / slope, bias, kept + 1
        told, fitted_on = "T and bias", f"fitted on {len(logits):,} rows"
        if not kept:
            self.reason = f"{told}, {fitted_on}, are left off: a likelihood-ratio test keeps 1 and 0."
        elif logits.shape[1] > 1:
            self.reason = f"{told}, {fitted_on}, are applied to {kept} of {logits.shape[1]} labels."
        else:
            told = f"T = {self.temperatures[0]:.4g} and bias {self.biases[0]:+.4g}"
            self.reason = f"{told}, {fitted_on}, are applied: a likelihood-ratio test leaves out 1 and 0."

    def transform(self, predictions: Any, *, input: str = "probabilities") -> Any:
        """Recalibrated probabilities `(N, L)` float64, of the kind of array that came in.

        Raises:
            ValueError: If it is not fitted, or for another number of labels.
        """
        self._check_fitted()
        p = as_label_probabilities(predictions, input=input)
        if p.shape[1] != self.num_classes:
            raise ValueError(f"{type(self).__name__} was fitted for {self.num_classes} labels, got {p.shape[1]}.")
        if self.is_identity:
            return as_given(p, predictions)
        return as_given(expit(label_logits(p) / self.temperatures + self.biases), predictions)

    @property
    def is_identity(self) -> bool:
        """Whether nothing is changed."""
        return bool((self.temperatures == 1.0).all() and (self.biases == 0.0).all())

    def evaluate(self, predictions: Any, labels: Any, *, input: str = "probabilities", **options: Any) -> LabelsReport:
        """Report on the recalibrated probabilities of rows it was not fitted on; `options` as for `labels_report`.

        Raises:
            ValueError: If more than 5 % of the rows were fitted on: such a report would flatter.
        """
        rows = as_label_rows(predictions, labels, input=input)
        self._refuse_own(rows.hashes)
        return labels_report(self.transform(rows.probabilities), rows.labels, **options)

    def state(self) -> dict[str, Any]:
        """The fitted method as JSON-ready values."""
        return {**super().state(), "kind": self.kind, "reason": self.reason}

    @classmethod
    def from_state(cls, state: Mapping[str, Any] | Fields) -> LabelScaling:
        """The inverse of `state`."""
        method = super().from_state(state)
        fields = cls._checked_fields(state)
        method.kind = fields.text("kind", among=KINDS)
        method.reason = fields.text("reason")
        return method

    def _read_parameter(self, parameters: Fields, name: str) -> Any:
        values = parameters.array(name, (self.num_classes,))
        if name == "temperatures" and not ((values >= POSSIBLE[0]) & (values <= POSSIBLE[1])).all():
            raise parameters.wrong(name, f"temperatures from {POSSIBLE[0]:g} to {POSSIBLE[1]:g}")
        return values


def platt(logits: np.ndarray, labels: np.ndarray) -> tuple[float | None, float]:
    """Slope `1 / T` and bias of least NLL of one label's logits `(N,)`; None and 0 where the rows do not support them.

    They are applied where twice the gain in log-likelihood over `(1, 0)` is beyond the 95 % quantile of chi-squared
    with two degrees of freedom (Wilks, 1938), and the slope is a temperature within its bounds.
    """
    if labels.min() == labels.max():
        return None, 0.0
    slope, bias = map(float, logistic_regression(logits[:, None], labels))
    z = slope * logits + bias
    gain = np.logaddexp(0.0, logits) - labels * logits - (np.logaddexp(0.0, z) - labels * z)
    supported = chdtrc(2, max(2.0 * float(gain.sum()), 0.0)) <= 1.0 - LEVEL
    possible = slope > 0 and BOUNDS[0] <= 1.0 / slope <= BOUNDS[1] and abs(bias) <= MOST_BIAS
    return (slope, bias) if supported and possible else (None, 0.0)


def _binary_fit(logits: np.ndarray, labels: np.ndarray, sequences: np.ndarray) -> TemperatureFit:
    return temperature_fit(LogitRows(np.stack([np.zeros_like(logits), logits], axis=1), labels, sequences))


def _answers(num_rows: int, num_labels: int) -> str:
    return f"{num_rows:,} rows of {num_labels} label(s)"


def _reason_of_each(fits: tuple[TemperatureFit, ...]) -> str:
    applied = [fit.temperature for fit in fits if fit.applied]
    rows, of = f"{fits[0].num_rows:,} rows", f"{len(applied)} of {len(fits)} labels"
    told = f"A temperature each, fitted on {rows}, is applied to {of}"
    return f"{told} (from {min(applied):.4g} to {max(applied):.4g})." if applied else f"{told}."
