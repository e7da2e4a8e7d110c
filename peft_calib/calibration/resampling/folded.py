r"""Intervals of scores that fold at zero: sums of absolute gaps, their squares and maxima.

Such a score is biased upwards by noise, more so in a resample: quantiles of resampled scores keep away from a true 0,
and a bias correction takes the bias off twice (100 rows in one bin: [0, .0057] where .10 is possible).

So a test is inverted. A truth is supposed in which every gap `g_b` of the rows at hand is moved towards or away from
zero by `k` of its standard errors, `g_b(k) = sign(g_b) max(|g_b| + k s_b, 0)`: from perfect calibration (`k = -inf`)
over the gaps as they are (`k = 0`) to larger ones. Samples from that truth deviate from it as resamples do from the
rows at hand, so their scores are `T(g(k) + d_r)` with the deviations `d_r` of the bootstrap. The interval holds the
truths under which the observed score is not among the smallest or largest:

.. math:: \{T(g(k)): P(T(g(k) + d) \ge T(g)) > tail, P(T(g(k) + d) \le T(g)) > tail\}.

Two refinements of the upper end: a score below the lower quartile of what a perfect model gets is luck, and is taken
for that quartile; and the end, a little short, as the gaps it starts from have noise, lies half-way to the quantile of
the resampled scores, or on it where that is lower or the interval does not reach zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Score = Callable[[np.ndarray], np.ndarray]


class Folded(NamedTuple):
    """What the interval of one score needs."""

    gaps: np.ndarray  # `(M,)` gaps of the rows at hand
    errors: np.ndarray  # `(M,)` their standard errors
    deviations: np.ndarray  # `(N, R)` what resamples deviate by, after `spread`
    score: Score  # `(N, R)` spread gaps, deviations added, to `(R,)` scores; what samples are compared by
    observed: float  # The score of the rows at hand, as `score` takes it
    truth: Score  # `(M, 1)` gaps to `(1,)`: the score of a whole population with these gaps
    # `(M, 1)` gaps to `(N, 1)`: where they lie on the axis that deviations live on; the same by default
    spread: Score | None = None
    # 0 if gaps of either sign count, 1 or -1 if only positive or negative ones do: then a larger truth moves all gaps
    # up or down, because one below zero may belong to one above
    side: int = 0

    def moved(self, steps: float) -> np.ndarray:
        """`(M, 1)` gaps of the truth that lies `steps` standard errors away."""
        if self.side and steps > 0.0:
            return (self.gaps + self.side * steps * self.errors)[:, None]
        size = np.maximum(np.abs(self.gaps) + steps * self.errors, 0.0)
        return np.where(self.gaps < 0.0, -size, size)[:, None]

    def samples(self, steps: float) -> np.ndarray:
        """`(R,)` scores of samples from that truth."""
        gaps = self.moved(steps)
        return self.score((gaps if self.spread is None else self.spread(gaps)) + self.deviations)


def folded_interval(folded: Folded, tail: float) -> tuple[float, float]:
    """The interval of one score, with probability `tail` outside on each side."""
    # Sums in another order differ in the last bits: what is equal counts.
    slack = 1e-9 * (abs(folded.observed) + 1e-9)
    at_least, at_most = folded.observed - slack, folded.observed + slack
    if not folded.side:
        at_most = max(at_most, float(np.quantile(folded.score(folded.deviations), 0.25)))
    low = _crossing(lambda steps: float((folded.samples(steps) >= at_least).mean()) > tail, rising=True)
    high = _crossing(lambda steps: float((folded.samples(steps) <= at_most).mean()) > tail, rising=False)
    # No score is biased downwards: what was observed is never below the interval, even where the gaps of bins do not
    # tell all of it, as with labels that change inside a bin.
    start = min(float(folded.truth(folded.moved(low))[0]), folded.observed)
    end, resampled = float(folded.truth(folded.moved(high))[0]), float(np.quantile(folded.samples(0.0), 1.0 - tail))
    end = resampled if resampled < end or start > 0.0 else 0.5 * (end + resampled)
    return start, max(end, folded.observed if not folded.side else start)


# Standard errors beyond which no truth is looked for.
FARTHEST = 64.0


def _crossing(holds: Callable[[float], bool], *, rising: bool) -> float:
    """The first (or last) step at which a condition that becomes true (or false) once holds."""
    inside, outside = 0.0, 0.0
    away = -1.0 if rising else 1.0
    if rising and holds(-FARTHEST):
        return -FARTHEST
    if holds(0.0):
        outside = away
        while holds(outside) and abs(outside) < FARTHEST:
            inside, outside = outside, 2.0 * outside
    else:
        # The bias alone rules out the gaps as they are: the end lies on the other side.
        inside = -away
        while not holds(inside) and abs(inside) < FARTHEST:
            outside, inside = inside, 2.0 * inside
    while abs(outside - inside) > 0.01:
        middle = 0.5 * (inside + outside)
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return inside


def widened(
    deviations: np.ndarray, least: np.ndarray, normals: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Deviations with no standard error below `least`, by `missing_noise`, and their standard errors."""
    return deviations + missing_noise(deviations, least, normals), np.maximum(deviations.std(axis=1), least)


