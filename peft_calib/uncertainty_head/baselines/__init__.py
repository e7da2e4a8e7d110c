"""What an uncertainty head must beat: softmax scores, distances, densities, probes, and scores of several functions.

All have one interface, `fit(train_features, validation_features)` and `score(features)`, and a name for `baseline`.
"""

from .base import BASELINES, Baseline, baseline
from .density import DeepDeterministic, RobustDensity
from .distances import Mahalanobis, MarginalMahalanobis, RelativeMahalanobis
from .probes import AttentionProbe, LinearProbe, ProbeTraining
from .sampled import Bald, EnsembleVariance, PredictiveEntropy, SampledResponse, ensemble_of
from .sequences import SequenceFeatures, token_states
from .softmax import Entropy, Margin, SoftmaxResponse, TemperatureScaled
from .spectral import SpectralDense

__all__ = [
    "BASELINES",
    "AttentionProbe",
    "Bald",
    "Baseline",
    "DeepDeterministic",
    "EnsembleVariance",
    "Entropy",
    "LinearProbe",
    "Mahalanobis",
    "Margin",
    "MarginalMahalanobis",
    "PredictiveEntropy",
    "ProbeTraining",
    "RelativeMahalanobis",
    "RobustDensity",
    "SampledResponse",
    "SequenceFeatures",
    "SoftmaxResponse",
    "SpectralDense",
    "TemperatureScaled",
    "baseline",
    "ensemble_of",
    "token_states",
]
