"""What every recalibration of classes shares: fit, transform, evaluate on other rows."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, TypeVar

import numpy as np

from ..answers import as_given, without_masks
from ..fingerprint import SplitFingerprint, row_hashes
from ..grouping import values_of_rows
from ..inputs import LogitRows, as_logit_rows, as_logits, softmax
from ..report.report import CalibrationReport, calibration_report
from .fitted import FittedMethod

Self = TypeVar("Self", bound="Recalibrator")


class Recalibrator(FittedMethod):
    """A map from a model's logits to better calibrated probabilities, fitted on held-out rows.

    It takes what a model answers: `(N, C)`, `(N, T, C)` with labels `(N, T)`, `(N,)` for the logit of class 1; numpy,
    torch in any precision or lists; a `ModelOutput`, a mapping with `logits`, a tuple. Rows labelled -100 are left
    out. With `input="probabilities"` the logarithm is taken, exact zeros counting as 1.2e-38. A logit of -inf masks
    its class: it stays at probability 0.

    Subclasses name their fitted parameters in `parameter_names` and implement `_fit` and `_transform`.
    """

    @abstractmethod
    def _fit(self, logits: np.ndarray, labels: np.ndarray) -> None: ...

    @abstractmethod
    def _transform(self, logits: np.ndarray) -> np.ndarray: ...

    def _fit_rows(self, rows: LogitRows) -> None:
        """Fits to rows that may have masked classes; a method that can do better than a very small logit overrides."""
        self._fit(without_masks(rows.logits), rows.labels)

    def fit(
        self: Self,
        logits: Any,
        labels: Any,
        *,
        input: str = "logits",
        mask: Any = None,
        ignore_index: int | None = -100,
    ) -> Self:
        """Fits the method on a calibration split.

        Args:
            logits: A model's answer on it.
            labels: Integer class ids, `(N,)` or `(N, T)`.
            input: `"logits"`, or `"probabilities"` where there are no logits, as for the mean of several draws.
            mask: Boolean, of the labels' shape; False leaves the row out.
            ignore_index: Label of rows to leave out, or None.

        Returns:
            The object itself.

        Raises:
            ValueError: For NaN or +inf, class ids in place of logits, labels out of range, or too few rows.
        """
        return self._fitted_to(as_logit_rows(logits, labels, input=input, mask=mask, ignore_index=ignore_index))

    def _fitted_to(self: Self, rows: LogitRows) -> Self:
        self._fit_rows(rows)
        self.num_classes = rows.logits.shape[1]
        self.fitted_on = SplitFingerprint.of(rows.logits, rows.labels)
        return self

    def transform(self, logits: Any, *, input: str = "logits") -> Any:
        """Recalibrated probabilities.

        Args:
            logits: A model's answer on any rows.
            input: `"logits"` or `"probabilities"`.

        Returns:
            `(..., C)` float64 probabilities, `(N, 2)` for `(N,)`: a torch tensor on the logits' device if they were
            one, numpy otherwise.

        Raises:
            ValueError: If the method is not fitted, or was fitted for another number of classes.
        """
        values, shape = self._checked_logits(logits, input)
        return as_given(self._probabilities(values).reshape(shape), logits)

    def evaluate(
        self,
        logits: Any,
        labels: Any,
        *,
        input: str = "logits",
        mask: Any = None,
        ignore_index: int | None = -100,
        **options: Any,
    ) -> CalibrationReport:
        """Report on the recalibrated probabilities of rows the method was not fitted on.

        Args:
            logits: A model's answer on them.
            labels: Their labels.
            input: `"logits"` or `"probabilities"`.
            mask: Boolean, of the labels' shape; False leaves the row out.
            ignore_index: Label of rows to leave out, or None.
            options: Passed on to `calibration_report`.

        Returns:
            The report.

        Raises:
            ValueError: If more than 5 % of the rows were fitted on: such a report would flatter.
        """
        self._check_fitted()
        rows = as_logit_rows(logits, labels, input=input, mask=mask, ignore_index=ignore_index)
        self._check_num_classes(rows.logits.shape[1])
        self._refuse_own(row_hashes(rows.logits, rows.labels))
        if options.get("groups") is not None:
            options["groups"] = values_of_rows(options["groups"], labels, rows.kept)
        return calibration_report(self._probabilities(rows.logits), rows.labels, **options)

    def _checked_logits(self, logits: Any, input: str) -> tuple[np.ndarray, tuple[int, ...]]:
        """`(N, C)` logits, and the shape to give the result back in."""
        self._check_fitted()
        values = as_logits(logits, input=input)
        shape = values.shape
        self._check_num_classes(shape[-1])
        return values.reshape(-1, shape[-1]), shape

    def _check_num_classes(self, num_classes: int) -> None:
        if num_classes != self.num_classes:
            raise ValueError(f"{type(self).__name__} was fitted for {self.num_classes} classes, got {num_classes}.")

    def _probabilities(self, logits: np.ndarray) -> np.ndarray:
        """`(N, C)` recalibrated; a class that is masked keeps probability 0 whatever the map makes of it."""
        masked = np.isneginf(logits)
        if not masked.any():
            return self._transform(logits)
        probabilities = np.where(masked, 0.0, self._transform(without_masks(logits)))
        return probabilities / probabilities.sum(axis=1, keepdims=True)


class LogitScaling(Recalibrator):
    """A method that maps logits to logits, so that its result is a softmax and an argmax may be kept."""

    @abstractmethod
    def _transform_logits(self, logits: np.ndarray) -> np.ndarray: ...

    def _transform(self, logits: np.ndarray) -> np.ndarray:
        return softmax(self._transform_logits(logits))

    def transform_logits(self, logits: Any, *, input: str = "logits") -> Any:
        """Recalibrated logits, in the kind of array that came in; -inf stays -inf."""
        values, shape = self._checked_logits(logits, input)
        masked = np.isneginf(values)
        scaled = self._transform_logits(without_masks(values))
        return as_given(np.where(masked, -np.inf, scaled).reshape(shape), logits)
