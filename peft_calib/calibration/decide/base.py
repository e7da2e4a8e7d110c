"""What every decision rule shares: rows in, a temperature, the refusal of its own rows, JSON in and out."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from ...files import write_atomically
from ...json_files import Fields, read_json, sealed, without_nan
from ..answers import log_probabilities, unwrapped
from ..fingerprint import SplitFingerprint, row_hashes, softmax_hashes
from ..inputs import LogitRows, as_float64, as_logit_rows, as_numpy, as_rows, softmax
from ..recalibrate.fitted import MAX_OVERLAP, refuse_overlap
from ..recalibrate.temperature import POSSIBLE, TemperatureScaling

FORMAT_VERSION = 1
MEND = "Fit the rule again on a calibration split"

#: Every kind of rule by its name, which its files say.
RULES: dict[str, type[DecisionRule]] = {}

Self = TypeVar("Self", bound="DecisionRule")


class Taken(NamedTuple):
    """Rows as a rule sees them."""

    values: np.ndarray  # `(N, C)` float64 probabilities after the temperature; `(N, 1)` for confidences
    labels: np.ndarray  # `(N,)` int64
    hashes: np.ndarray  # `(N,)` uint64 of the rows as they were given, labels included
    kept: np.ndarray | None  # `(M,)` bool, which of the rows that were given these are; None if all


class DecisionRule(ABC):
    """A decision over rows of probabilities, fitted on labelled rows that the model was not trained on.

    Rows must be independent draws, one a line: the tokens of one text are not. Rows labelled -100 are left out.

    Attributes:
        num_classes: Classes it was fitted for, after `fit`.
        fitted_on: Fingerprint of the rows it was fitted on, which it refuses to be evaluated on.
        temperature: What the logarithms of probabilities are divided by first; None leaves them as they are.
    """

    kinds: ClassVar[tuple[str, ...]] = ("probabilities", "logits")
    #: What it answers with, by which its file beside an adapter is called.
    kind: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        RULES[cls.__name__] = cls

    def __init__(self, temperature: float | TemperatureScaling | None) -> None:
        self._scaling = temperature if isinstance(temperature, TemperatureScaling) else None
        self.temperature = _checked_temperature(temperature)
        self.num_classes: int | None = None
        self.fitted_on: SplitFingerprint | None = None

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """The arguments of the constructor, without the temperature."""

    @abstractmethod
    def _fitted(self) -> dict[str, Any]:
        """What `fit` found, as JSON-ready values."""

    @classmethod
    @abstractmethod
    def _from_fields(
        cls: type[Self], settings: Fields, fitted: Fields, num_classes: int, temperature: float | None
    ) -> Self:
        """The inverse of the two."""

    @abstractmethod
    def promise(self) -> str:
        """What the rule guarantees, in one sentence."""

    @abstractmethod
    def to_markdown(self, class_names: Sequence[str] | None = None) -> str:
        """What the rule promises, in words one can defend; classes by their names, if these are given."""

    def __str__(self) -> str:
        return self._unfitted if self.fitted_on is None else self.to_markdown()

    @property
    def _unfitted(self) -> str:
        return f"This {type(self).__name__} is not fitted yet; call fit(probabilities, labels) on held-out rows."

    def state(self) -> dict[str, Any]:
        """The fitted rule as JSON-ready values; `load` reads them."""
        fitted_on = self._check_fitted()
        return {
            "rule": type(self).__name__,
            "format_version": FORMAT_VERSION,
            "num_classes": self.num_classes,
            "settings": {**self._settings(), "temperature": self.temperature},
            "fitted": self._fitted(),
            "fitted_on": fitted_on.to_dict(),
        }

    def to_dict(self) -> dict[str, Any]:
        """Settings and what was found, without the hashes of the rows; not defined numbers are null."""
        state = self.state()
        rows = {key: state["fitted_on"][key] for key in ("digest", "num_rows")}
        return without_nan({**state, "fitted_on": rows})

    def save(self, path: str | Path) -> None:
        """Writes the fitted rule to a JSON file, whole or not at all."""
        write_atomically(path, json.dumps(sealed(without_nan(self.state())), allow_nan=False) + "\n")

    @classmethod
    def load(cls: type[Self], path: str | Path) -> Self:
        """Reads a rule saved by `save`.

        Raises:
            ValueError: If the file holds another rule, is not such a file, holds values that cannot be, or was changed
                after the fit; the message names file, field and value.
        """
        fields = read_json(path, MEND)
        rule = cls.from_state(fields)
        fields.check_seal("the rule")
        return rule

    @classmethod
    def from_state(cls: type[Self], state: Mapping[str, Any] | Fields) -> Self:
        """The inverse of `state`; a ValueError names what cannot be."""
        fields = state if isinstance(state, Fields) else Fields(state, f"A saved {cls.__name__}", MEND)
        if fields.text("rule") != cls.__name__:
            raise ValueError(
                f"{fields.source} holds a saved {fields.text('rule')!r}; load it with that class, or with "
                "load_decision, which finds the class."
            )
        fields.check_version(FORMAT_VERSION)
        settings = fields.mapping("settings")
        temperature = settings.number("temperature", least=POSSIBLE[0], most=POSSIBLE[1], default=None)
        num_classes = fields.integer("num_classes", least=1)
        if num_classes == 1:  # confidences, to which earlier versions took a temperature and did not apply it
            temperature = None
        with fields.named():
            rule = cls._from_fields(settings, fields.mapping("fitted"), num_classes, temperature)
        rule.num_classes = num_classes
        rule.fitted_on = SplitFingerprint.from_fields(fields.mapping("fitted_on"))
        return rule

    def _take(
        self, predictions: Any, labels: Any, input: str, mask: Any = None, ignore_index: int | None = -100
    ) -> Taken:
        """Checked rows with labels."""
        self._check_kind(input)
        _refuse_sequences(labels)
        if input == "confidence":
            if self.temperature is not None:
                raise ValueError(
                    'A temperature divides the logits of classes, and input="confidence" has none: leave out '
                    "`temperature`; confidences are taken as they are."
                )
            values, target, kept = _confidences(predictions, labels, mask, ignore_index)
            return Taken(values, target, row_hashes(values, target), kept)
        rows = as_rows(predictions, labels, input=input, mask=mask, ignore_index=ignore_index)
        hashes = row_hashes(rows.probabilities, rows.labels)
        return Taken(self._tempered(rows.probabilities), rows.labels, hashes, rows.kept)

    def _unlabelled(self, predictions: Any, input: str) -> np.ndarray:
        """`(N, C)` checked rows without labels, of the number of classes it was fitted for."""
        self._check_fitted()
        self._check_kind(input)
        shape = _shape(predictions)
        if shape[0] == 0:
            values = np.empty((0, shape[1] if len(shape) == 2 else self.num_classes or 0))
        else:
            values = self._take(predictions, np.zeros(shape[0], np.int64), input, ignore_index=None).values
        self._check_num_classes(values)
        return values

    def _tempered(self, probabilities: np.ndarray) -> np.ndarray:
        if self.temperature is None:
            return probabilities
        return softmax(log_probabilities(probabilities) / self.temperature)

    def _remember(self, taken: Taken, predictions: Any, labels: Any, options: dict[str, Any]) -> None:
        """Keeps the rows' fingerprint, and refuses a temperature that was fitted on the same rows."""
        if self._scaling is not None:
            rows = as_logit_rows(predictions, labels, **options)
            overlap = _seen_by(self._scaling, rows)
            if overlap > MAX_OVERLAP:
                raise ValueError(
                    f"{overlap:.0%} of these rows are among those the temperature was fitted on. A guarantee counts "
                    "errors of rows that nothing was fitted on: give the rule rows of its own."
                )
        self.num_classes = taken.values.shape[1]
        self.fitted_on = SplitFingerprint.of_hashes(taken.hashes)

    def _unseen(self, predictions: Any, labels: Any, input: str, mask: Any, ignore_index: int | None) -> Taken:
        """Checked rows that the rule was not fitted on."""
        self._check_fitted()
        taken = self._take(predictions, labels, input, mask, ignore_index)
        self._check_num_classes(taken.values)
        self._refuse_own(taken.hashes)
        return taken

    def _refuse_own(self, hashes: np.ndarray) -> None:
        """Raise `ValueError` where many of some rows are those of the fit."""
        fitted_on = self._check_fitted()
        mend = "What a rule reaches must be reported on rows it has not seen: hold out rows for the report."
        refuse_overlap(fitted_on.seen(hashes), fitted_on, type(self).__name__, mend)

    def _check_kind(self, input: str) -> None:
        if input not in self.kinds:
            raise ValueError(f"`input` must be one of {self.kinds}, got {input!r}.")

    def _check_num_classes(self, values: np.ndarray) -> None:
        if values.shape[1] != self.num_classes:
            raise ValueError(
                f"{type(self).__name__} was fitted for {self.num_classes} classes, got {values.shape[1]}"
                + (" (1 stands for confidences)." if 1 in (values.shape[1], self.num_classes) else ".")
            )

    def _check_fitted(self) -> SplitFingerprint:
        if self.fitted_on is None:
            raise ValueError(self._unfitted)
        return self.fitted_on


