# SPDX-License-Identifier: Apache-2.0
"""Temperature scaling, solved where it is convex."""

from __future__ import annotations

import warnings

import numpy as np
from torch import nn

from peft_calib.calibration.recalibrate.base import LogitScaling
from peft_calib.calibration.recalibrate.head import final_linear

# Temperatures outside this range mean that the data do not determine one.
BOUNDS = (1e-2, 1e3)


class TemperatureScaling(LogitScaling):
    """`softmax(z / T)` with the `T` of least negative log-likelihood (Guo et al., 2017).

    In the inverse temperature `b = 1 / T` the problem is convex in one variable, with derivative `mean(E_p[z] - z_y)`,
    so a bracketed Newton iteration that falls back on bisection finds the minimum: it cannot diverge, and `T` cannot
    be negative.

    Attributes:
        temperature: `T`, after `fit`; above 1 the model was over-confident.

    Example:
        >>> logits = np.array([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
        >>> scaling = TemperatureScaling().fit(logits, [0, 0, 1, 1])
        >>> round(scaling.temperature, 3)  # accuracy 0.75 = sigmoid(4 / T)
        3.641
    """

    parameter_names = ("temperature",)
    temperature: float

    def _fit(self, logits: np.ndarray, labels: np.ndarray) -> None:
        self.temperature = fit_temperature(logits, labels)

    def _transform_logits(self, logits: np.ndarray) -> np.ndarray:
        return logits / self.temperature

    def fold_into_head(self, model: nn.Module) -> nn.Linear:
        """Divides the last linear layer of a sequence-classification model by `T`, in place, exactly.

        Afterwards the model itself gives calibrated logits wherever it is served.

        Args:
            model: a model with a linear classification head (`classifier`, `score`, ...), plain or adapted by PEFT.

        Returns:
            The layer that was changed.

        Raises:
            ValueError: if the method is not fitted, or no such layer with the right number of outputs is found.
        """
        self._check_fitted()
        assert self.num_classes is not None
        layer = final_linear(model, self.num_classes)
        layer.weight.data.div_(self.temperature)
        if layer.bias is not None:
            layer.bias.data.div_(self.temperature)
        return layer


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature of least NLL, within [0.01, 1000].

    Args:
        logits: `(N, C)` float64, finite.
        labels: `(N,)` int64.

    Returns:
        The temperature. At a bound (separable or hopeless data), or 1 for logits without information, with a warning.
    """
    columns = np.ascontiguousarray((logits - logits.max(axis=1, keepdims=True)).T)
    spread = float(-columns.min())
    if spread == 0.0:
        _warn("every row's logits are all equal, so no temperature changes anything; T = 1 is kept")
        return 1.0
    of_label = float(columns[labels, np.arange(len(labels))].mean())
    low, high = 1.0 / BOUNDS[1], 1.0 / BOUNDS[0]
    if of_label == 0.0 or _slope(columns, of_label, high)[0] <= 0.0:
        _warn(
            "every label has (nearly) the largest logit, so the likelihood grows without end as T falls; T is held at "
            "0.01"
        )
        return BOUNDS[0]
    if _slope(columns, of_label, low)[0] > 0.0:
        _warn("the labels do not follow the logits, so the best T is unbounded; T is held at 1000")
        return BOUNDS[1]
    return 1.0 / _bracketed_newton(columns, of_label, low, high)


def _bracketed_newton(columns: np.ndarray, of_label: float, low: float, high: float) -> float:
    beta = min(max(1.0, low), high)
    for _ in range(100):
        slope, curvature = _slope(columns, of_label, beta)
        low, high = (beta, high) if slope < 0.0 else (low, beta)
        step = beta - slope / curvature if curvature > 0.0 else -1.0
        # Bisection is geometric: inverse temperatures are a scale.
        following = step if low < step < high else float(np.sqrt(low * high))
        if abs(following - beta) <= 1e-9 * beta:
            return following
        beta = following
    return beta


def _slope(columns: np.ndarray, of_label: float, beta: float) -> tuple[float, float]:
    """First and second derivative of the mean NLL in the inverse temperature."""
    weights = np.exp(columns * beta)
    norm = weights.sum(axis=0)
    first = np.einsum("kn,kn->n", weights, columns) / norm
    weights *= columns
    second = np.einsum("kn,kn->n", weights, columns) / norm
    return float(first.mean()) - of_label, float((second - first**2).mean())


def _warn(reason: str) -> None:
    warnings.warn(f"Temperature scaling: {reason}.", UserWarning, stacklevel=5)
