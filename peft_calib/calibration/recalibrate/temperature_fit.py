"""The temperature of least NLL, how sure the rows are of it, and whether they support one at all.

In the inverse temperature `b = 1 / T` the mean NLL `L(b) = mean(log sum_k exp(b z_k) - b z_y)` is convex in one
variable, with derivative `mean(E_b[z] - z_y)` and curvature `mean(Var_b[z])`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtrit

from ...json_files import check_fields
from ..answers import without_masks
from ..inputs import LogitRows, effective_rows

# Temperatures outside this range mean that the data do not determine one.
BOUNDS = (1e-2, 1e3)
# Fewer labelled rows are refused. One number is fitted, whatever the number of classes, so the bound does not grow
# with them: from 10 rows on the interval covers what it promises, for 2 classes and for 20
# (`benchmarks/temperature_interval.py`). It then holds 1 for seven of eight models of two classes whose T is 2; below,
# for nearly all, and what is left is noise.
FEWEST_ROWS = 10
LEVEL = 0.95
# Entries of a block whose exponentials are at hand at a time.
BLOCK = 1 << 20


@dataclass(frozen=True)
class TemperatureFit:
    """What a calibration split says about a temperature.

    Attributes:
        fitted: `T` of least NLL, within `BOUNDS`.
        low, high: Its 95 % interval; an end at a bound means that the rows set none on that side.
        num_rows: Labelled rows it was fitted on.
        applied: Whether it is used; if not, `T = 1` is, which changes nothing.
        at_bound: `"low"` or `"high"` where the fit ran into `BOUNDS`, else None.
        reason: One sentence with all this, for a person.
    """

    fitted: float
    low: float
    high: float
    num_rows: int
    applied: bool
    at_bound: str | None
    reason: str

    @property
    def temperature(self) -> float:
        """The temperature to use: the fitted one, or 1 where it is left off."""
        return self.fitted if self.applied else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Any, temperature: float, source: str = "") -> TemperatureFit:
        """The inverse of `to_dict`, held against the temperature that it belongs to; `source` is what it stands in.

        Raises:
            ValueError: If a field is missing, of a wrong type or out of range, or the fit is another temperature's.
        """
        what = f"{source}The fit of a saved temperature"
        names = sorted(field.name for field in fields(cls))
        if not isinstance(state, dict) or sorted(state) != names:
            raise ValueError(f"{what} must hold {names}, got {state!r}.")
        fit = cls(**state)
        check_fields(fit, cls, what)
        if (
            fit.at_bound not in (None, "low", "high")
            or not BOUNDS[0] <= fit.low <= fit.fitted * (1 + 1e-9)
            or not fit.fitted * (1 - 1e-9) <= fit.high <= BOUNDS[1] * (1 + 1e-9)
        ):
            raise ValueError(f"{what} is no interval around it within {BOUNDS}: {state!r}.")
        if fit.temperature != temperature:
            raise ValueError(
                f"{source}The saved temperature is {temperature!r}, but its fit says {fit.temperature!r}: one "
                "was changed."
            )
        return fit


def check_enough_rows(num_rows: int) -> None:
    """Raises ValueError for fewer rows than a temperature is fitted on."""
    if num_rows < FEWEST_ROWS:
        raise ValueError(
            f"A temperature needs at least {FEWEST_ROWS} labelled held-out rows, for any number of classes, and there "
            f"are {num_rows}: on fewer its interval nearly always holds 1, and what is fitted is noise. Hold out more "
            "rows, or use the model as it is."
        )


def temperature_fit(rows: LogitRows) -> TemperatureFit:
    """Fits a temperature, its interval, and decides whether the rows support it.

    The interval holds every `b` with `2 N (L(b) - L(b_min)) <= t^2 max(1, K / H)`: likelihood ratio, with Student's
    quantile for few rows, widened where the derivatives of the rows' losses scatter more (`K`) than the model says
    (`H`), as they do when no temperature is quite right (Kent, 1982). Those of one sequence's tokens are added up
    before their scatter `K` is taken. With weights `L` is the weighted mean, `K` that of the weighted derivatives, and
    a row is one observation whatever its weight: Student's quantile is that of `(sum w)^2 / sum w^2` rows.

    The temperature is left off where the interval holds 1, and where every row is right, so that the likelihood grows
    without end as `T` falls: such rows say that the model is too careful, not by how much.
    """
    likelihood = Likelihood(rows)
    num_rows = len(rows.labels)
    if likelihood.is_flat:
        why = "every row's logits are all equal, so no temperature changes anything; T = 1 is kept"
        return TemperatureFit(1.0, *BOUNDS, num_rows, False, None, _sentence(why))
    best, at_bound = _best_inverse(likelihood)
    low, high = _interval(likelihood, best)
    fitted = _inverted(best)
    # at a bound the end and the fit are one number, which logarithms miss by a rounding
    ends = (min(fitted, _inverted(high)), max(fitted, _inverted(low)))
    return judged(fitted, ends, num_rows, at_bound)


def judged(fitted: float, ends: tuple[float, float], num_rows: int, at_bound: str | None = None) -> TemperatureFit:
    """The rule: a temperature is applied where its interval leaves out 1 and the rows set it both ends."""
    interval = f"its {LEVEL:.0%} interval [{ends[0]:.4g}, {ends[1]:.4g}]"
    if ends[0] <= 1.0 <= ends[1]:
        applied, judgement = False, f"{interval} holds 1"
    elif at_bound == "low":
        applied, judgement = False, f"no row sets a lower end to {interval}"
    else:
        applied, judgement = True, f"{interval} leaves out 1"
    verb = "applied" if applied else "left off"
    why = f"T = {fitted:.4g}, fitted on {num_rows:,} rows, is {verb}: {judgement}"
    if at_bound == "low":
        why += f"; every label has (nearly) the largest logit, so the fit stopped at its lower bound {BOUNDS[0]:g}"
    elif at_bound == "high":
        why += f"; the labels do not follow the logits, so the fit stopped at its upper bound {BOUNDS[1]:g}"
    return TemperatureFit(fitted, *ends, num_rows, applied, at_bound, _sentence(why))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


class Likelihood:
    """The mean NLL as a function of the inverse temperature."""

    def __init__(self, rows: LogitRows) -> None:
        logits, labels = rows.logits, rows.labels
        top = logits.max(axis=1, keepdims=True)
        of_label = (logits[np.arange(len(labels)), labels] - top[:, 0])[:, None]
        if np.isneginf(of_label).any():
            # A label that is said to be impossible costs what a probability of 0 costs, not infinity.
            logits = np.where(np.isneginf(of_label), without_masks(logits), logits)
            of_label = (logits[np.arange(len(labels)), labels] - top[:, 0])[:, None]
        self.num_rows, self.of_label = len(labels), of_label[:, 0]
        self.weights = np.ones(len(labels)) if rows.weights is None else rows.weights
        self.total = float(self.weights.sum())
        self.sequences = rows.sequences
        size = max(1, BLOCK // logits.shape[1])
        starts = range(0, len(labels), size)
        # Classes first: sums over classes then run over rows, which are many.
        self.blocks = [np.ascontiguousarray((logits[i : i + size] - top[i : i + size]).T) for i in starts]
        self.is_flat = all((block[np.isfinite(block)] == 0.0).all() for block in self.blocks)

    def value(self, inverse: float) -> float:
        """Mean NLL."""
        total, start = 0.0, 0
        for block in self.blocks:
            weights = self.weights[start : start + block.shape[1]]
            total += float(np.log(np.exp(block * inverse).sum(axis=0)) @ weights)
            start += block.shape[1]
        return total / self.total - inverse * self.mean_of_label

    def moments(self, inverse: float) -> tuple[np.ndarray, np.ndarray]:
        """`(N,)` mean and variance of each row's logits (its largest being 0) under its own distribution."""
        means, variances = [], []
        for block in self.blocks:
            weights = np.exp(block * inverse)
            norm = weights.sum(axis=0)
            values = np.maximum(block, np.finfo(np.float64).min)  # a mask weighs 0, and 0 times infinity is no number
            means.append(np.einsum("kn,kn->n", weights, values) / norm)
            weights *= values
            variances.append(np.einsum("kn,kn->n", weights, values) / norm - means[-1] ** 2)
        return np.concatenate(means), np.maximum(np.concatenate(variances), 0.0)

    @property
    def mean_of_label(self) -> float:
        """Mean logit of the label, the largest being 0."""
        return float(self.of_label @ self.weights) / self.total

    def slope(self, inverse: float) -> float:
        """Derivative of the mean NLL."""
        return float((self.moments(inverse)[0] - self.of_label) @ self.weights) / self.total


