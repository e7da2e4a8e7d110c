"""Vector and matrix scaling: a regularised multinomial logistic regression on logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ...json_files import Fields
from .base import LogitScaling
from .temperature import fit_temperature


class _AffineScaling(LogitScaling):
    """`softmax(W z + b)`, with `W` held near `1 / T` times the identity and `b` near zero."""

    parameter_names = ("weight", "bias", "regularization")
    weight: np.ndarray
    bias: np.ndarray

    def __init__(self, regularization: float = 1e-3) -> None:
        super().__init__()
        if not regularization > 0.0:
            raise ValueError(
                f"`regularization` must be positive, got {regularization!r}: without it separable data diverge."
            )
        self.regularization = float(regularization)

    def _read_parameter(self, parameters: Fields, name: str) -> Any:
        if name == "regularization":
            return parameters.number(name, above=0)
        return parameters.array(name, (self.num_classes,) if name == "bias" else (self.num_classes, self.num_classes))

    def _transform_logits(self, logits: np.ndarray) -> np.ndarray:
        return logits @ self.weight.T + self.bias

    def _fit_affine(self, logits: np.ndarray, labels: np.ndarray, mask: torch.Tensor) -> None:
        """Minimises the mean NLL plus `regularization` times the squared distance from temperature scaling.

        Logits enter in units of their own spread, so that the strength means the same for every model.
        """
        scale = float(logits.std()) or 1.0
        z, y = torch.from_numpy(logits / scale), torch.from_numpy(labels)
        start = torch.eye(z.shape[1], dtype=torch.float64) * scale / fit_temperature(logits, labels)
        weight = (start * mask).requires_grad_()
        bias = torch.zeros(z.shape[1], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=300, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            held = weight * mask
            loss = torch.nn.functional.cross_entropy(z @ held.T + bias, y)
            loss = loss + self.regularization * (((held - start) ** 2).sum() + (bias**2).sum())
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        self.weight = (weight * mask).detach().numpy() / scale
        # Softmax does not see a constant; centring makes the bias unique.
        self.bias = (bias - bias.mean()).detach().numpy()


class VectorScaling(_AffineScaling):
    """`softmax(w * z + b)`, a scale and a bias a class (Guo et al., 2017), regularised towards temperature scaling.

    Args:
        regularization: Strength of the pull towards temperature scaling, in nats a unit of squared distance.

    Raises:
        ValueError: If it is not positive.
    """

    def _read_parameter(self, parameters: Fields, name: str) -> Any:
        value = super()._read_parameter(parameters, name)
        if name == "weight" and np.count_nonzero(value - np.diag(np.diagonal(value))):
            raise parameters.wrong(name, "zero outside its diagonal")
        return value

    def _fit(self, logits: np.ndarray, labels: np.ndarray) -> None:
        self._fit_affine(logits, labels, torch.eye(logits.shape[1], dtype=torch.float64))


class MatrixScaling(_AffineScaling):
    """`softmax(W z + b)` with a full matrix (Guo et al., 2017), regularised as Kull et al. (2019) advise.

    Args:
        regularization: Strength of the pull towards temperature scaling, in nats a unit of squared distance.

    Raises:
        ValueError: If it is not positive.
    """

    def _fit(self, logits: np.ndarray, labels: np.ndarray) -> None:
        self._fit_affine(logits, labels, torch.ones(2 * logits.shape[1:], dtype=torch.float64))
