"""Other class shares than in training: the correction of probabilities, and the shares of unlabelled rows.

Both rest on *label shift*: `p(x | y)` is as in training and only `p(y)` differs. Then Bayes' rule with other class
shares is a factor a class (Saerens, Latinne & Decaestecker, 2002).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from scipy.special import ndtri

from ...json_files import Fields
from ..fingerprint import SplitFingerprint
from ..inputs import as_float64, as_logits, as_numpy, check_confidence_level, softmax
from ..resampling.bands import wilson_ends
from ..resampling.intervals import bootstrap_counts, check_num_resamples
from .base import LogitScaling
from .fitted import MEND, check_seal

#: Class shares may miss 1 by this, as rounded ones do.
SUM_TOLERANCE = 1e-3
#: Fewer unlabelled rows are refused.
FEWEST_ROWS = 10
#: Curvature of the likelihood, of 1 for a classifier that knows every class, below which the rows tell nothing.
LEAST_CURVATURE = 1e-6
# Numbers of resampled rows held at a time.
ENTRIES = 1 << 21
STEPS = 2000


class PriorCorrection(LogitScaling):
    """`q_k ~ p_k new_k / train_k`: probabilities under other class shares than the model was trained with.

    Exact where the model's probabilities are calibrated for the training shares and only the shares differ (label
    shift). Where the classes themselves look different, or the model is over-confident, it can do harm: fit a
    temperature first, and hold the result against some labelled rows. It is computed in logarithms; there is nothing
    to fit, so no rows are refused in `evaluate`.

    Args:
        train_prior: `(C,)` class shares of the rows the model was trained on, all positive.
        new_prior: `(C,)` class shares where it is used, known or `estimate_prior(...).prior`; 0 rules a class out.

    Raises:
        ValueError: If they are no shares, or not of the same classes.

    Example:
        >>> correction = PriorCorrection([0.5, 0.5], [0.9, 0.1])
        >>> correction.transform([[0.6, 0.4]], input="probabilities").round(4)  # 0.54 against 0.04
        array([[0.931, 0.069]])
    """

    parameter_names = ("train_prior", "new_prior")

    def __init__(self, train_prior: Any, new_prior: Any) -> None:
        super().__init__()
        self.train_prior = checked_prior(train_prior, "train_prior", positive=True)
        self.new_prior = checked_prior(new_prior, "new_prior")
        if len(self.train_prior) != len(self.new_prior):
            raise ValueError(
                f"`train_prior` has {len(self.train_prior)} classes and `new_prior` {len(self.new_prior)}; they must "
                "be the same classes in the same order."
            )
        self.num_classes = len(self.train_prior)
        self.fitted_on = SplitFingerprint.of_hashes(np.empty(0, np.uint64))

    def fit(self, logits: Any, labels: Any, **options: Any) -> NoReturn:  # type: ignore[override]
        """Always refused: shares are given, or estimated without labels by `estimate_prior`."""
        raise ValueError(
            "PriorCorrection has nothing to fit: give it `new_prior`, the class shares where the model is used. "
            "`estimate_prior(probabilities, train_prior)` estimates them on unlabelled rows; of labelled rows they "
            "are the label frequencies."
        )

    def _fit(self, logits: np.ndarray, labels: np.ndarray) -> None:
        self.fit(logits, labels)

    @property
    def log_factors(self) -> np.ndarray:
        """`(C,)` what is added to log-probabilities (or logits); -inf for a class of share 0."""
        with np.errstate(divide="ignore"):
            return np.log(self.new_prior) - np.log(self.train_prior)

    def _transform_logits(self, logits: np.ndarray) -> np.ndarray:
        return logits + self.log_factors

    def _probabilities(self, logits: np.ndarray) -> np.ndarray:
        moved = self._transform_logits(logits)
        left = np.isfinite(moved.max(axis=1))
        if not left.all():
            raise ValueError(
                f"Row {int(np.flatnonzero(~left)[0])} allows only classes whose new share is 0, so it cannot be "
                "corrected. Give every class that may occur a share above 0 in `new_prior`."
            )
        return softmax(moved)

    def _said(self) -> dict[str, Any]:
        said = super()._said()
        del said["fitted_on"]  # nothing was
        return said

    @classmethod
    def from_state(cls, state: Mapping[str, Any] | Fields) -> PriorCorrection:
        """The inverse of `state`.

        Raises:
            ValueError: If it is not such a state, a value cannot be, or was changed by hand.
        """
        fields = cls._checked_fields(state)
        parameters, size = fields.mapping("parameters"), fields.integer("num_classes", least=2)
        try:
            found = cls(*(parameters.array(name, (size,)) for name in cls.parameter_names))
        except ValueError as error:
            told = str(error)
            raise error if fields.source in told else ValueError(f"{fields.source}: {told} {MEND}.") from error
        check_seal(fields)
        return found


@dataclass(frozen=True, eq=False)
class PriorEstimate:
    """Class shares of unlabelled rows.

    Attributes:
        prior: `(C,)` shares of greatest likelihood.
        low, high: `(C,)` ends of their intervals, each by itself; what other rows from the same shares would change.
        train_prior: `(C,)` shares in training that they were estimated with.
        num_rows: Unlabelled rows.
        confidence_level: Of the intervals.
    """

    prior: np.ndarray
    low: np.ndarray
    high: np.ndarray
    train_prior: np.ndarray
    num_rows: int
    confidence_level: float

    def correction(self) -> PriorCorrection:
        """The correction of probabilities to these shares."""
        return PriorCorrection(self.train_prior, self.prior)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in vars(self).items()}

    def __str__(self) -> str:
        shares = "; ".join(
            f"class {k} {share:.4f} [{low:.4f}, {high:.4f}], in training {before:.4f}"
            for k, (share, low, high, before) in enumerate(
                zip(self.prior, self.low, self.high, self.train_prior, strict=True)
            )
        )
        return (
            f"Class shares of {self.num_rows:,} unlabelled rows ({self.confidence_level:.0%} intervals): {shares}. "
            "This assumes that only the shares have changed, not what the classes look like, and probabilities that "
            "are calibrated for the training shares; the intervals know nothing of either."
        )


def estimate_prior(
    probabilities: Any,
    train_prior: Any,
    *,
    input: str = "probabilities",
    confidence_level: float = 0.95,
    num_resamples: int | None = None,
    seed: int = 0,
) -> PriorEstimate:
    """Estimates the class shares of unlabelled rows by maximum likelihood (Saerens et al., 2002).

    The EM algorithm's step is `pi_k <- mean_i q_ik` with `q_ik ~ p_ik pi_k / train_k`; the likelihood is concave, so
    its limit does not depend on where it starts. Steps are extrapolated (Varadhan & Roland, 2008).

    It assumes label shift, that only the shares differ from training, and probabilities that are calibrated for the
    training shares: an over-confident model gives wrong shares, with intervals that do not say so. Calibrate first, on
    held-out rows of the training distribution (Alexandari, Kundaje & Shrikumar, 2020).

    Args:
        probabilities: `(N, C)` or `(N,)` predictions of unlabelled rows, as for `calibration_report`.
        train_prior: `(C,)` class shares of the training rows, all positive.
        input: `"probabilities"` or `"logits"`.
        confidence_level: Of the intervals.
        num_resamples: Bootstrap resamples; by default 1,000, fewer above 10^4 rows.
        seed: Of the private generator.

    Returns:
        The estimate; `.correction()` applies it.

    Raises:
        ValueError: For bad input, fewer than 10 rows, or predictions that do not tell the classes apart.

    Example:
        >>> estimate = estimate_prior([[0.9, 0.1]] * 70 + [[0.1, 0.9]] * 30, [0.5, 0.5])
        >>> estimate.prior.round(4)  # 0.9 pi + 0.1 (1 - pi) = 0.7
        array([0.75, 0.25])
    """
    level, prior = check_confidence_level(confidence_level), checked_prior(train_prior, "train_prior", positive=True)
    logits = as_logits(probabilities, input=input)
    p = softmax(logits.reshape(-1, logits.shape[-1]))
    if p.shape[1] != len(prior):
        raise ValueError(f"The predictions have {p.shape[1]} classes, but `train_prior` has {len(prior)}.")
    if len(p) < FEWEST_ROWS:
        raise ValueError(
            f"Class shares need at least {FEWEST_ROWS} unlabelled rows, got {len(p)}; the share of a class is as "
            "uncertain as a frequency among so many."
        )
    resamples = int(np.clip(10**7 // len(p), 200, 1000)) if num_resamples is None else num_resamples
    check_num_resamples(resamples)
    ratio = p / prior
    ratio /= ratio.max(axis=1, keepdims=True)
    best = _most_likely(ratio, np.ones((1, len(p))), prior[None])[0]
    _refuse_flat(ratio, best)
    draws = _resampled(ratio, best, resamples, seed)
    low, high = _interval(best, draws, len(p), 0.5 * (1.0 - level))
    return PriorEstimate(best, low, high, prior, len(p), level)


def checked_prior(prior: Any, name: str, *, positive: bool = False) -> np.ndarray:
    """`(C,)` float64 class shares that sum to 1 exactly, or a ValueError."""
    given = as_numpy(prior, name)
    values, _ = as_float64(given, prior, name)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all() or (values < 0.0).any():
        raise ValueError(
            f"`{name}` must be one share for each of two classes or more, none negative, got {given.tolist()!r}."
        )
    if abs(values.sum() - 1.0) > SUM_TOLERANCE:
        raise ValueError(
            f"`{name}` must sum to 1, got {values.sum():.6g}. If these are counts, divide them by their sum."
        )
    if positive and not values.all():
        raise ValueError(
            f"`{name}` has a share of 0 for class {int(np.argmin(values))}: of a class that was not in training the "
            "model knows nothing. Leave the class out."
        )
    return values / values.sum()


def _step(ratio: np.ndarray, counts: np.ndarray, prior: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`(R, C)` one step of EM from `(R, C)` shares, and `(R,)` the mean log-likelihood where it began."""
    mixed = prior @ ratio.T
    total = counts.sum(axis=1, keepdims=True)
    value = np.einsum("rn,rn->r", counts, np.log(mixed)) / total[:, 0]
    moved = prior * ((counts / mixed) @ ratio) / total
    return moved / moved.sum(axis=1, keepdims=True), value


