"""What every baseline of error detection has in common: fitted on features, it says which items are likely wrong."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, Self

import numpy as np
from scipy.special import expit

from ...calibration.recalibrate.base import Recalibrator
from ..features import FeatureSet
from ..mapping import fit_map, probability_of_error

#: Name to class; filled as the classes are defined.
BASELINES: dict[str, type[Baseline]] = {}


class Baseline(ABC):
    """A score of the predictions of a frozen classifier, larger where an error is likelier.

    Attributes:
        name: What `baseline` knows it by.
        is_probability: Whether the score claims to be the probability of an error.
        is_share: Whether it lies in [0, 1].
        calibration: After `calibrate`, which map gives P(error), and why.
    """

    name: ClassVar[str]
    is_probability: ClassVar[bool] = False
    is_share: ClassVar[bool] = False
    calibration: str
    _map: Recalibrator | None
    _scale: tuple[float, float]
    #: Whether a fit reads labels.
    needs_labels: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" in cls.__dict__:
            BASELINES[cls.name] = cls

    def fit(self, train: FeatureSet, validation: FeatureSet | None = None) -> Self:
        """Fit on the items of `train`.

        Args:
            train: Labelled items; what needs no labels takes unlabelled ones.
            validation: Further labelled items, for those that choose a setting or fit a temperature.

        Returns:
            Itself.

        Raises:
            ValueError: If the items are too few, have no labels where those are needed, or have labels out of range.
            ImportError: If scikit-learn is needed and not there.
        """
        for part in (train, validation):
            if part is not None:
                self._check(part)
        self._fit(train, validation)
        self._fitted_on = self._shape(train)
        return self

    def score(self, features: FeatureSet) -> np.ndarray:
        """How likely each item is predicted wrong.

        Args:
            features: Items of the same model; labels are not read.

        Returns:
            `(N,)` float64, finite, larger where an error is likelier.

        Raises:
            ValueError: If it is not fitted, or was fitted on features of another shape.
        """
        fitted = getattr(self, "_fitted_on", None)
        if fitted is None:
            raise ValueError(f"{type(self).__name__} is not fitted. Call fit(train_features) first.")
        if self._shape(features) != fitted:
            raise ValueError(
                f"{type(self).__name__} was fitted on features with (functions, dimensions, classes) = {fitted} and "
                f"is asked about {self._shape(features)}. Extract both of one model with the same number of draws."
            )
        scores = np.asarray(self._score(features), dtype=np.float64)
        if not np.isfinite(scores).all():
            raise ValueError(f"{type(self).__name__} gave scores that are not finite; look for NaN in the features.")
        return scores

    def calibrate(
        self, features: FeatureSet, method: Literal["platt", "isotonic"] = "platt", *, fewest: int = 20
    ) -> Self:
        """Fit the map of scores to P(error) that an uncertainty head has, on items that were not fitted on.

        Args:
            features: Labelled items.
            method: `"platt"`, or `"isotonic"` for steps where there are 200 errors.
            fewest: Errors, and correct items, that a slope takes.

        Returns:
            Itself; `calibration` says which map it is, and why.

        Raises:
            ValueError: If the items have no labels, or the baseline is not fitted.
        """
        scores, errors = self.score(features), features.errors.numpy()
        low, centre, high = np.quantile(scores, (0.25, 0.5, 0.75))
        self._scale = float(centre), float(high - low) or 1.0
        self._map, self.calibration = fit_map(method, self._in_unit_interval(scores), errors, fewest)
        return self

    def error_probability(self, features: FeatureSet) -> np.ndarray:
        """P(error) of items, by the map that `calibrate` fitted.

        Args:
            features: Items of the same model; labels are not read.

        Returns:
            `(N,)` float64 in [0, 1].

        Raises:
            ValueError: If there is no map yet.

        Example:
            >>> import torch
            >>> logits = torch.tensor([[2.0, 0.0]]).repeat(1, 40, 1)
            >>> items = FeatureSet(torch.zeros(1, 40, 1), logits, labels=torch.tensor([0, 0, 0, 1] * 10))
            >>> sure = baseline("softmax_response").fit(items).calibrate(items)
            >>> sure.error_probability(items)[:2].round(2)  # a quarter is wrong
            array([0.26, 0.26])
        """
        if not hasattr(self, "_map"):
            raise ValueError(f"{type(self).__name__} has no map to P(error). Call calibrate(held_out_features) first.")
        return probability_of_error(self._map, self._in_unit_interval(self.score(features)))

    def _in_unit_interval(self, scores: np.ndarray) -> np.ndarray:
        """Scores as the map takes them: log-odds of what has no upper end are quartiles from the median, damped."""
        centre, spread = self._scale
        return scores if self.is_share else expit(np.arcsinh((scores - centre) / spread))

    def _fit(self, train: FeatureSet, validation: FeatureSet | None) -> None:  # noqa: B027  (many fit nothing)
        """Fit what there is to fit; nothing by default."""

    @abstractmethod
    def _score(self, features: FeatureSet) -> np.ndarray:
        """`(N,)` scores."""

    def _check(self, part: FeatureSet) -> None:
        if len(part) == 0:
            raise ValueError(f"{type(self).__name__} was given features of no items; give it some rows.")
        if not self.needs_labels:
            return
        if part.labels is None:
            raise ValueError(
                f"{type(self).__name__} needs labels, and these features have none. Extract labelled rows."
            )
        least, most = int(part.labels.min()), int(part.labels.max())
        if least < 0 or most >= part.num_classes:
            raise ValueError(
                f"Labels must lie in 0 to {part.num_classes - 1}, one for each logit, and lie in {least} to {most}."
            )

    @staticmethod
    def _shape(part: FeatureSet) -> tuple[int, int, int]:
        return len(part.logits), part.features.shape[-1], part.num_classes


def baseline(name: str, **options: Any) -> Baseline:
    """A baseline by name.

    Args:
        name: One of `BASELINES`.
        **options: Arguments of its class.

    Returns:
        The baseline, to be fitted.

    Raises:
        ValueError: For a name that is none.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[4.0, 0.0], [0.5, 0.0]]])
        >>> items = FeatureSet(features=torch.zeros(1, 2, 3), logits=logits)
        >>> baseline("softmax_response").fit(items).score(items).round(3)
        array([0.018, 0.378])
    """
    if name not in BASELINES:
        raise ValueError(f"There is no baseline {name!r}; there are {sorted(BASELINES)}.")
    return BASELINES[name](**options)


def function_features(features: FeatureSet) -> list[np.ndarray]:
    """The features of each function, `(N, D)` float64."""
    return list(features.features.double().numpy())


def true_labels(features: FeatureSet) -> np.ndarray:
    """`(N,)` class ids."""
    assert features.labels is not None  # `Baseline._check` has seen to it
    return features.labels.numpy()
