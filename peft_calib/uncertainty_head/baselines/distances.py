"""Distances of an item's features from those of the training items, in float64 and with true labels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from ..features import FeatureSet
from .base import Baseline, function_features, true_labels
from .estimators import Covariance, check_covariance, fitted_covariance

Transform = Callable[[np.ndarray], np.ndarray]


class DistanceBaseline(Baseline):
    """A distance in feature space; that of several functions is the mean of their distances, each in its own space.

    Args:
        normalise: Divide every feature vector by its length, as the tables of Zabolotnyi et al. (2025) do.
        transform: Applied to `(N, D)` features before anything else, such as `SpectralDense`.
    """

    needs_labels = True

    def __init__(self, *, normalise: bool = False, transform: Transform | None = None) -> None:
        self.normalise, self.transform = normalise, transform

    def _fit(self, train: FeatureSet, validation: FeatureSet | None) -> None:
        if len(train) < 2:
            raise ValueError(f"{type(self).__name__} needs at least two items to have a covariance, got {len(train)}.")
        labels = true_labels(train) if self.needs_labels else np.zeros(len(train), dtype=np.int64)
        self._fits = [self._fit_one(self._prepared(phi), labels) for phi in function_features(train)]

    def _score(self, features: FeatureSet) -> np.ndarray:
        parts = zip(self._fits, function_features(features), strict=True)
        return np.mean([self._score_one(fit, self._prepared(phi)) for fit, phi in parts], axis=0)

    def _prepared(self, phi: np.ndarray) -> np.ndarray:
        phi = phi if self.transform is None else np.asarray(self.transform(phi), dtype=np.float64)
        if not self.normalise:
            return phi
        lengths = np.linalg.norm(phi, axis=1, keepdims=True)
        return phi / np.where(lengths == 0.0, 1.0, lengths)

    @abstractmethod
    def _fit_one(self, phi: np.ndarray, labels: np.ndarray) -> Any:
        """What is known of the training items of one function."""

    @abstractmethod
    def _score_one(self, fit: Any, phi: np.ndarray) -> np.ndarray:
        """`(N,)` distances of one function."""


class CovarianceBaseline(DistanceBaseline):
    """A distance in the widths of a covariance, which may be shrunk."""

    def __init__(self, *, covariance: Covariance = "empirical", **options: Any) -> None:
        super().__init__(**options)
        check_covariance(covariance)
        self.covariance: Covariance = covariance


class Mahalanobis(CovarianceBaseline):
    """Squared distance to the nearest class mean, `min_c (phi - mu_c)' S^-1 (phi - mu_c)` (Lee et al., 2018).

    `S` is the covariance within classes, one for all: `S = (1/N) sum_c sum_{i in c} (phi_i - mu_c)(phi_i - mu_c)'`.

    Args:
        covariance: `"empirical"` is the formula; with fewer items than dimensions it is singular, and its
            pseudo-inverse does not see what the training items have no spread in. `"ledoit_wolf"` and `"oas"` shrink.
        normalise: As for `DistanceBaseline`.
        transform: As for `DistanceBaseline`.

    Example:
        >>> import torch
        >>> phi = torch.tensor([[[0.0, 1.0], [0.0, -1.0], [9.0, 1.0], [9.0, -1.0], [1.0, 0.0], [-1.0, 0.0]]])
        >>> items = FeatureSet(phi, torch.zeros(1, 6, 2), labels=torch.tensor([0, 0, 1, 1, 0, 0]))
        >>> Mahalanobis().fit(items).score(items).round(3)  # S = diag(1/3, 2/3)
        array([1.5, 1.5, 1.5, 1.5, 3. , 3. ])
    """

    name = "mahalanobis"

    def _fit_one(self, phi: np.ndarray, labels: np.ndarray) -> Any:
        means = class_means(phi, labels)
        within = np.concatenate([phi[labels == c] - mean for c, mean in means.items()])
        return list(means.values()), fitted_covariance(within, self.covariance, centred=True)

    def _score_one(self, fit: Any, phi: np.ndarray) -> np.ndarray:
        means, covariance = fit
        return np.min([covariance.mahalanobis(phi - mean) for mean in means], axis=0)


class MarginalMahalanobis(Mahalanobis):
    """Squared distance to the mean of all items, `(phi - mu)' S_0^-1 (phi - mu)`, classes aside."""

    name = "mahalanobis_marginal"
    needs_labels = False

    def _fit_one(self, phi: np.ndarray, labels: np.ndarray) -> Any:
        return fitted_covariance(phi, self.covariance)

    def _score_one(self, fit: Any, phi: np.ndarray) -> np.ndarray:
        return fit.mahalanobis(phi)


class RelativeMahalanobis(Mahalanobis):
    """`min_c (MD_c - MD_0)`, the nearest class's squared distance above the marginal one (Ren et al., 2021)."""

    name = "relative_mahalanobis"

    def _fit_one(self, phi: np.ndarray, labels: np.ndarray) -> Any:
        return super()._fit_one(phi, labels), fitted_covariance(phi, self.covariance)

    def _score_one(self, fit: Any, phi: np.ndarray) -> np.ndarray:
        nearest, marginal = fit
        return super()._score_one(nearest, phi) - marginal.mahalanobis(phi)


def class_means(phi: np.ndarray, labels: np.ndarray) -> dict[int, np.ndarray]:
    """The mean of `(N, D)` features of each class that occurs."""
    return {int(c): phi[labels == c].mean(axis=0) for c in np.unique(labels)}
