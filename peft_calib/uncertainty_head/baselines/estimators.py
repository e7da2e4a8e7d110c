"""Covariances, kernel components and robust centres, all of them scikit-learn's."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    from sklearn.covariance import EmpiricalCovariance, MinCovDet
    from sklearn.decomposition import KernelPCA

Covariance = Literal["empirical", "ledoit_wolf", "oas"]
#: Shares of the rows that a robust covariance is taken from, in the order they are tried; None is scikit-learn's own.
SUPPORTS = (None, 0.9, 1.0)


def check_covariance(kind: Any) -> None:
    """Raises ValueError unless `kind` names a covariance."""
    if kind not in get_args(Covariance):
        raise ValueError(f"covariance must be one of {get_args(Covariance)}, got {kind!r}.")


def fitted_covariance(rows: np.ndarray, kind: Covariance, *, centred: bool = False) -> EmpiricalCovariance:
    """The covariance of `(N, D)` rows; where it is singular, its precision is the pseudo-inverse."""
    covariance = sklearn_module("covariance")
    estimators = {"empirical": "EmpiricalCovariance", "ledoit_wolf": "LedoitWolf", "oas": "OAS"}
    return getattr(covariance, estimators[kind])(assume_centered=centred).fit(rows)


def kernel_components(rows: np.ndarray, num_components: int, seed: int) -> tuple[KernelPCA, np.ndarray]:
    """Kernel PCA of `(N, D)` rows with the kernel `exp(-|x - y|^2 / D)`, and the rows in its components."""
    decomposition = sklearn_module("decomposition")
    kernel = decomposition.KernelPCA(num_components, kernel="rbf", random_state=seed)
    return kernel, kernel.fit_transform(rows)


def robust_covariance(rows: np.ndarray, seed: int) -> MinCovDet:
    """Least covariance determinant of `(N, D)` rows, of more of them where it cannot be had of fewer."""
    covariance = sklearn_module("covariance")
    failures = []
    for share in SUPPORTS:
        try:
            found = covariance.MinCovDet(support_fraction=share, random_state=seed).fit(rows)
        except ValueError as error:
            failures.append(f"{share}: {error}")
            continue
        if np.isfinite(found.precision_).all():
            return found
        failures.append(f"{share}: not finite")
    raise ValueError(
        f"No robust covariance of {rows.shape[1]} components can be had of {len(rows)} rows ({'; '.join(failures)}). "
        "Take fewer components or more rows."
    )


def sklearn_module(name: str) -> Any:
    """A module of scikit-learn; an ImportError says how to get it."""
    try:
        return importlib.import_module(f"sklearn.{name}")
    except ModuleNotFoundError as error:
        raise ImportError(
            "Distances and densities take their covariances from scikit-learn, which is not installed: "
            "pip install scikit-learn"
        ) from error
