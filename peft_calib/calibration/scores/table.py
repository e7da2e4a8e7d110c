"""The one table of scores; every list of scores in the package derives from it.

A new score is one line here and one function on the last axis. The module imports nothing but the standard library, so
that whoever needs names alone (a command line, a check of settings) does not pay for the numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

# Class probabilities of at most this are left out of TACE.
TACE_THRESHOLD = 0.01
# Replicates keep sums of all bins of every class column, 100 numbers a class and resample: a report of more classes
# has neither interval nor noise band of scores over class columns, whose values stay exact.
MOST_RESAMPLED_CLASSES = 200

#: What a score is computed from: means over rows, the top label's bins, its residuals smoothed, bins of every class
#: column, rows ranked by confidence (areas, or precisions), the running sum of residuals.
Source = Literal["rows", "top", "smooth", "classes", "areas", "precisions", "drift"]


@dataclass(frozen=True)
class Score:
    """What is known of a score before anything is measured."""

    key: str  # Its name in a report
    meaning: str  # In one line; the report prints it
    source: Source  # What it is computed from
    better: Literal["low", "high"] | None = "low"  # The better direction; None where there is none
    # `"calibration"` for what is zero for a model that has learned nothing and predicts the share of each class, and
    # so cannot choose a model; `"proper"` for a proper score, which can; else None
    kind: Literal["calibration", "proper"] | None = None
    # Whether it is an error that noise only increases: its interval is held against the noise floor
    folded: bool = False
    unordered: bool = False  # Whether the top label's equal-width bins and sums over rows are all it needs
    compared: bool = False  # Whether models are compared by it unless others are named
    tabled: bool = False  # Whether tables of runs show it unless others are named
    confidence: bool = False  # Whether tables of a confidence that is no class probability show it
    watched: bool = False  # Whether a training logs it at every evaluation unless others are named
    # What it can never leave, and so no end of an interval: its range, None above standing for `log C`
    least: float = 0.0
    most: float | None = 1.0

    def ends(self, num_classes: int) -> tuple[float, float]:
        """The range of the score for so many classes."""
        return self.least, math.log(num_classes) if self.most is None else self.most


# A calibration error.
_error = partial(Score, kind="calibration", folded=True)
_COLUMN = "each class column"
# Lists that a score is in unless others are named.
_EVERYWHERE: dict[str, Any] = {"compared": True, "tabled": True, "watched": True}

SCORES: tuple[Score, ...] = (
    Score(
        "accuracy", "share of rows whose first most probable class is the label", "rows", "high", unordered=True,
        **_EVERYWHERE,
    ),
    Score(
        "nll", "mean negative log-likelihood, nats", "rows", kind="proper", unordered=True, most=math.inf,
        **_EVERYWHERE,
    ),
    Score(
        "brier", "mean over rows of the sum over classes of squared errors, in [0, 2]", "rows", kind="proper",
        unordered=True, most=2.0, **_EVERYWHERE,
    ),
    Score("brier_reliability", "Murphy's reliability over class-wise equal-width bins", "classes", most=2.0),
    Score("brier_resolution", "Murphy's resolution over the same bins", "classes", "high"),
    Score("brier_uncertainty", "Murphy's uncertainty, sum of q (1 - q) over classes", "classes", None),
    Score(
        "brier_within_bin", "what binning leaves: brier - (reliability - resolution + uncertainty)", "classes", None,
        least=-math.inf, most=math.inf,
    ),
    _error("ece", "top label, equal-width bins (lo, hi], L1", "top", unordered=True, confidence=True, **_EVERYWHERE),
    _error("mce", "as ece, largest gap of a bin that is not empty", "top", unordered=True, watched=True),
    _error("rmsce", "as ece, L2", "top", unordered=True),
    _error("rmsce_debiased", "as rmsce, sampling variance removed (Kumar et al., 2019)", "top", unordered=True),
    _error("ace", "top label, equal-mass bins with ties spread, L1", "top", watched=True),
    _error("ace_classwise", f"{_COLUMN}, equal-mass bins, L1, mean over classes (Nixon et al., 2019)", "classes"),
    _error("tace", f"all class probabilities above {TACE_THRESHOLD} pooled, equal-mass bins, L1", "classes"),
    _error(
        "tace_classwise", f"as ace_classwise, probabilities above {TACE_THRESHOLD} only (Nixon et al., 2019)",
        "classes",
    ),
    _error(
        "classwise_ece", f"{_COLUMN}, equal-width bins, L1, mean over classes (static calibration error)", "classes",
        watched=True,
    ),
    _error(
        "smooth_ece", "top label, kernel-smoothed, data-driven bandwidth (Blasiok & Nakkiran, 2023)", "smooth",
        tabled=True, watched=True,
    ),
    _error("ks_error", "top label, Kolmogorov-Smirnov, no bins (Gupta et al., 2021)", "drift"),
    _error(
        "overconfidence", "part of ece from bins with confidence above accuracy", "top", folded=False, unordered=True
    ),
    _error(
        "underconfidence", "part of ece from bins with confidence below accuracy", "top", folded=False, unordered=True
    ),
    _error(
        "average_gap", "as ece, every bin that is not empty weighing the same (netcal's ACE)", "top", unordered=True
    ),
    Score("mean_confidence", "mean top-label probability", "rows", None, unordered=True, watched=True),
    _error(
        "confidence_gap", "mean top-label probability minus accuracy", "top", better=None, folded=False,
        unordered=True, least=-1.0,
    ),
    Score("mean_entropy", "mean entropy of the predicted distribution, nats", "rows", None, most=None),
    Score(
        "error_auroc", "probability that an error is less confident than a correct row, ties half", "areas", "high",
        watched=True, confidence=True,
    ),
    Score("error_aupr", "average precision, errors positive", "precisions", "high"),
    Score("success_aupr", "average precision, correct rows positive", "precisions", "high"),
    Score(
        "aurc", "mean error rate of the k surest rows over k = 1..N, ties in expectation", "areas", confidence=True,
        **_EVERYWHERE,
    ),
    Score("e_aurc", "aurc above the oracle order's", "areas"),
    Score("augrc", "area under generalised risk and coverage (Traub et al., 2024)", "areas"),
)  # fmt: skip

DEFINITIONS = {score.key: score.meaning for score in SCORES}
KEYS = tuple(DEFINITIONS)
BY_KEY = {score.key: score for score in SCORES}
# What follows from the top label's uniform bins and two sums: no sort, no class columns.
UNORDERED_KEYS = tuple(score.key for score in SCORES if score.unordered)
# Errors that are zero for a perfectly calibrated model and have no sign.
CALIBRATION_ERRORS = frozenset(score.key for score in SCORES if score.folded)
# Scores that a model which has learned nothing can have at their best.
BLIND_SCORES = frozenset(score.key for score in SCORES if score.kind == "calibration")
PROPER_SCORES = tuple(score.key for score in SCORES if score.kind == "proper")
CLASSWISE_KEYS = frozenset(score.key for score in SCORES if score.source == "classes")
# Scores of how errors are ranked.
RANKED = frozenset(score.key for score in SCORES if score.source in ("areas", "precisions"))
HIGHER_IS_BETTER = frozenset(score.key for score in SCORES if score.better == "high")
LOWER_IS_BETTER = frozenset(score.key for score in SCORES if score.better == "low")
COMPARED = tuple(score.key for score in SCORES if score.compared)
# Of those the scores that need no ranking: one column each of a narrow table.
HEADLINES = tuple(key for key in COMPARED if key not in RANKED)
TABLED = tuple(score.key for score in SCORES if score.tabled)
CONFIDENCE = tuple(score.key for score in SCORES if score.confidence)
WATCHED = tuple(score.key for score in SCORES if score.watched)


def keys_from(source: Source) -> tuple[str, ...]:
    """The scores that are computed from one source."""
    return tuple(score.key for score in SCORES if score.source == source)


def refuse_unknown(scores: object) -> None:
    """Raise `ValueError` for names of scores that a report does not have."""
    unknown = sorted(set(scores) - set(KEYS))  # type: ignore[call-overload]
    if unknown:
        raise ValueError(f"Unknown scores {unknown}; a report has {', '.join(KEYS)}.")