def refuse_weights(sample_weight: Any, why: str) -> None:
    """Raise `ValueError` where rows are weighed: no promise can be made with them."""
    if sample_weight is not None:
        raise ValueError(
            f"No guarantee can be given with `sample_weight`: {why} Where weights say how much oftener a row will "
            "come than it did, keep each row with probability weight / bound, the bound being no less than any weight "
            "can be, and fit on what is kept without weights: those are rows like the ones to come."
        )


def _seen_by(scaling: TemperatureScaling, rows: LogitRows) -> float:
    """Share of the rows that a temperature was fitted on, whether as logits or as probabilities."""
    assert scaling.fitted_on is not None
    same = scaling.fitted_on.seen(row_hashes(rows.logits, rows.labels))
    if scaling.fitted_on_softmax is None:
        return same
    return max(same, scaling.fitted_on_softmax.seen(softmax_hashes(rows.logits, rows.labels)))


def _checked_temperature(temperature: Any) -> float | None:
    if isinstance(temperature, TemperatureScaling):
        if temperature.fitted_on is None:
            raise ValueError("The TemperatureScaling given as `temperature` is not fitted yet.")
        temperature = temperature.temperature
    if temperature is None:
        return None
    number = isinstance(temperature, (float, int, np.floating)) and not isinstance(temperature, bool)
    if not number or not POSSIBLE[0] <= float(temperature) <= POSSIBLE[1]:
        raise ValueError(
            f"`temperature` must be a number from {POSSIBLE[0]:g} to {POSSIBLE[1]:g}, a fitted TemperatureScaling or "
            f"None, got {temperature!r}."
        )
    return float(temperature)


