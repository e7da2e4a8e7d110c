# SPDX-License-Identifier: Apache-2.0
"""What every recalibration method shares: fit, transform, evaluate on other rows, JSON in and out."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from peft_calib.calibration.fingerprint import SplitFingerprint, row_hashes
from peft_calib.calibration.inputs import as_logits, as_rows, softmax
from peft_calib.calibration.report import CalibrationReport, calibration_report

# Share of evaluated rows that may also have been fitted on: chance duplicates, not a re-used split.
MAX_OVERLAP = 0.05
FORMAT_VERSION = 1

Self = TypeVar("Self", bound="Recalibrator")


class Recalibrator(ABC):
    """A map from a model's logits to better calibrated probabilities, fitted on held-out rows.

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

    def fit(self: Self, logits: Any, labels: Any) -> Self:
        """Fits the method on a calibration split.

        Args:
            logits: `(N, C)` finite logits (for probabilities, pass their logarithm).
            labels: `(N,)` integer class ids.

        Returns:
            The object itself.

        Raises:
            ValueError: for logits that are not finite, labels out of range, or too few rows.
        """
        values, target = self._checked(logits, labels)
        self.num_classes = values.shape[1]
        self._fit(values, target)
        self.fitted_on = SplitFingerprint.of(values, target)
        return self

    def transform(self, logits: Any) -> Any:
        """Recalibrated probabilities.

        Args:
            logits: `(N, C)` logits of any rows.

        Returns:
            `(N, C)` float64 probabilities: a torch tensor on the logits' device if they were one, numpy otherwise.

        Raises:
            ValueError: if the method is not fitted, or was fitted for another number of classes.
        """
        values = self._checked_logits(logits)
        probabilities = self._transform(values)
        if isinstance(logits, torch.Tensor):
            return torch.as_tensor(probabilities, device=logits.device)
        return probabilities

    def evaluate(self, logits: Any, labels: Any, **options: Any) -> CalibrationReport:
        """Report on the recalibrated probabilities of rows the method was not fitted on.

        Args:
            logits: `(N, C)` logits.
            labels: `(N,)` labels.
            options: passed on to `calibration_report`.

        Returns:
            The report.

        Raises:
            ValueError: if more than 5 % of the rows were fitted on: such a report would flatter.
        """
        values = self._checked_logits(logits)
        _, target = self._checked(values, labels)
        assert self.fitted_on is not None
        overlap = self.fitted_on.overlap(row_hashes(values, target))
        if overlap > MAX_OVERLAP:
            raise ValueError(
                f"{overlap:.0%} of these rows are among the {self.fitted_on.num_rows} that {type(self).__name__} was "
                "fitted "
                f"on (split {self.fitted_on.digest[:12]}). Recalibration must be reported on rows it has not seen: "
                "hold out "
                "a calibration split of the training data to fit on."
            )
        return calibration_report(self._transform(values), target, **options)

    def state(self) -> dict[str, Any]:
        """The fitted method as JSON-ready values."""
        self._check_fitted()
        assert self.fitted_on is not None
        parameters = {name: _plain(getattr(self, name)) for name in self.parameter_names}
        return {
            "method": type(self).__name__,
            "format_version": FORMAT_VERSION,
            "num_classes": self.num_classes,
            "parameters": parameters,
            "fitted_on": self.fitted_on.to_dict(),
        }

    def save(self, path: str | Path) -> None:
        """Writes the fitted method to a JSON file."""
        Path(path).write_text(json.dumps(self.state()) + "\n", encoding="utf-8")

    @classmethod
    def load(cls: type[Self], path: str | Path) -> Self:
        """Reads a method saved by `save`.

        Raises:
            ValueError: if the file holds another method, or is not such a file.
        """
        return cls.from_state(json.loads(Path(path).read_text(encoding="utf-8")))

    @classmethod
    def from_state(cls: type[Self], state: dict[str, Any]) -> Self:
        """The inverse of `state`."""
        if state.get("method") != cls.__name__:
            raise ValueError(
                f"This is a saved {state.get('method')!r}; load it with that class, not with {cls.__name__}."
            )
        if state.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"Saved with format version {state.get('format_version')!r}; this release reads {FORMAT_VERSION}."
            )
        missing = set(cls.parameter_names) ^ set(state["parameters"])
        if missing:
            raise ValueError(
                f"The parameters of a saved {cls.__name__} should be {cls.parameter_names}; wrong: {missing}."
            )
        method = cls()
        method.num_classes = state["num_classes"]
        method.fitted_on = SplitFingerprint.from_dict(state["fitted_on"])
        for name, value in state["parameters"].items():
            setattr(method, name, method._from_plain(value))
        return method

    @staticmethod
    def _from_plain(value: Any) -> Any:
        return np.asarray(value, dtype=np.float64) if isinstance(value, list) else value

    @staticmethod
    def _checked(logits: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
        values = as_logits(logits)
        # The rows' own check covers labels; uniform probabilities stand in for the predictions.
        uniform = np.broadcast_to(1.0 / values.shape[1], values.shape)
        return values, as_rows(uniform, labels, ignore_index=None).labels

    def _checked_logits(self, logits: Any) -> np.ndarray:
        self._check_fitted()
        values = as_logits(logits)
        if values.shape[1] != self.num_classes:
            raise ValueError(
                f"{type(self).__name__} was fitted for {self.num_classes} classes, got {values.shape[1]}."
            )
        return values

    def _check_fitted(self) -> None:
        if self.fitted_on is None:
            raise ValueError(
                f"This {type(self).__name__} is not fitted yet; call fit(logits, labels) on a calibration split."
            )


class LogitScaling(Recalibrator):
    """A method that maps logits to logits, so that its result is a softmax and an argmax may be kept."""

    @abstractmethod
    def _transform_logits(self, logits: np.ndarray) -> np.ndarray: ...

    def _transform(self, logits: np.ndarray) -> np.ndarray:
        return softmax(self._transform_logits(logits))

    def transform_logits(self, logits: Any) -> Any:
        """Recalibrated logits, in the kind of array that came in."""
        scaled = self._transform_logits(self._checked_logits(logits))
        return torch.as_tensor(scaled, device=logits.device) if isinstance(logits, torch.Tensor) else scaled


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