def missing_noise(deviations: np.ndarray, least: np.ndarray, normals: np.ndarray | None = None) -> np.ndarray:
    """`(M, R)` noise that takes the standard errors of deviations to `least` where these are larger.

    It is the deviations of other resamples, scaled and with their sign turned, so that bins go together as they do in
    resamples. Turned, because resamples of one error among a hundred rows cannot have fewer than none, where four are
    to be expected: what is missing is the tail on the other side.
    """
    errors = deviations.std(axis=1)
    missing = np.sqrt(np.maximum(least**2 - errors**2, 0.0))
    short = np.flatnonzero(missing > 0.0)
    noise = np.zeros(deviations.shape)
    if not len(short):
        return noise
    generator = np.random.default_rng(0)
    other = generator.permutation(deviations.shape[1])
    varies = errors > 1e-6 * least
    noise[short] = -deviations[np.ix_(short, other)] / np.where(varies, errors, 1.0)[short, None]
    still = short[~varies[short]]
    if len(still):
        if normals is None:
            # Row by row, so those of the first rows are the same however many follow.
            normals = generator.normal(size=(still[-1] + 1, deviations.shape[1]))
        noise[still] = normals[still]
    noise[short] *= missing[short, None]
    return noise


def over_cells(
    gaps: np.ndarray,
    bins: np.ndarray,
    mass: np.ndarray,
    errors: tuple[np.ndarray, float],
    score: Score,
    truth: Score,
    smooth: Score = lambda values: values,
) -> Folded:
    """A score over `(N, R + 1)` gaps of fine cells, the last of the rows at hand; its truths have one gap a bin.

    Cells lie in `bins` and hold `mass` rows, by which a bin's gap is spread; `errors` are the variances of their sums
    and the number of all rows. Samples are compared by `score` of what the linear `smooth` makes of cells.
    """
    variance, total = errors
    filled = np.unique(bins[mass > 0])
    member = (bins == filled[:, None]).astype(np.float64)
    pattern = (member * mass / (member @ mass)[:, None]).T  # `(N, M)` share of its bin's rows in each cell
    deviations = gaps[:, :-1] - gaps[:, -1:]
    # those of a bin together are no smaller than its standard errors
    moved = deviations + pattern @ missing_noise(member @ deviations, np.sqrt(member @ variance) / total)
    spread, observed = smooth(pattern), float(score(smooth(gaps[:, -1:]))[0])
    return Folded(
        member @ gaps[:, -1], (member @ moved).std(axis=1), smooth(moved), score, observed,
        lambda gaps: truth(pattern @ gaps), lambda gaps: spread @ gaps,
    )  # fmt: skip


def absolute(weights: np.ndarray | None = None) -> Score:
    """Weighted sum of absolute gaps."""
    if weights is None:
        return lambda gaps: np.abs(gaps).sum(axis=0)
    return lambda gaps: weights @ np.abs(gaps)


def squares(weights: np.ndarray) -> Score:
    """Weighted sum of squared gaps."""
    return lambda gaps: weights @ gaps**2
