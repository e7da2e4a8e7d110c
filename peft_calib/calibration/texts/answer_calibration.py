"""From scores of generated answers to the probability that an answer is right."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ...files import write_atomically
from ...json_files import Fields, read_json, sealed
from ..fingerprint import SplitFingerprint, row_hashes
from ..inputs import as_numpy, check_seed
from ..recalibrate.fitted import refuse_overlap
from ..report.confidence import ConfidenceReport, confidence_report
from .maps import KINDS, Fitted, cross_entropy, fit_map
from .scores import FALLING, AnswerScores

FORMAT_VERSION = 1
MEND = "Fit it again on labelled answers"
#: Fewest right answers, and fewest wrong ones, that a map is fitted on.
FEWEST_OF_EACH = 10
#: Of the rarer of the two outcomes, for each score of a logistic regression, and for a step function.
FEWEST_A_SLOPE, FEWEST_FOR_STEPS = 5, 25
FOLDS = 5
#: To what scores are rounded before rows are known by them: above what another batch changes in most rows,
#: and below what lies between answers to different prompts.
STEP = 1e-4
METHODS = ("auto", *KINDS[1:])

#: A kind of map, and the scores it takes.
Key: TypeAlias = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class Candidate:
    """One way to a probability that was tried.

    Attributes:
        kind: Of the map.
        scores: What it takes.
        nll: Mean cross-fitted cross-entropy, nats; None where there are too few rows for it.
        excess: How much larger that is than the least one, and the standard error of this difference.
    """

    kind: str
    scores: tuple[str, ...]
    nll: float | None
    excess: tuple[float, float] | None

    @property
    def told(self) -> str:
        """In words."""
        return "the base rate" if self.kind == "constant" else f"{self.kind} of {', '.join(self.scores)}"


class AnswerCalibration:
    """A monotone map of scores of an answer to P(correct), chosen by cross-fitting and fitted on labelled answers.

    Candidates are the base rate; of each score `logit p = a s + b` with `a >= 0` on smoothed targets (Platt, 1999) and
    a step function (isotonic regression); of all scores a logistic regression whose slopes are not negative. Each is
    fitted on four fifths of the rows and judged by its cross-entropy on the rest, five times over. The one of least
    cross-entropy is taken, or a simpler one that it is not better than by a standard error of the difference. So it
    comes out as the base rate, the same for every answer, where no score tells right answers from wrong ones.

    No map ever falls where a score says "surer": to calibrate changes no ranking by a single score.

    Args:
        method: `"auto"`, or one kind: `"platt"`, `"isotonic"` or `"logistic"`.
        scores: Names of the scores to choose from; all that `fit` is given if None.
        falling: Names of own scores that are smaller where an answer is surer; those of this package are known.
        seed: Of the folds.

    Attributes:
        fitted: The map.
        candidates: What was tried, with its cross-fitted cross-entropy.
        fitted_on: Fingerprint of the rows, on which it refuses to be evaluated.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> log_p = -generator.exponential(1.0, 400)
        >>> right = generator.random(400) < np.exp(log_p)
        >>> calibration = AnswerCalibration().fit({"mean_log_probability": log_p}, right)
        >>> print(calibration)
        P(correct) by platt of mean_log_probability, fitted on 400 answers, 185 of them right.
        >>> calibration.transform({"mean_log_probability": [-0.1, -3.0]}).round(2)
        array([0.84, 0.01])
    """

    def __init__(
        self, method: str = "auto", scores: Sequence[str] | None = None, *, falling: Sequence[str] = (), seed: int = 0
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {method!r}.")
        for name, given in (("scores", scores), ("falling", falling)):
            if isinstance(given, str):
                raise ValueError(f"{name} is a list of names: {name}=[{given!r}].")
        self.method, self.scores = method, None if scores is None else tuple(scores)
        self.falling, self.seed = frozenset(falling) | FALLING, check_seed(seed)
        self.fitted: Fitted | None = None
        self.candidates: tuple[Candidate, ...] = ()
        self.fitted_on: SplitFingerprint | None = None
        self.scores_seen: tuple[str, ...] = ()
        self.num_right = 0

    def fit(self, scores: Mapping[str, Any], correct: Any) -> AnswerCalibration:
        """Chooses and fits the map on answers that are known to be right or wrong.

        Args:
            scores: Scores by name, each `(N,)`: an `AnswerScores`, or numbers of your own. The model was not trained
                on these prompts.
            correct: `(N,)` bool, or zeros and ones, which answers are right.

        Returns:
            The object itself.

        Raises:
            ValueError: For scores that are no finite numbers or not paired, fewer than 10 right or 10 wrong answers,
                or too few of them for the method asked for; the message says how many it takes.
        """
        table, right = self._labelled(scores, correct)
        names = tuple(table) if self.scores is None else self.scores
        self._check_falling(table)
        rarer = min(int(right.sum()), int((~right).sum()))
        if rarer < FEWEST_OF_EACH:
            what = "right" if right.sum() == rarer else "wrong"
            raise ValueError(
                f"{rarer} of {len(right)} answers are {what}, and P(correct) needs at least {FEWEST_OF_EACH} of each "
                "kind: label more answers, or ask for easier or harder ones."
            )
        wanted = self._wanted(names, rarer)
        possible = [one for one in wanted if rarer >= fewest(*one)]
        losses = {key: self._cross_fitted(*key, table, right) for key in possible}
        kind, chosen = _simplest_of_the_best(losses, names)
        self.candidates = _told(losses, wanted)
        self.fitted = fit_map(kind, chosen, self._surer(table, chosen), right)
        self.fitted_on = SplitFingerprint.of_hashes(_hashes(table, names, right))
        self.scores_seen, self.num_right = names, int(right.sum())
        return self

    def _check_falling(self, table: Mapping[str, Any]) -> None:
        unknown = sorted(self.falling - FALLING - set(table))
        if unknown:
            raise ValueError(f"falling names {unknown}, which are none of the scores: {sorted(table)}.")

    def transform(self, scores: Mapping[str, Any]) -> Any:
        """The probability that each answer is right.

        Args:
            scores: Those that the map takes, by name (`fitted.scores`); others may stand beside them.

        Returns:
            `(N,)` float64 in (0, 1).

        Raises:
            ValueError: If it is not fitted, or a score is missing.
        """
        fitted = self._check_fitted()
        table = _table(scores)
        self._check_there(table, fitted.scores)
        return fitted.apply(self._surer(table, fitted.scores) if fitted.scores else np.empty((table.num_rows, 0)))

    def evaluate(self, scores: Mapping[str, Any], correct: Any, **options: Any) -> ConfidenceReport:
        """Report on P(correct) of answers that it was not fitted on: ECE, Brier score, AUROC, AURC with intervals.

        Args:
            scores: As for `fit`, all that `fit` was given: by them rows are known again.
            correct: Which answers are right.
            options: Of `confidence_report`: `num_bins`, `confidence_level`, ...

        Returns:
            The report; `risk_coverage_diagram((p, correct))` draws its risk over coverage.

        Raises:
            ValueError: If more than 5 % of the rows were fitted on: such a report would flatter.
        """
        self._check_fitted()
        assert self.fitted_on is not None
        table, right = self._labelled(scores, correct, self.scores_seen)
        overlap = self.fitted_on.seen(_hashes(table, self.scores_seen, right))
        mend = "P(correct) must be reported on answers it has not seen: hold out labelled answers for the report."
        refuse_overlap(overlap, self.fitted_on, type(self).__name__, mend, "answers")
        return confidence_report(self.transform(table), right, **options)

    def save(self, path: str | Path) -> None:
        """Writes the fitted map to a JSON file, whole or not at all."""
        fitted = self._check_fitted()
        assert self.fitted_on is not None
        content = {
            "format_version": FORMAT_VERSION,
            "calibration": type(self).__name__,
            "settings": {
                "method": self.method,
                "scores": None if self.scores is None else list(self.scores),
                "falling": sorted(self.falling - FALLING),
                "seed": self.seed,
            },
            "fitted": fitted.to_dict(),
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "scores_seen": list(self.scores_seen),
            "num_right": self.num_right,
            "fitted_on": self.fitted_on.to_dict(),
        }
        write_atomically(path, json.dumps(sealed(content), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> AnswerCalibration:
        """Reads what `save` wrote.

        Raises:
            ValueError: If the file is no such file, holds values that cannot be, or was changed after the fit; the
                message names file, field and value.
        """
        fields = read_json(path, MEND)
        if fields.text("calibration") != cls.__name__:
            raise fields.wrong("calibration", repr(cls.__name__))
        fields.check_version(FORMAT_VERSION)
        settings = fields.mapping("settings")
        names = settings.listing("scores", str, None)
        falling, seed = settings.listing("falling", str), settings.integer("seed", least=0)
        with fields.named():
            found = cls(settings.text("method", among=METHODS), names, falling=falling, seed=seed)
        found.fitted = Fitted.from_fields(fields.mapping("fitted"))
        found.candidates = tuple(
            _candidate(Fields(one, str(path), MEND)) for one in fields.listing("candidates", dict)
        )
        found.scores_seen = tuple(fields.listing("scores_seen", str))
        found.num_right = fields.integer("num_right", least=0)
        found.fitted_on = SplitFingerprint.from_fields(fields.mapping("fitted_on"))
        fields.check_seal("the map")
        return found

    def __str__(self) -> str:
        if self.fitted is None or self.fitted_on is None:
            return "This AnswerCalibration is not fitted yet; call fit(scores, correct) on labelled answers."
        told = Candidate(self.fitted.kind, self.fitted.scores, None, None).told
        if self.fitted.kind == "constant":
            told = "the base rate, since no score tells right answers from wrong ones"
        rows = self.fitted_on.num_rows
        return f"P(correct) by {told}, fitted on {rows:,} answers, {self.num_right:,} of them right."

    def to_markdown(self) -> str:
        """What was chosen, and what else was tried."""
        self._check_fitted()
        lines = [str(self), "", "| tried | cross-fitted NLL | above the least |", "|---|---:|---:|"]
        for one in self.candidates:
            nll = "too few answers" if one.nll is None else f"{one.nll:.4f}"
            above = "" if one.excess is None else f"{one.excess[0]:.4f} ({one.excess[1]:.4f})"
            lines.append(f"| {one.told} | {nll} | {above} |")
        return "\n".join([*lines, "", "In brackets the standard error of the difference."])

    def _wanted(self, names: tuple[str, ...], rarer: int) -> list[Key]:
        """What is to be tried; an error where there are rows enough for none of it."""
        single: list[Key] = [(kind, (name,)) for kind in ("platt", "isotonic") for name in names]
        if self.method == "auto":
            return [("constant", ()), *single, *([("logistic", names)] if len(names) > 1 else [])]
        wanted = [one for one in single if one[0] == self.method] or [("logistic", names)]
        if all(rarer < fewest(*one) for one in wanted):
            raise ValueError(
                f"{self.method} of {len(names)} score(s) takes at least {min(fewest(*one) for one in wanted)} right "
                f'and as many wrong answers, and there are {rarer} of one kind: label more, or take method="platt".'
            )
        return wanted

    def _cross_fitted(self, kind: str, names: tuple[str, ...], table: AnswerScores, right: np.ndarray) -> np.ndarray:
        """`(N,)` cross-entropy of each row under a map of the other folds."""
        surer, losses = self._surer(table, names), np.empty(len(right))
        folds = _folds(right, self.seed)
        for fold in range(FOLDS):
            held = folds == fold
            found = fit_map(kind, names, surer[~held], right[~held])
            losses[held] = cross_entropy(found.apply(surer[held]), right[held])
        return losses

    def _surer(self, table: AnswerScores, names: Sequence[str]) -> np.ndarray:
        """`(N, D)` scores, turned so that larger is surer."""
        if not names:
            return np.empty((table.num_rows, 0))
        return np.stack([-table[name] if name in self.falling else table[name] for name in names], axis=1)

    def _labelled(
        self, scores: Mapping[str, Any], correct: Any, wanted: Sequence[str] | None = None
    ) -> tuple[AnswerScores, np.ndarray]:
        table = _table(scores)
        self._check_there(table, wanted or self.scores or ())
        right = as_numpy(correct, "correct")
        if right.shape != (table.num_rows,) or not np.isin(right, (0, 1)).all():
            raise ValueError(
                f"correct must hold one of True and False (or 1 and 0) for each of the {table.num_rows} answers, got "
                f"{right.dtype} of shape {right.shape}."
            )
        return table, right.astype(bool)

    def _check_there(self, table: AnswerScores, names: Sequence[str]) -> None:
        missing = [name for name in names if name not in table]
        if missing:
            raise ValueError(f"There is no score {', '.join(missing)}; there are {', '.join(table)}.")

    def _check_fitted(self) -> Fitted:
        if self.fitted is None:
            raise ValueError(str(self))
        return self.fitted


def fewest(kind: str, names: Sequence[str]) -> int:
    """How many right answers, and how many wrong ones, a kind of map takes at least.

    Example:
        >>> fewest("platt", ["a"]), fewest("isotonic", ["a"]), fewest("logistic", list("abcd"))
        (10, 25, 20)
    """
    needed = FEWEST_FOR_STEPS if kind == "isotonic" else FEWEST_A_SLOPE * len(names) if kind == "logistic" else 0
    return max(FEWEST_OF_EACH, needed)


def _simplest_of_the_best(losses: Mapping[Key, np.ndarray], names: tuple[str, ...]) -> Key:
    """The candidate of least mean loss, or a simpler one that it is not better than by a standard error."""

    def order(key: Key) -> tuple[float, int, int]:
        return float(losses[key].mean()), KINDS.index(key[0]), names.index(key[1][0]) if key[1] else 0

    best = min(losses, key=order)
    gaps = {key: _difference(losses[key], losses[best]) for key in losses}
    close = [key for key, (excess, error) in gaps.items() if excess <= error]
    simplest = min(KINDS.index(kind) for kind, _ in close)
    return min((key for key in close if KINDS.index(key[0]) == simplest), key=order)


def _difference(losses: np.ndarray, best: np.ndarray) -> tuple[float, float]:
    """Mean of the paired differences, and its standard error."""
    gaps = losses - best
    return float(gaps.mean()), float(gaps.std(ddof=1) / np.sqrt(len(gaps)))


def _told(losses: Mapping[Key, np.ndarray], wanted: Sequence[Key]) -> tuple[Candidate, ...]:
    best = min(losses.values(), key=lambda one: float(one.mean()))
    found = {key: (float(one.mean()), _difference(one, best)) for key, one in losses.items()}
    return tuple(Candidate(*key, *found.get(key, (None, None))) for key in wanted)


def _candidate(fields: Fields) -> Candidate:
    excess = fields.listing("excess", float, None)
    return Candidate(
        fields.text("kind", among=KINDS),
        tuple(fields.listing("scores", str)),
        fields.number("nll", default=None),
        None if excess is None else (float(excess[0]), float(excess[-1])),
    )


def _folds(right: np.ndarray, seed: int) -> np.ndarray:
    """`(N,)` fold of each row: right and wrong answers dealt out evenly, in an order of chance."""
    folds, generator = np.empty(len(right), np.int64), np.random.default_rng(seed)
    for outcome in (False, True):
        rows = generator.permutation(np.flatnonzero(right == outcome))
        folds[rows] = np.arange(len(rows)) % FOLDS
    return folds


def _table(scores: Mapping[str, Any]) -> AnswerScores:
    return scores if isinstance(scores, AnswerScores) else AnswerScores(scores)


def _hashes(table: AnswerScores, names: Sequence[str], right: np.ndarray) -> np.ndarray:
    steps = np.stack([np.rint(table[name] / STEP) for name in names], axis=1) + 0.0
    return row_hashes(steps, right.astype(np.int64))
