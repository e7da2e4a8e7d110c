"""Densities of features: a robust one over kernel components, and a Gaussian for each class."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.linalg import LinAlgError, cholesky, solve_triangular
from scipy.special import logsumexp

from .distances import CovarianceBaseline, DistanceBaseline, class_means
from .estimators import Covariance, fitted_covariance, kernel_components, robust_covariance


class RobustDensity(DistanceBaseline):
    """RDE: squared robust distance in the leading components of a kernel (Yoo et al., 2022).

    Kernel PCA with `exp(-|x - y|^2 / D)`, then the centre and covariance of least determinant, of all classes
    together, as Zabolotnyi et al. (2025) and lm-polygraph do; the original takes one a class. Items much further from
    all others than the kernel is wide are all alike, since the kernel is 0 there. Its matrix is `N x N`: 20,000
    training items are 3.2 GB.

    Args:
        num_components: Of the kernel; no more are kept than the training items have.
        seed: Of the rows that the robust covariance starts from.
        normalise: As for `DistanceBaseline`.
        transform: As for `DistanceBaseline`.

    Example:
        >>> import torch
        >>> from peft_calib.uncertainty_head import FeatureSet
        >>> phi = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 60, 2)) / 4)
        >>> phi[0, 0] = 2.0  # a stray
        >>> items = FeatureSet(phi, torch.zeros(1, 60, 2))
        >>> RobustDensity(num_components=6).fit(items).score(items).argmax()
        np.int64(0)
    """

    name = "robust_density"
    needs_labels = False

    def __init__(self, *, num_components: int = 256, seed: int = 42, **options: Any) -> None:
        super().__init__(**options)
        if num_components < 1:
            raise ValueError(f"num_components must be at least 1, got {num_components}.")
        self.num_components, self.seed = num_components, seed

    def _fit_one(self, phi: np.ndarray, labels: np.ndarray) -> Any:
        kernel, components = kernel_components(phi, min(self.num_components, len(phi) - 1), self.seed)
        return kernel, robust_covariance(components, self.seed)

    def _score_one(self, fit: Any, phi: np.ndarray) -> np.ndarray:
        kernel, robust = fit
        return robust.mahalanobis(kernel.transform(phi))


class DeepDeterministic(CovarianceBaseline):
    """DDU: minus the log-density of features, one Gaussian a class (Mukhoti et al., 2023).

    `-log sum_c pi_c N(phi; mu_c, S_c)`, with the share `pi_c` of a class, its mean and its own covariance. The paper
    takes features of a network trained with spectral normalisation; `transform=SpectralDense.of(head)` normalises a
    head's dense layer afterwards.

    Args:
        covariance: Of a class. `"ledoit_wolf"` is positive definite at any number of items; `"empirical"`, the formula
            to the letter, needs more items of each class than dimensions.
        normalise: As for `DistanceBaseline`.
        transform: As for `DistanceBaseline`.

    Example:
        >>> import torch
        >>> from peft_calib.uncertainty_head import FeatureSet
        >>> phi = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 60, 2)))
        >>> items = FeatureSet(phi, torch.zeros(1, 60, 2), labels=torch.arange(60) % 2)
        >>> far = FeatureSet(phi + 9, torch.zeros(1, 60, 2))
        >>> density = DeepDeterministic().fit(items)
        >>> bool(density.score(far).min() > density.score(items).max())
        True
    """

    name = "ddu"

    def __init__(self, *, covariance: Covariance = "ledoit_wolf", **options: Any) -> None:
        super().__init__(covariance=covariance, **options)

    def _fit_one(self, phi: np.ndarray, labels: np.ndarray) -> Any:
        means = class_means(phi, labels)
        within = np.concatenate([phi[labels == c] - mean for c, mean in means.items()])
        fits = []
        for c, mean in means.items():
            own = phi[labels == c] - mean
            # one item has no spread: its class takes that within all of them
            rows = own if len(own) > 1 else within
            covariance = fitted_covariance(rows, self.covariance, centred=True).covariance_
            fits.append((np.log(len(own) / len(phi)), mean, self._factor(covariance, c, len(own))))
        return fits

    def _factor(self, covariance: np.ndarray, c: int, count: int) -> np.ndarray:
        try:
            return cholesky(covariance, lower=True)
        except LinAlgError as error:
            raise ValueError(
                f"The {self.covariance} covariance of class {c} ({count} items, {len(covariance)} dimensions) has no "
                "density, since it is singular. Take covariance='ledoit_wolf', or more items of the class."
            ) from error

    def _score_one(self, fit: Any, phi: np.ndarray) -> np.ndarray:
        parts = []
        for log_share, mean, factor in fit:
            distance = np.square(solve_triangular(factor, (phi - mean).T, lower=True)).sum(axis=0)
            log_volume = 2.0 * np.log(np.diag(factor)).sum() + len(factor) * np.log(2.0 * np.pi)
            parts.append(log_share - 0.5 * (distance + log_volume))
        return -logsumexp(parts, axis=0)
