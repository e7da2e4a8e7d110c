"""Where to put a threshold so that what is said of it holds: three searches over rows ordered by confidence.

**Risk.** The error rate of the rows above a threshold is not monotone in the threshold, so neither a binary search nor
"the largest threshold that looks fine" keeps a level. Here sets of the surest rows, tied rows together, are tested one
after the other from the most selective on, each with an exact binomial test of "its risk is above the target", and the
first that is not rejected ends the chain (fixed-sequence testing; Learn then Test, Angelopoulos et al., 2021). As the
surest rows alone may be too few, or unlucky, there are a few starts, at numbers of rows that depend on nothing but how
many rows there are, and each start has an equal share of the error probability (Bonferroni).

Why a chain over *all* thresholds between the rows is valid, although they lie where the rows lie: given the value of
row `m + 1`, the rows above it are independent draws from those above that value, so the start's test is exact. Let
it go on from a start at which the risk is within the target, and let `b` be the next lower threshold at which the
risk gets above it. The set of rows above `b` is among those tested, whatever rows there are. Between two thresholds
at which the risk equals the target it also equals it on average, so, however many rows fall into either part, errors
above `b` are as frequent as `Binomial(n, target)`. The test at `b` passes with the chain's probability at most, and
below `b` nothing is reached without it. Tied rows are put in a random order for this; later sets leave them together,
which can only have more errors than the set at `b`. So the order matters where a start falls among tied rows, and
nowhere else: there the start's test draws how many of their errors it meets.

**Coverage.** The share of all rows that have at least the confidence of the m-th of n follows Beta(m, n + 1 - m), or
is larger where rows are tied (Wilks, 1941).

**Costs.** Thresholds that do not depend on the rows, with a bound of the mean cost for each, all at once.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from scipy.special import betainc, betaincinv

from .bounds import NoGuaranteeError, chance_of_so_few, fewest_rows, percent, upper_end

#: Starts of chains at most: the most selective has a 32nd of the rows.
MOST_STARTS = 6
#: The threshold that no row reaches, and the one that every row reaches.
NEVER, ALWAYS = math.inf, 0.0
#: Costs are weighed at chances of an error that are these multiples of the break-even one.
MULTIPLES = tuple(2.0 ** (2 - k) for k in range(13))


class Prefixes(NamedTuple):
    """The surest rows, of every size that leaves tied rows together; the last one holds all rows."""

    lowest: np.ndarray  # `(G,)` descending confidence of the least sure row of each
    accepted: np.ndarray  # `(G,)` rows
    errors: np.ndarray  # `(G,)` wrong rows among them

    @classmethod
    def of(cls, confidence: np.ndarray, correct: np.ndarray) -> Prefixes:
        """From `(N,)` confidences and whether the predictions are right."""
        order = np.argsort(-confidence, kind="stable")
        values, wrong = confidence[order], np.cumsum(~correct[order])
        ends = np.flatnonzero(np.append(values[1:] < values[:-1], True))
        return cls(values[ends], ends + 1, wrong[ends])

    @property
    def num_rows(self) -> int:
        return int(self.accepted[-1])

    @property
    def thresholds(self) -> np.ndarray:
        """`(G,)`: what to reach so as to be above every row outside of a set; 0 for all rows."""
        return np.append(np.nextafter(self.lowest[1:], np.inf), ALWAYS)


class Found(NamedTuple):
    """A threshold, what is claimed of it, and what the rows showed."""

    threshold: float  # Rows of at least this confidence are answered
    bound: float  # Risk or mean cost: at most this. Coverage: at least this
    accepted: int  # Rows answered among those fitted on
    errors: int  # Wrong ones among them
    tail: float  # Error probability of each single test or bound


def starts_of(num_rows: int, risk: float, tail: float) -> list[int]:
    """Numbers of rows at which chains start: all, half, a quarter ..., while flawless rows would pass there.

    Of few rows the second start has no more than it takes. A start costs little: at 2,000 rows six of them answer
    1 % fewer rows than two. All rows are among the starts so that a bound of the whole stands by itself.
    """
    if num_rows < fewest_rows(risk, tail):
        return []
    number = 1
    while number < MOST_STARTS and num_rows >> number >= fewest_rows(risk, tail / (number + 1)):
        number += 1
    if number == 1 and num_rows > (fewest := fewest_rows(risk, tail / 2)):
        return [num_rows, fewest]
    return [num_rows >> k for k in range(number)]


def for_risk(prefixes: Prefixes, risk: float, tail: float, seed: int = 0) -> Found:
    """The lowest threshold above which the risk is at most `risk`, but for a probability of `tail`.

    `seed` matters where a start falls among tied rows.

    Raises:
        NoGuaranteeError: If there is none; it says how many rows it would take.
    """
    num_rows = prefixes.num_rows
    starts = starts_of(num_rows, risk, tail)
    if not starts:
        needed = fewest_rows(risk, tail)
        raise NoGuaranteeError(
            f"{num_rows} rows cannot show that at most {percent(risk)} is wrong with {percent(1.0 - tail)} "
            f"confidence, not even if all are right: that takes {needed} rows. Label more rows, or ask for less.",
            num_rows, needed,
        )  # fmt: skip
    each = tail / len(starts)
    best = _deepest(prefixes, starts, risk, each, seed)
    if best < 0:
        raise _too_many_errors(prefixes, risk, tail)
    bound = risk
    if prefixes.accepted[best] == num_rows:  # the one test made whatever the rows look like: its bound stands
        bound = float(upper_end(prefixes.errors[best], num_rows, each))
    return _found(prefixes, best, bound, each)


def _deepest(prefixes: Prefixes, starts: list[int], risk: float, each: float, seed: int) -> int:
    """Index of the largest set that a chain reaches, each of its tests at an error probability; -1 if none."""
    passed = chance_of_so_few(prefixes.errors, prefixes.accepted, risk) <= each
    generator = np.random.default_rng(seed)
    parts = [errors_at(prefixes, start, generator) for start in starts]
    begins = chance_of_so_few(parts, starts, risk) <= each
    return max(_end_of_chain(prefixes, passed, start) if ok else -1 for start, ok in zip(starts, begins, strict=True))


def errors_at(prefixes: Prefixes, start: int, generator: np.random.Generator) -> int:
    """Errors among the `start` surest rows; which of the tied rows at its end belong to them is drawn."""
    k = int(np.searchsorted(prefixes.accepted, start))
    rows, errors = (int(part[k - 1]) if k else 0 for part in (prefixes.accepted, prefixes.errors))
    wrong = int(prefixes.errors[k]) - errors
    right = max(0, int(prefixes.accepted[k]) - rows - wrong)
    return errors + int(generator.hypergeometric(wrong, right, start - rows))


def _end_of_chain(prefixes: Prefixes, passed: np.ndarray, start: int) -> int:
    """Index of the last set that passes with all before it from the one that holds the start; -1 if none does."""
    first = int(np.searchsorted(prefixes.accepted, start))
    failed = np.flatnonzero(~passed[first:])
    last = first + int(failed[0]) - 1 if len(failed) else len(passed) - 1
    return last if last >= first else -1


def _found(prefixes: Prefixes, index: int, bound: float, tail: float) -> Found:
    accepted, errors = int(prefixes.accepted[index]), int(prefixes.errors[index])
    return Found(float(prefixes.thresholds[index]), bound, accepted, errors, tail)


def _too_many_errors(prefixes: Prefixes, risk: float, tail: float) -> NoGuaranteeError:
    """Says how the surest rows did, and how many rows with the same shares of errors would do."""
    num_rows = prefixes.num_rows
    # of fewer rows the share of errors says little about more rows of their kind
    enough = prefixes.accepted >= min(max(20, num_rows // 10), num_rows)
    shares = np.where(enough, prefixes.errors / prefixes.accepted, np.inf)
    best = int(np.flatnonzero(shares == shares.min())[-1])
    told = (
        f"No threshold answers with at most {percent(risk)} wrong at {percent(1.0 - tail)} confidence: of the surest "
        f"{prefixes.accepted[best]} of {num_rows} rows {prefixes.errors[best]} are wrong. "
    )
    needed = _rows_of_this_kind(prefixes, risk, tail) if shares[best] < risk else None
    if needed is None:
        mend = "No number of such rows would do: ask for a higher risk, or for a model that is wrong less often."
    else:
        mend = f"With the same shares of errors it takes some {needed} rows: label more, or ask for a higher risk."
    return NoGuaranteeError(told + mend, num_rows, needed)


def _rows_of_this_kind(prefixes: Prefixes, risk: float, tail: float) -> int | None:
    """How many rows with the same shares of errors have a threshold; None if a hundred million have none."""
    size = len(prefixes.accepted)
    few = np.unique(np.linspace(0, size - 1, min(size, 400)).round().astype(np.int64))
    lowest, *counts = (part[few] for part in prefixes)
    factor = 2.0**0.25
    while (rows := round(prefixes.num_rows * factor)) <= 10**8:
        more = Prefixes(lowest, *(np.rint(part * factor).astype(np.int64) for part in counts))
        starts = starts_of(rows, risk, tail)
        if starts and _deepest(more, starts, risk, tail / len(starts), 0) >= 0:
            return rows
        factor *= 2.0**0.25
    return None


def for_coverage(prefixes: Prefixes, coverage: float, tail: float) -> Found:
    """The highest threshold that at least `coverage` of all rows reach, but for a probability of `tail`.

    Raises:
        NoGuaranteeError: If even the least sure row may lie too high.
    """
    num_rows = prefixes.num_rows
    ranks = np.arange(1, num_rows + 1)
    sure = betainc(ranks, num_rows + 1 - ranks, coverage) <= tail
    if not sure.any():
        needed = fewest_rows(1.0 - coverage, tail)
        raise NoGuaranteeError(
            f"{num_rows} rows cannot show that {percent(coverage)} of all rows are answered with "
            f"{percent(1.0 - tail)} confidence: that takes {needed} rows. Give more rows, or ask for less.",
            num_rows, needed,
        )  # fmt: skip
    rank = int(ranks[sure][0])
    index = int(np.searchsorted(prefixes.accepted, rank))
    bound = float(betaincinv(rank, num_rows + 1 - rank, tail))
    accepted, errors = int(prefixes.accepted[index]), int(prefixes.errors[index])
    return Found(float(prefixes.lowest[index]), bound, accepted, errors, tail)


def cost_thresholds(wrong: float, passed_on: float) -> np.ndarray:
    """`(J,)` confidences to weigh, whatever the rows: all rows, and `1 - m passed_on / wrong` for some multiples m."""
    chances = np.array([m * passed_on / wrong for m in MULTIPLES])
    return np.concatenate([[ALWAYS], 1.0 - chances[chances < 1.0]])


def for_costs(prefixes: Prefixes, wrong: float, passed_on: float, tail: float) -> Found:
    """The threshold whose mean cost a row has the lowest upper bound; all of them hold but for a probability `tail`.

    A row costs `passed_on` if it is not answered and `wrong` if the answer is wrong: `passed_on` for every row that is
    either, and the rest for those answered wrongly. Both shares have exact bounds. To pass on every row is among the
    choices, at a cost that needs no bound.
    """
    thresholds = cost_thresholds(wrong, passed_on)
    each = tail / (2 * len(thresholds))
    accepted, errors = counts_at(prefixes, thresholds)
    num_rows = prefixes.num_rows
    either = upper_end(num_rows - accepted + errors, num_rows, each)
    bounds = passed_on * either + (wrong - passed_on) * upper_end(errors, num_rows, each)
    best = int(bounds.argmin())
    if bounds[best] >= passed_on:
        return Found(NEVER, passed_on, 0, 0, each)
    return Found(float(thresholds[best]), float(bounds[best]), int(accepted[best]), int(errors[best]), each)


def counts_at(prefixes: Prefixes, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of at least each confidence, and errors among them."""
    sets = np.searchsorted(-prefixes.lowest, -thresholds, side="right")
    accepted, errors = (np.concatenate([[0], part]) for part in (prefixes.accepted, prefixes.errors))
    return accepted[sets], errors[sets]


def checked_costs(costs: Any) -> tuple[float, float]:
    """Returns costs of a wrong answer and of a row passed on, and raises ValueError for what cannot be."""
    try:
        wrong, passed_on = (float(cost) for cost in costs)
    except (TypeError, ValueError):
        raise ValueError(
            f"`costs` must be two numbers, of a wrong answer and of a row passed on, got {costs!r}."
        ) from None
    if not 0.0 < passed_on < wrong < math.inf:
        raise ValueError(
            f"`costs` must be (wrong, passed_on) with 0 < passed_on < wrong, got ({wrong:g}, {passed_on:g}): where "
            "passing a row on costs as much as a wrong answer there is nothing to decide, every row is answered."
        )
    return wrong, passed_on