def _shape(predictions: Any) -> tuple[int, ...]:
    shape = as_numpy(unwrapped(predictions)).shape
    if not shape:
        raise ValueError("predictions must be an array of rows, got a single number.")
    return shape


def _refuse_sequences(labels: Any) -> None:
    shape = as_numpy(labels, "labels").shape
    if len(shape) != 1:
        raise ValueError(
            f"labels have shape {shape}, but a decision rule takes one label a row: what it promises rests on rows "
            "that are independent, and the tokens of one sequence are not. Give one row for each text or entity."
        )


def _confidences(
    predictions: Any, labels: Any, mask: Any, ignore_index: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`(N, 1)` confidences in [0, 1], 1 where what they are about is right, and which of all rows are left."""
    given = as_numpy(unwrapped(predictions), "confidences")
    values, _ = as_float64(given, predictions, "confidences")
    target = as_numpy(labels, "labels")
    if values.shape != target.shape or len(target) == 0:
        raise ValueError(f"confidences {values.shape} and labels {target.shape} must be 1-D, paired and not empty.")
    keep = np.ones(len(target), bool) if ignore_index is None else target != ignore_index
    if mask is not None:
        chosen = as_numpy(mask, "mask")
        if chosen.shape != target.shape or chosen.dtype.kind != "b":
            raise ValueError(f"mask must hold {len(target)} booleans, got {chosen.dtype} of shape {chosen.shape}.")
        keep &= chosen
    values, target = values[keep], target[keep]
    if not keep.any() or not np.isin(target, (0, 1)).all():
        raise ValueError('With input="confidence" labels are 1 where the answer is right and 0 where it is wrong.')
    if not ((values >= 0.0) & (values <= 1.0)).all():
        raise ValueError("confidences must lie in [0, 1]; map a score to the probability of being right first.")
    return values[:, None], target.astype(np.int64), keep
