"""Intervals of scores of a ranking where one of its two kinds of row, the right or the wrong, is rare.

Resamples of four wrong rows hold each of them again and again, but never a fifth, nor one in another place: quantiles
of resampled scores then end too early (100 rows of which 4 are wrong: AURC is held in 87 of 100 data sets).
"""

from __future__ import annotations

import numpy as np
from scipy.special import stdtrit


def auroc_interval(auroc: float, variance: float, rarer: int, num_rows: int, tail: float) -> tuple[float, float]:
    """Interval of an area under the ROC curve: Wilson's form, with the number of trials that has its variance.

    No ranking varies more than that many independent trials as there are rows of the rarer kind (van Dantzig, 1951),
    nor less than all rows would; in between the resamples say, whose variance over `m` rows is short by `(m - 1) / m`.
    """
    spread = variance * rarer / max(rarer - 1, 1)
    trials = auroc * (1.0 - auroc) / spread if spread > 0.0 else float(rarer)
    trials = float(np.clip(trials, rarer, num_rows))
    z = float(stdtrit(max(rarer - 1, 1), 1.0 - tail))
    centre = (auroc + 0.5 * z**2 / trials) / (1.0 + z**2 / trials)
    half = z / (1.0 + z**2 / trials) * np.sqrt(auroc * (1.0 - auroc) / trials + 0.25 * z**2 / trials**2)
    # At 0 and 1 rounding would leave the area an ulp outside.
    return max(min(float(centre - half), auroc), 0.0), min(max(float(centre + half), auroc), 1.0)


def places(key: str, num_rows: int) -> np.ndarray:
    """`(N,)` what a wrong row adds to a score of `N` rows by its place, the surest first.

    To AUGRC `(N - i + 1/2) / N^2`, the share of coverages that hold it; to AURC and what follows it the sum of `1 / j`
    from its place on, over `N`.
    """
    i = np.arange(1, num_rows + 1)
    if key == "augrc":
        return (num_rows - i + 0.5) / num_rows**2
    return np.cumsum(1.0 / i[::-1])[::-1] / num_rows


def one_more(draws: np.ndarray, key: str, num_rows: int, seed: int) -> np.ndarray:
    """Resampled areas with one wrong row more, somewhere in the ranking, of exponential weight.

    A resample has a Poisson number of errors, of mean `e` and variance `e`. With the weight of one more it has those
    of the gamma distribution whose quantile is the exact upper limit of a count (Garwood, 1936).
    """
    generator = np.random.default_rng([seed, 4])
    weight = generator.exponential(size=len(draws))
    return draws + weight * generator.choice(places(key, num_rows), size=len(draws))