def _best_inverse(likelihood: Likelihood) -> tuple[float, str | None]:
    low, high = 1.0 / BOUNDS[1], 1.0 / BOUNDS[0]
    if likelihood.mean_of_label == 0.0 or likelihood.slope(high) <= 0.0:
        return high, "low"
    if likelihood.slope(low) > 0.0:
        return low, "high"
    # Inverse temperatures are a scale, so the search is geometric.
    best = brentq(lambda place: likelihood.slope(float(np.exp(place))), np.log(low), np.log(high), xtol=1e-11)
    return float(np.exp(best)), None


def _interval(likelihood: Likelihood, best: float) -> tuple[float, float]:
    mean, variance = likelihood.moments(best)
    # Rows of one sequence are added up first: they lean the same way.
    _, member = np.unique(likelihood.sequences, return_inverse=True)
    weights = likelihood.weights
    scores = np.bincount(member.reshape(-1), weights=weights * (mean - likelihood.of_label))
    of_sequence = np.bincount(member.reshape(-1), weights=weights) / np.bincount(member.reshape(-1))
    size = max(effective_rows(of_sequence), 2.0)
    scatter, expected = float(scores @ scores) * size / (size - 1), float(variance @ weights)
    # what a row of weight w adds to the scatter is w^2 times its own
    modelled = float(variance @ weights**2)
    widened = max(modelled, scatter) / expected if expected > 0.0 else float(weights @ weights) / likelihood.total
    allowed = float(stdtrit(size - 1, 0.5 + 0.5 * LEVEL)) ** 2 * widened / (2.0 * likelihood.total)
    least = likelihood.value(best)

    def excess(log_inverse: float) -> float:
        return likelihood.value(float(np.exp(log_inverse))) - least - allowed

    def end(outside: float) -> float:
        """Where the convex excess leaves 0 on the way to a bound; the bound if it does not."""
        inside, outside = float(np.log(best)), float(np.log(outside))
        crosses = inside != outside and excess(outside) > 0.0
        return float(np.exp(brentq(excess, inside, outside, xtol=1e-9) if crosses else outside))

    return end(1.0 / BOUNDS[1]), end(1.0 / BOUNDS[0])


def _inverted(inverse: float) -> float:
    """A temperature inside its bounds, which 1 / 1e-3 may miss by a rounding."""
    return float(np.clip(1.0 / inverse, *BOUNDS))
