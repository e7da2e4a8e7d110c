"""Scores of several functions that answer the same items: dropout passes, draws of a posterior, an ensemble."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ...calibration.scores.uncertainty import draw_uncertainty
from ..features import FeatureSet
from .base import Baseline
from .softmax import softmax_response


class SampledBaseline(Baseline):
    """A score of `(K, N, C)` probabilities of K functions, two or more.

    Which source the functions have is the feature set's business: `extract_features` has draws of a posterior, passes
    with `dropout=` (Gal & Ghahramani, 2016) or the `adapter_names=` of one model; `ensemble_of` puts models of their
    own together (Lakshminarayanan et al., 2017).
    """

    def _check(self, part: FeatureSet) -> None:
        super()._check(part)
        if len(part.logits) < 2:
            raise ValueError(
                f"{type(self).__name__} compares functions, and these features are of one. Extract them with "
                "num_samples= (and dropout= for a stock LoRA), or put those of several models together with "
                "ensemble_of."
            )

    def _score(self, features: FeatureSet) -> np.ndarray:
        return self._of(sample_probabilities(features))

    @abstractmethod
    def _of(self, probabilities: np.ndarray) -> np.ndarray:
        """`(N,)` scores of `(K, N, C)` probabilities."""


class SampledResponse(SampledBaseline):
    """`1 - max_c pbar_c` of the mean probabilities."""

    name = "sampled_response"
    is_probability = is_share = True

    def _of(self, probabilities: np.ndarray) -> np.ndarray:
        return softmax_response(probabilities.mean(axis=0))


class PredictiveEntropy(SampledBaseline):
    """`H(pbar)`, total uncertainty, nats."""

    name = "predictive_entropy"

    def _of(self, probabilities: np.ndarray) -> np.ndarray:
        return draw_uncertainty(probabilities).entropy


class Bald(SampledBaseline):
    """`H(pbar) - mean_m H(p_m)`, what the functions disagree about, nats (Houlsby et al., 2011)."""

    name = "bald"

    def _of(self, probabilities: np.ndarray) -> np.ndarray:
        return draw_uncertainty(probabilities).mutual_information


class EnsembleVariance(SampledBaseline):
    """`sum_c mean_m (p_mc - pbar_c)^2`.

    Example:
        >>> logits = torch.tensor([[[30.0, 0.0]], [[0.0, 30.0]]])
        >>> items = FeatureSet(torch.zeros(2, 1, 3), logits)
        >>> EnsembleVariance().fit(items).score(items).round(6)
        array([0.5])
    """

    name = "ensemble_variance"

    def _of(self, probabilities: np.ndarray) -> np.ndarray:
        return probabilities.var(axis=0).sum(axis=1)


def sample_probabilities(features: FeatureSet) -> np.ndarray:
    """`(K, N, C)` float64 probabilities of each function; an option an item does not have gets 0."""
    logits = features.logits.double()
    if features.options is not None:
        logits = logits.masked_fill(~features.options, -torch.inf)
    return logits.softmax(-1).numpy()


def ensemble_of(members: Sequence[FeatureSet]) -> FeatureSet:
    """One feature set whose functions are those of several, on the same items: a deep ensemble.

    Args:
        members: Feature sets of the adapters, items in the same order.

    Returns:
        All their functions, in order; of no single adapter.

    Raises:
        ValueError: If there are none, or they differ in their items, labels, options, dimensions or classes.

    Example:
        >>> one = FeatureSet(torch.zeros(1, 5, 3), torch.zeros(1, 5, 2))
        >>> ensemble_of([one, one]).logits.shape
        torch.Size([2, 5, 2])
    """
    if not members:
        raise ValueError("ensemble_of needs the features of at least one adapter.")
    first = members[0]
    for number, other in enumerate(members[1:], start=1):
        for name in ("labels", "options", "items"):
            mine, theirs = getattr(first, name), getattr(other, name)
            if (mine is None) != (theirs is None) or (mine is not None and not torch.equal(mine, theirs)):
                raise ValueError(f"Feature sets 0 and {number} differ in their {name}; extract them of the same rows.")
        shapes = [(part.features.shape[1:], part.logits.shape[1:]) for part in (first, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"Feature sets 0 and {number} have different shapes, {shapes[0]} and {shapes[1]}.")
    return replace(
        first,
        features=torch.cat([part.features for part in members]),
        logits=torch.cat([part.logits for part in members]),
        adapter=first.adapter if len(members) == 1 else None,
    )
