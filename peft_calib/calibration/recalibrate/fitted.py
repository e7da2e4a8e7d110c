"""A method that was fitted on some rows: it knows them, and goes into a JSON file and comes out of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from ...files import write_atomically
from ...json_files import Fields, describe, read_json, seal_of
from ..fingerprint import SplitFingerprint

# Share of evaluated rows that may also have been fitted on: chance duplicates, not a re-used split.
MAX_OVERLAP = 0.05
FORMAT_VERSION = 1
MEND = "Fit it again on a calibration split"
#: What a state says of itself, and the digest of it: what was fitted, and on which rows, is not changed by hand.
SAID, SEAL = ("method", "num_classes", "parameters", "fitted_on"), "seal"


def refuse_overlap(overlap: float, fitted_on: SplitFingerprint, name: str, mend: str, items: str = "rows") -> None:
    """Raise `ValueError` where many of some rows are those that something was fitted on: a report would flatter.

    Args:
        overlap: Their share, as the fingerprint that suits these rows tells it.
        fitted_on: Of the rows of the fit.
        name: Of what was fitted.
        mend: What to report on instead.
        items: What the rows are called.
    """
    if overlap > MAX_OVERLAP:
        raise ValueError(
            f"{overlap:.0%} of these {items} are among the {fitted_on.num_rows} that {name} was fitted on (split "
            f"{fitted_on.digest[:12]}). {mend}"
        )


#: Every method that is kept in files, by its name there.
METHODS: dict[str, type[FittedMethod]] = {}

Self = TypeVar("Self", bound="FittedMethod")


class FittedMethod:
    """What is fitted on held-out rows and kept beside a model; `parameter_names` are what is kept.

    Attributes:
        num_classes: Columns of what it takes, after the fit: classes or labels, 1 for a number.
        fitted_on: Fingerprint of the rows it was fitted on.
    """

    parameter_names: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.parameter_names:
            METHODS[cls.__name__] = cls

    def __init__(self) -> None:
        self.num_classes: int | None = None
        self.fitted_on: SplitFingerprint | None = None

    def state(self) -> dict[str, Any]:
        """The fitted method as JSON-ready values."""
        said = self._said()
        return {**said, "format_version": FORMAT_VERSION, SEAL: seal_of(said)}

    def _said(self) -> dict[str, Any]:
        """What the seal is the digest of."""
        fitted_on = self._check_fitted()
        values = {name: getattr(self, name) for name in self.parameter_names}
        plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}
        said = (type(self).__name__, self.num_classes, plain, fitted_on.to_dict())
        return dict(zip(SAID, said, strict=True))

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
            ValueError: If it is of another method, a value cannot be, or what was fitted was changed by hand; the
                message names field and value.
        """
        fields = cls._checked_fields(state)
        parameters = fields.mapping("parameters")
        method = cls()
        method.num_classes = fields.integer("num_classes", least=1)
        method.fitted_on = SplitFingerprint.from_fields(fields.mapping("fitted_on"))
        for name in cls.parameter_names:
            setattr(method, name, method._read_parameter(parameters, name))
        check_seal(fields)
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
        fields.check_version(FORMAT_VERSION)
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

    def _refuse_own(self, hashes: np.ndarray) -> None:
        """Raise `ValueError` where many of some rows are those of the fit: a report on them would flatter."""
        fitted_on = self._check_fitted()
        mend = (
            "Recalibration must be reported on rows it has not seen: hold out a calibration split of the training "
            "data to fit on."
        )
        refuse_overlap(fitted_on.seen(hashes), fitted_on, type(self).__name__, mend)

    def _check_fitted(self) -> SplitFingerprint:
        if self.fitted_on is None:
            raise ValueError(
                f"This {type(self).__name__} is not fitted yet; call fit(logits, labels) on a calibration split."
            )
        return self.fitted_on


def check_seal(fields: Fields) -> None:
    """Raise `ValueError` where what was fitted is not what it was; a state of an earlier version has no seal."""
    if fields.text(SEAL, default=None) in (None, seal_of({name: fields.get(name) for name in SAID if name in fields})):
        return
    now = ", ".join(f"{name} is {describe(value)}" for name, value in fields.mapping("parameters").content.items())
    rows = fields.mapping("fitted_on", None)
    of = "" if rows is None else f" (fitted_on: {rows.get('num_rows')} rows, split {rows.text('digest')[:12]})"
    fit = fields.mapping("fit", None)
    then = (fields if fit is None else fit).text("reason", default=None) or "other values or rows"
    raise ValueError(
        f"{fields.source}: {fields.prefix}parameters: {now}{of}, and what was fitted is another one ({then}): it was "
        f"changed by hand. {fields.mend}."
    )


def load_state(fields: Fields) -> FittedMethod:
    """The fitted method that a file holds, whichever it is: of classes, of labels or of numbers."""
    return METHODS[fields.text("method", among=list(METHODS))].from_state(fields)