def _most_likely(ratio: np.ndarray, counts: np.ndarray, start: np.ndarray, tolerance: float = 1e-10) -> np.ndarray:
    """`(R, C)` shares of greatest likelihood of rows that count `(R, N)` times, by EM with extrapolated steps."""
    prior = np.repeat(start, len(counts), axis=0) if len(start) < len(counts) else start.copy()
    open_ = np.arange(len(prior))
    for _ in range(STEPS):
        held, weight = prior[open_], counts[open_]
        first, _ = _step(ratio, weight, held)
        second, _ = _step(ratio, weight, first)
        change, bend = first - held, second - 2.0 * first + held
        size = np.linalg.norm(change, axis=1)
        length = np.clip(size / np.maximum(np.linalg.norm(bend, axis=1), 1e-300), 1.0, 1e4)[:, None]
        far = held + 2.0 * length * change + length**2 * bend
        # never to 0 or below, from where no step returns
        far = np.maximum(far, 0.1 * second)
        far /= far.sum(axis=1, keepdims=True)
        third, of_far = _step(ratio, weight, far)
        fourth, of_second = _step(ratio, weight, second)
        better = (of_far >= of_second)[:, None]
        prior[open_] = np.where(better, third, fourth)
        left = (np.abs(change).max(axis=1) > tolerance) | (np.abs(prior[open_] - held).max(axis=1) > 100 * tolerance)
        open_ = open_[left]
        if not len(open_):
            break
    return prior


