"""Watching a model after deployment, with nothing but its own predictions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...files import write_atomically
from ...json_files import Fields, describe, read_json, sealed
from ...whole_numbers import check_whole
from ..decide.bounds import check_share
from ..inputs import as_numpy, check_confidence_level, check_seed
from ..resampling.bands import wilson_interval
from .estimates import expected_accuracy, expected_brier
from .reference import Reference
from .report import Alarm, WatchReport
from .signals import CELLS, cells_of, class_p_values, class_processes, odds_of, place_p_values
from .sums import Sums, counts_of
from .taken import FURTHER, Taken, taken
from .wealth import Wealth

FORMAT_VERSION = 1
MEND = "Restore the file from a copy, or start the watch again"
CONFIDENCE, CLASSES = "confidence", "classes"
#: What is watched, in the order of the chances that split ties.
SIGNALS = (CONFIDENCE, CLASSES, *FURTHER)
#: Fewer labelled rows are refused, fewer rows of a window have no estimate.
FEWEST_ROWS = 10
MOST_WINDOW = 10**7


class Watch:
    """What unlabelled predictions say of a model: an alarm when they change, and the accuracy to be expected.

    `start` takes labelled rows that nothing was fitted on, `update` the predictions that come after. The alarm is that
    of conformal test martingales: as long as the new rows are drawn like the reference (exchangeable with it), the
    probability that it is ever raised is at most `false_alarm`, exactly, for any number of rows and of looks, however
    few the reference rows are. Signals are the confidence, the predicted classes, and where they are given the mutual
    information and P(error); the level is divided among them, and among the classes.

    An alarm does not say that the model is worse, and silence does not say that it is not: a change of labels that
    shows in no prediction cannot be seen without labels. Rows that depend on each other (one text again and again, one
    topic a day) are a change as well.

    The state is of one size, whatever the number of rows, and the same however rows are batched.

    Args:
        false_alarm: Highest probability of a false alarm over the whole life of the watch, in (0, 1).
        window: Rows that estimates are of at least, once there are as many; the newest `window` to `2 * window`.
        confidence_level: Of the intervals.
        seed: Key of the chances that split ties, and of the intervals.

    Attributes:
        signals: What is watched, after `start`.
        reference: What is kept of the reference, after `start`.
        num_classes: Classes, after `start`.
        rows: Unlabelled rows since.

    Raises:
        ValueError: For values out of range.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> p = rng.uniform(0.5, 1.0, 500)
        >>> labels = (rng.random(500) < p).astype(int)
        >>> watch = Watch().start(p, labels)
        >>> watch.update(rng.uniform(0.5, 1.0, 300)).alarmed
        False
        >>> watch.update(rng.uniform(0.5, 0.7, 300)).alarmed
        True
    """

    def __init__(
        self, *, false_alarm: float = 0.01, window: int = 1000, confidence_level: float = 0.95, seed: int = 0
    ) -> None:
        self.false_alarm = check_share(false_alarm, "false_alarm", 0.01)
        self.window = check_whole(window, "`window`", FEWEST_ROWS, MOST_WINDOW)
        self.confidence_level = check_confidence_level(confidence_level)
        self.seed = check_seed(seed)
        self.reference: Reference | None = None
        self.signals: tuple[str, ...] = ()
        self.num_classes = 0
        self.rows = 0

    def start(
        self,
        predictions: Any,
        labels: Any,
        *,
        input: str = "probabilities",
        predicted: Any = None,
        mutual_information: Any = None,
        error_probability: Any = None,
        num_classes: int | None = None,
    ) -> Watch:
        """Take labelled rows for the reference, and forget what came before.

        Args:
            predictions: `(N, C)` or `(N,)` calibrated probabilities, as they will come after deployment.
            labels: `(N,)` true classes.
            input: `"probabilities"`, `"logits"`, or `"confidence"` for the probability of the predicted class alone.
            predicted: `(N,)` predicted classes, with `input="confidence"`.
            mutual_information: `(N,)` in nats, if that shall be watched.
            error_probability: `(N,)` of an uncertainty head, if that shall be watched.
            num_classes: With `input="confidence"`; the largest class seen and one if not given.

        Returns:
            The watch itself.

        Raises:
            ValueError: For bad rows, or fewer than 10.
        """
        target = as_numpy(labels, "labels")
        known = predicted is not None and num_classes is None  # `taken` refuses confidences without classes
        if input == "confidence" and known and target.dtype.kind in "iu" and target.size:
            num_classes = max(2, int(target.max()) + 1, int(as_numpy(predicted).max(initial=0)) + 1)
        further = {"mutual_information": mutual_information, "error_probability": error_probability}
        rows = taken(predictions, input, predicted, further, num_classes)
        _check_labels(target, rows)
        self.num_classes = rows.num_classes
        self.reference = Reference.of(rows.confidence, rows.predicted, target.astype(np.int64), rows.num_classes)
        self._begin([CONFIDENCE, CLASSES, *rows.further])
        for name, column in self._columns(rows).items():
            self._bags[name] += np.bincount(column, minlength=len(self._bags[name]))
        return self

    def _begin(self, signals: list[str]) -> None:
        self.rows = 0
        self.signals = tuple(signals)
        self._open, self._full = Sums(self.num_classes), Sums(self.num_classes)
        sizes = {name: self.num_classes if name == CLASSES else CELLS for name in signals}
        self._bags = {name: np.zeros(size, np.int64) for name, size in sizes.items()}
        self._wealth = {name: Wealth(*self._process(name)) for name in signals}

    def _process(self, name: str) -> tuple[int, float]:
        """How many processes a signal has, and the logarithm of the wealth that is an alarm: a union bound."""
        count = class_processes(self.num_classes) if name == CLASSES else 1
        return count, float(np.log(len(self.signals) * count / self.false_alarm))

    def update(
        self,
        predictions: Any,
        *,
        input: str = "probabilities",
        predicted: Any = None,
        mutual_information: Any = None,
        error_probability: Any = None,
    ) -> WatchReport:
        """Take unlabelled predictions, in the order in which they came.

        Args:
            predictions: As for `start`.
            input: As for `start`.
            predicted: As for `start`.
            mutual_information: As for `start`; needed if, and only if, the reference had it.
            error_probability: Likewise.

        Returns:
            Where the watch stands then.

        Raises:
            ValueError: For bad rows, of which none is counted, or before `start`.
        """
        self._check_started()
        further = {"mutual_information": mutual_information, "error_probability": error_probability}
        for name, given in further.items():
            if (given is not None) != (name in self.signals):
                with_, now = ("with", "without") if given is None else ("without", "with")
                raise ValueError(f"The watch was started {with_} `{name}`, and this update is {now} it.")
        rows = taken(predictions, input, predicted, further, self.num_classes)
        columns, chances = self._columns(rows), self._chances(len(rows.confidence))
        for name in self.signals:
            make = class_p_values if name == CLASSES else place_p_values
            self._wealth[name].bet(make(self._bags[name], columns[name], chances[:, SIGNALS.index(name)]))
        self._add(rows)
        return self.report()

    def _columns(self, rows: Taken) -> dict[str, np.ndarray]:
        """What each signal sees of rows, as places on its grid."""
        found = {CONFIDENCE: cells_of(odds_of(rows.confidence)), CLASSES: rows.predicted}
        for name, values in rows.further.items():  # mutual information has no upper end: it is its own odds
            found[name] = cells_of(values if name == "mutual_information" else odds_of(values))
        return found

    def _chances(self, count: int) -> np.ndarray:
        """`(N, 4)` uniform numbers that belong to the places of rows in the stream: one step of the generator each."""
        return np.random.Generator(np.random.Philox(self.seed).advance(self.rows)).random((count, len(SIGNALS)))

    def _add(self, rows: Taken) -> None:
        """Into the open window, which becomes the full one when it is."""
        assert self.reference is not None
        begin, count = 0, len(rows.confidence)
        while begin < count:
            end = min(count, begin + self.window - self._open.rows)
            part = slice(begin, end)
            self._open.add(rows.confidence[part], rows.predicted[part], self.reference.threshold)
            if self._open.rows == self.window:
                self._full, self._open = self._open, Sums(self.num_classes)
            begin = end
        self.rows += count

    def report(self) -> WatchReport:
        """Where the watch stands: alarms, and what is to be expected of the newest rows."""
        reference, level = self._check_started(), self.confidence_level
        window = self._full + self._open
        enough = window.rows >= FEWEST_ROWS
        low, high = wilson_interval(np.array([reference.correct]), np.array([reference.rows]), level)
        return WatchReport(
            rows=self.rows,
            window_rows=window.rows,
            reference_rows=reference.rows,
            reference_accuracy=reference.accuracy,
            reference_interval=(float(low[0]), float(high[0])),
            reference_overconfidence=reference.confidence - reference.accuracy,
            confidence=window.mean("confidence") if window.rows else None,
            expected=expected_accuracy(reference, window, level, self.seed) if enough else (),
            brier=expected_brier(reference, window, level) if enough else None,
            alarms=tuple(alarm for name in self.signals for alarm in self._alarms(name)),
            false_alarm=self.false_alarm,
            confidence_level=level,
        )

    def _alarms(self, name: str) -> list[Alarm]:
        """One entry a process; of two classes one process stands for both."""
        wealth = self._wealth[name]
        first = self.num_classes - len(wealth.peak)
        names = [f"class {first + k}" for k in range(len(wealth.peak))] if name == CLASSES else [name]
        now = wealth.log_wealth
        return [
            Alarm(one, int(wealth.alarmed[k]) or None, float(now[k]), float(wealth.peak[k]), wealth.needed)
            for k, one in enumerate(names)
        ]

    def state(self) -> dict[str, Any]:
        """All of it as JSON-ready values, exact."""
        reference = self._check_started()
        names = ("false_alarm", "window", "confidence_level", "seed", "num_classes", "rows")
        return {
            "format_version": FORMAT_VERSION,
            **{name: getattr(self, name) for name in names},
            "reference": reference.state(),
            "open": self._open.state(),
            "full": self._full.state(),
            "signals": {
                name: {"counts": self._bags[name].tolist(), "wealth": self._wealth[name].state()}
                for name in self.signals
            },
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any] | Fields) -> Watch:
        """The inverse of `state`.

        Raises:
            ValueError: If it is not such a state, or a value cannot be; the message names it.
        """
        fields = state if isinstance(state, Fields) else Fields(state, "A saved Watch", MEND)
        if not fields.has_version(FORMAT_VERSION):
            found = describe(fields.content.get("format_version"))
            raise ValueError(f"{fields.source} has format version {found}; this release reads {FORMAT_VERSION}.")
        with fields.named():
            watch = cls(
                false_alarm=fields.number("false_alarm"),
                window=fields.integer("window"),
                confidence_level=fields.number("confidence_level"),
                seed=fields.integer("seed"),
            )
        watch.num_classes = fields.integer("num_classes", least=2)
        watch.reference = Reference.from_state(fields.mapping("reference"), watch.num_classes)
        watch._read(fields)
        return watch

    def _read(self, fields: Fields) -> None:
        """The parts of a state that rows change; whatever does not fit together is refused."""
        assert self.reference is not None
        signals = fields.mapping("signals")
        known = [name for name in SIGNALS if name in signals]
        if known != list(signals) or known[:2] != [CONFIDENCE, CLASSES]:
            raise fields.wrong("signals", f"a mapping with {CONFIDENCE}, {CLASSES} and perhaps {', '.join(FURTHER)}")
        self._begin(known)
        self.rows = fields.integer("rows", least=0)
        self._open = Sums.from_state(fields.mapping("open"), self.num_classes)
        self._full = Sums.from_state(fields.mapping("full"), self.num_classes)
        full = 0 if self.rows < self.window else self.window
        if (self._open.rows, self._full.rows) != (self.rows % self.window, full):
            raise fields.wrong("rows", f"the number of rows that its windows of {self.window} say")
        for name in known:
            part = signals.mapping(name)
            self._bags[name] = counts_of(part, "counts", len(self._bags[name]))
            self._wealth[name] = Wealth.from_state(part.mapping("wealth"), *self._process(name))
            if self._wealth[name].rows != self.rows or self._bags[name].sum() != self.reference.rows + self.rows:
                raise part.wrong("counts", f"those of {self.reference.rows + self.rows} rows")

    def save(self, path: str | Path) -> None:
        """Write the watch to a JSON file, whole or not at all."""
        write_atomically(path, json.dumps(sealed(self.state()), allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Watch:
        """Read a watch that `save` wrote; it goes on where that one was.

        Raises:
            ValueError: If the file is damaged; the message names file, field and value.
        """
        fields = read_json(path, MEND)
        watch = cls.from_state(fields)
        fields.check_seal("the reference")
        return watch

    def __str__(self) -> str:
        return "This Watch is not started yet." if self.reference is None else self.report().to_markdown()

    def _check_started(self) -> Reference:
        if self.reference is None:
            raise ValueError("This Watch is not started yet; call start(probabilities, labels) with held-out rows.")
        return self.reference


def _check_labels(labels: np.ndarray, rows: Taken) -> None:
    size = len(rows.confidence)
    if labels.shape != (size,) or labels.dtype.kind not in "iub":
        raise ValueError(f"labels must hold one class number for each of the {size} rows, got shape {labels.shape}.")
    if size < FEWEST_ROWS:
        raise ValueError(f"A reference needs at least {FEWEST_ROWS} labelled rows, got {size}.")
    if labels.min() < 0 or labels.max() >= rows.num_classes:
        raise ValueError(f"labels must lie in [0, {rows.num_classes - 1}], got {labels.min()} to {labels.max()}.")
