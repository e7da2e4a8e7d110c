"""The uncertainty head: how likely each prediction of a frozen classifier is to be wrong."""

from __future__ import annotations

from typing import Any

import torch

from .answer import ErrorPrediction
from .copied import CopiedHead
from .features import FeatureSet
from .fitting import Fitted, check_rows, check_shapes, fit_rows
from .grid import HeadSettings
from .mapping import probability_of_error, with_prior
from .report import HeadReport
from .training import Scorer, anchors_of


class UncertaintyHead:
    """A second copy of a classification head, trained to say how likely the first one is wrong (AdUE, ALIEN).

    The model, its adapter and its predictions stay as they are. The copy starts at the frozen head; its score U of a
    prediction (see `scores.uncertainty`) is trained towards the errors, kept near the frozen model's own score, and
    mapped to P(error) on items that it was not fitted on. Where no trial ranks held-out errors better than the frozen
    model's own score, or there are too few errors, that score stays; `report` says why.

    Args:
        settings: How it is fitted.
        fitted: What fitting gave.
        head: The copy, at its start.

    Attributes:
        report: What was fitted, on what, and what it is worth; print it.
    """

    def __init__(self, settings: HeadSettings, fitted: Fitted, head: CopiedHead) -> None:
        self.settings, self.fitted, self.head = settings, fitted, head

    @property
    def report(self) -> HeadReport:
        """What was fitted, on what, and what it is worth."""
        return self.fitted.report

    @classmethod
    def fit_features(
        cls,
        train: FeatureSet | None,
        validation: FeatureSet,
        head: CopiedHead,
        *,
        score: str | None = None,
        paper: str | None = None,
        calibration: FeatureSet | None = None,
        **options: Any,
    ) -> UncertaintyHead:
        """Fit a head to features that were extracted before.

        Args:
            train: Of training rows; needed for `split="train"` only.
            validation: Of rows that the adapter was not trained on.
            head: The copied head that the features are the input of.
            score: `"entropy"` (default), `"sr_norm"` or `"sr_raw"`.
            paper: `"v1"` or `"v2"`, the settings of AdUE or ALIEN, see `HeadSettings.of`.
            calibration: Of further rows, on which P(error) is mapped and the head is judged; the validation rows
                where None.
            options: Fields of `HeadSettings`, such as `split`, `lr`, `balance` or `seed`.

        Returns:
            The head; print its `report`.

        Raises:
            ValueError: For labels or shapes that cannot be, the same rows in two of the sets, or an unknown option.
        """
        settings = HeadSettings.of(score, paper, **options)
        check_rows(head, training=train, validation=validation, calibration=calibration)
        return cls(settings, fit_rows(head, train, validation, settings, calibration), head)

    def predict_features(self, features: FeatureSet) -> ErrorPrediction:
        """How likely the predictions of features are wrong.

        Args:
            features: Extracted as those that were fitted to; labels are not needed.

        Returns:
            P(error) and the scores it was made of.
        """
        check_shapes("given", features, self.head)
        base = anchors_of(features, self.settings)
        score = base
        if self.fitted.deltas is not None:
            scorer = Scorer(self.head, features, self.settings)
            score = scorer.all([delta[None] for delta in self.fitted.deltas], torch.float64)[0]
        corrected = with_prior(score.numpy(), self.fitted.prior)
        found = probability_of_error(self.fitted.calibration, corrected)
        return ErrorPrediction(
            torch.from_numpy(found), torch.from_numpy(corrected), base, features.probabilities, features.items
        )
