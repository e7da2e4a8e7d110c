"""What every recalibration method shares: fit, transform, evaluate on other rows, JSON in and out."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from ...files import write_atomically
from ...json_files import Fields, describe, read_json
from ..answers import as_given, without_masks
from ..fingerprint import SplitFingerprint, row_hashes
from ..grouping import values_of_rows
from ..inputs import LogitRows, as_logit_rows, as_logits, softmax
from ..report.report import CalibrationReport, calibration_report

# Share of evaluated rows that may also have been fitted on: chance duplicates, not a re-used split.
MAX_OVERLAP = 0.05
FORMAT_VERSION = 1
MEND = "Fit it again on a calibration split"

Self = TypeVar("Self", bound="Recalibrator")


class Recalibrator(ABC):
    """A map from a model's logits to better calibrated probabilities, fitted on held-out rows.

    It takes what a model answers: `(N, C)`, `(N, T, C)` with labels `(N, T)`, `(N,)` for the logit of class 1; numpy,
    torch in any precision or lists; a `ModelOutput`, a mapping with `logits`, a tuple. Rows labelled -100 are left
    out. With `input="probabilities"` the logarithm is taken, exact zeros counting as 1.2e-38. A logit of -inf masks
    its class: it stays at probability 0.

    Subclasses name their fitted parameters in `parameter_names` and implement `_fit` and `_transform`.
    """

    parameter_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.num_classes: int | None = None
        self.fitted_on: SplitFingerprint | None = None

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
        fitted_on = self._check_fitted()
        rows = as_logit_rows(logits, labels, input=input, mask=mask, ignore_index=ignore_index)
        self._check_num_classes(rows.logits.shape[1])
        overlap = fitted_on.overlap(row_hashes(rows.logits, rows.labels))
        if overlap > MAX_OVERLAP:
            raise ValueError(
                f"{overlap:.0%} of these rows are among the {fitted_on.num_rows} that {type(self).__name__} was "
                f"fitted on (split {fitted_on.digest[:12]}). Recalibration must be reported on rows it has not "
                "seen: hold out a calibration split of the training data to fit on."
            )
        if options.get("groups") is not None:
            options["groups"] = values_of_rows(options["groups"], labels, rows.kept)
        return calibration_report(self._probabilities(rows.logits), rows.labels, **options)

    def state(self) -> dict[str, Any]:
        """The fitted method as JSON-ready values."""
        fitted_on = self._check_fitted()
        values = {name: getattr(self, name) for name in self.parameter_names}
        plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}
        return {
            "method": type(self).__name__,
            "format_version": FORMAT_VERSION,
            "num_classes": self.num_classes,
            "parameters": plain,
            "fitted_on": fitted_on.to_dict(),
        }

    def save(self, path: str | Path) -> None:
        """Writes the fitted method to a JSON file, whole or not at all."""
        write_atomically(path, json.dumps(self.state()) + "\n")

    @classmethod
    def load(cls: type[Self], path: str | Path) -> Self:
        """Reads a method saved by `save`, or that of a run's `temperature.json`.

        A run has one for each way of predicting. That of the mean is read, for which `adapter/recalibration.json`
        stands too, or the only one.

        Raises:
            ValueError: If the file holds another method, is not such a file, or holds values that cannot be; the
                message names file, field and value.
        """
        fields = read_json(path, MEND)
        ways = [name for name in fields if isinstance(fields.content[name], dict) and "method" in fields.content[name]]
        if "method" not in fields and ways:
            fields = fields.mapping("mean" if "mean" in ways else ways[0])
        return cls.from_state(fields)

    @classmethod
    def from_state(cls: type[Self], state: Mapping[str, Any] | Fields) -> Self:
        """The inverse of `state`.

        Args:
            state: What `state` gave, or the fields of a file.

        Raises:
            ValueError: If it is of another method, or a value cannot be; the message names field and value.
        """
        fields = cls._checked_fields(state)
        parameters = fields.mapping("parameters")
        method = cls()
        method.num_classes = fields.integer("num_classes", least=1)
        method.fitted_on = SplitFingerprint.from_fields(fields.mapping("fitted_on"))
        for name in cls.parameter_names:
            setattr(method, name, method._read_parameter(parameters, name))
        return method

    @classmethod
    def _checked_fields(cls, state: Mapping[str, Any] | Fields) -> Fields:
        """The fields of a state of this method and version that has the right parameters."""
        fields = state if isinstance(state, Fields) else Fields(state, f"A saved {cls.__name__}", MEND)
        if fields.text("method") != cls.__name__:
            raise ValueError(
                f"{fields.source} holds a saved {fields.text('method')!r}; load it with that class, not with "
                f"{cls.__name__}."
            )
        if not fields.has_version(FORMAT_VERSION):
            raise ValueError(
                f"{fields.source} was saved with format version {describe(fields.get('format_version'))}; this "
                f"release reads {FORMAT_VERSION}."
            )
        parameters = fields.mapping("parameters")
        missing = set(cls.parameter_names) ^ set(parameters)
        if missing:
            raise ValueError(
                f"{fields.source}: the parameters of a saved {cls.__name__} should be {cls.parameter_names}; wrong: "
                f"{missing}. {MEND}."
            )
        return fields

    def _read_parameter(self, parameters: Fields, name: str) -> Any:
        """A parameter out of a file; a method says which values can be, given `num_classes`."""
        value = parameters.get(name)
        return parameters.array(name) if isinstance(value, list) else parameters.number(name)

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

    def _check_fitted(self) -> SplitFingerprint:
        if self.fitted_on is None:
            raise ValueError(
                f"This {type(self).__name__} is not fitted yet; call fit(logits, labels) on a calibration split."
            )
        return self.fitted_on


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