def _refuse_flat(ratio: np.ndarray, prior: np.ndarray) -> None:
    """Refuses rows of which other shares are as likely: the likelihood has a direction without curvature."""
    scaled = ratio / (ratio @ prior)[:, None]
    # a class at share 0 that the likelihood would have below 0 is known to be absent
    scaled = scaled[:, (prior > 1e-6) | (scaled.mean(axis=0) > 1.0 - 1e-6)]
    size = scaled.shape[1]
    if size < 2:
        return
    changes = np.linalg.svd(np.ones((1, size)))[2][1:]  # that keep the sum
    least = float(np.linalg.eigvalsh(changes @ (scaled.T @ scaled / len(scaled)) @ changes.T)[0])
    if least < LEAST_CURVATURE:
        raise ValueError(
            "These predictions do not tell all classes apart: other class shares are just as likely, so none can be "
            "estimated (constant rows, or a class whose probability follows from the others'). Join such classes, or "
            "use a better model."
        )


def _resampled(ratio: np.ndarray, best: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """`(R, C)` shares of greatest likelihood of resampled rows."""
    counts = bootstrap_counts(np.random.default_rng([seed, 6]), len(ratio), num_resamples)
    size = max(1, ENTRIES // len(ratio))
    # from a little inside: a share of exactly 0 would stay there
    start = (0.99 * best + 0.01 / len(best))[None]
    parts = range(0, num_resamples, size)
    found = [_most_likely(ratio, counts[:, i : i + size].T.astype(np.float64), start, 1e-7) for i in parts]
    return np.concatenate(found)


def _interval(best: np.ndarray, draws: np.ndarray, num_rows: int, tail: float) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's form with as many trials as the resampled variance is worth, and the resamples' quantiles if wider."""
    variance, mean = draws.var(axis=0), draws.mean(axis=0)
    # by the resamples' mean: a share that is 0 by chance varies, and 0 would be worth no trial
    trials = np.divide(mean * (1.0 - mean), variance, out=np.full(len(best), float(num_rows)), where=variance > 1e-15)
    low, high = wilson_ends(best, np.clip(trials, 1.0, num_rows), float(ndtri(1.0 - tail)))
    quantiles = np.quantile(draws, [tail, 1.0 - tail], axis=0)
    low, high = np.minimum(low, quantiles[0]), np.maximum(high, quantiles[1])
    # steps towards a share of 0 become ever shorter: less than a hundredth of a row is none
    low = np.where(low < 0.01 / num_rows, 0.0, low)
    return np.clip(low, 0.0, best), np.clip(high, best, 1.0)
