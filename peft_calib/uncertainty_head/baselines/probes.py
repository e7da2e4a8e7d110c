"""Probes: a linear function of hidden states, trained from scratch to tell errors from correct predictions."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ...calibration.scores.selective import error_auroc, rank
from ...tuners.seeding import keyed_generator, uniform
from ..features import FeatureSet
from .base import Baseline
from .sequences import SequenceFeatures

_INIT, _ORDER = 11, 12  # purposes of a probe's random numbers, part of their key


@dataclass(frozen=True)
class ProbeTraining:
    """How a probe is trained; the defaults are those of the study's code.

    Attributes:
        learning_rates: Of Adam; with validation items the one of greatest error AUROC there is kept.
        epochs: At most.
        patience: Epochs without a better validation AUROC after which a training stops.
        batch_size: Items of a step.
    """

    learning_rates: Sequence[float] = (3e-5,)
    epochs: int = 200
    patience: int = 15
    batch_size: int = 64


class ProbeBaseline(Baseline):
    """A probe on the items of one function after another; several functions' probabilities are averaged.

    Args:
        training: How it is trained.
        seed: Of its start and of the order of the items.
    """

    is_probability = is_share = True
    needs_labels = True

    def __init__(self, training: ProbeTraining | None = None, seed: int = 0) -> None:
        self.training = ProbeTraining() if training is None else training
        self.seed = seed

    def _fit(self, train: FeatureSet, validation: FeatureSet | None) -> None:
        wrong = train.errors
        if not bool(wrong.any()) or bool(wrong.all()):
            raise ValueError(
                f"A probe learns from errors and correct predictions, and {int(wrong.sum())} of these {len(train)} "
                "items are errors. Fit it on items that the adapter has not been trained on."
            )
        self.probes = [self._fit_one(train, validation, k) for k in range(len(train.logits))]

    def _score(self, features: FeatureSet) -> np.ndarray:
        parts = [_probabilities(probe, self._inputs(features, k)) for k, probe in enumerate(self.probes)]
        return np.mean(parts, axis=0)

    def _fit_one(self, train: FeatureSet, validation: FeatureSet | None, function: int) -> nn.Module:
        inputs, wrong = self._inputs(train, function), train.errors.float()
        held_out = None if validation is None else (self._inputs(validation, function), validation.errors.numpy())
        trained = []
        for number, rate in enumerate(self.training.learning_rates):
            probe = self._start(inputs, keyed_generator(self.seed, _INIT, function))
            order = keyed_generator(self.seed, _ORDER, function, number)
            trained.append((_train(probe, inputs, wrong, held_out, rate, self.training, order), -number, probe))
        return max(trained, key=lambda found: found[:2])[2]

    @abstractmethod
    def _inputs(self, features: FeatureSet, function: int) -> Inputs:
        """What the probe of one function reads."""

    @abstractmethod
    def _start(self, inputs: Inputs, generator: torch.Generator) -> nn.Module:
        """A probe before its training."""


@dataclass(frozen=True)
class Inputs:
    """States of items, `(M, D)`, and the `(N,)` ends of each item's among them; None for one state an item."""

    states: torch.Tensor
    ends: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.states if self.ends is None else self.ends)

    def batch(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(B, D)` states, or `(B, T, D)` with a `(B, T)` mask of what is no padding."""
        if self.ends is None:
            return self.states[index], None
        starts = torch.cat([self.ends.new_zeros(1), self.ends[:-1]])[index]
        lengths = self.ends[index] - starts
        steps = torch.arange(int(lengths.max()))
        mask = steps < lengths[:, None]
        where = (starts[:, None] + steps).where(mask, starts[:, None])
        return self.states[where].float(), mask


class LinearProbe(ProbeBaseline):
    """`sigmoid(w . h + b)` of the head's input `h`, trained with binary cross-entropy.

    Example:
        >>> h = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 200, 2))).float()
        >>> wrong = (h[0, :, 0] > 0).long()  # the prediction is always 0
        >>> items = FeatureSet(h, torch.tensor([1.0, 0.0]).expand(1, 200, 2), labels=wrong)
        >>> probe = LinearProbe(ProbeTraining(learning_rates=(0.01,))).fit(items)
        >>> error_auroc(rank(probe.score(items), wrong)) > 0.99
        True
    """

    name = "linear_probe"

    def _inputs(self, features: FeatureSet, function: int) -> Inputs:
        return Inputs(features.features[function].float())

    def _start(self, inputs: Inputs, generator: torch.Generator) -> nn.Module:
        return _Probe(inputs.states.shape[-1], generator, attends=False)


class AttentionProbe(ProbeBaseline):
    """`sigmoid(w . sum_t a_t h_t + b)`, `a = softmax_t(q . h_t)`, over the tokens of an item.

    Fitted on and asked about `SequenceFeatures`, which `token_states` captures of one layer and one function.
    """

    name = "attention_probe"

    def _check(self, part: FeatureSet) -> None:
        if not isinstance(part, SequenceFeatures):
            raise ValueError(
                "An attention probe reads the states of the tokens, and these features are of the head's input alone. "
                "Extract them with token_states(model, rows)."
            )
        super()._check(part)

    def _inputs(self, features: FeatureSet, function: int) -> Inputs:
        self._check(features)
        assert isinstance(features, SequenceFeatures) and features.tokens is not None
        return Inputs(features.tokens, features.ends)

    def _start(self, inputs: Inputs, generator: torch.Generator) -> nn.Module:
        return _Probe(inputs.states.shape[-1], generator, attends=True)


class _Probe(nn.Module):
    """A logit of pooled states, started like a linear layer of torch."""

    def __init__(self, size: int, generator: torch.Generator, attends: bool) -> None:
        super().__init__()
        bound = 1 / math.sqrt(size)
        self.weight = nn.Parameter(uniform((size,), bound, generator))
        self.bias = nn.Parameter(uniform((), bound, generator))
        self.query = nn.Parameter(uniform((size,), bound, generator)) if attends else None

    def forward(self, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if self.query is not None:
            assert mask is not None
            attention = (states @ self.query).masked_fill(~mask, -torch.inf).softmax(-1)
            states = torch.einsum("bt,btd->bd", attention, states)
        return states @ self.weight + self.bias


def _train(
    probe: nn.Module,
    inputs: Inputs,
    wrong: torch.Tensor,
    held_out: tuple[Inputs, np.ndarray] | None,
    rate: float,
    how: ProbeTraining,
    generator: torch.Generator,
) -> float:
    """Train a probe in place and keep its best epoch; the greatest validation AUROC, or minus the training loss."""
    optimiser = torch.optim.Adam(probe.parameters(), lr=rate)
    best, kept, since, loss = -math.inf, copy.deepcopy(probe.state_dict()), 0, math.inf
    for _ in range(how.epochs):
        loss = _epoch(probe, optimiser, inputs, wrong, how.batch_size, generator)
        if held_out is None:
            continue
        found = error_auroc(rank(_probabilities(probe, held_out[0]), held_out[1]))
        if found > best:
            best, kept, since = found, copy.deepcopy(probe.state_dict()), 0
        else:
            since += 1
        if since >= how.patience:
            break
    if math.isfinite(best):  # else there is no held-out error to choose by, and the last epoch stays
        probe.load_state_dict(kept)
        return best
    return -loss


def _epoch(
    probe: nn.Module,
    optimiser: torch.optim.Optimizer,
    inputs: Inputs,
    wrong: torch.Tensor,
    batch_size: int,
    generator: torch.Generator,
) -> float:
    total = 0.0
    with torch.enable_grad():
        for index in torch.randperm(len(inputs), generator=generator).split(batch_size):
            loss = nn.functional.binary_cross_entropy_with_logits(probe(*inputs.batch(index)), wrong[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += float(loss.detach()) * len(index)
    return total / len(inputs)


def _probabilities(probe: nn.Module, inputs: Inputs) -> np.ndarray:
    """`(N,)` float64."""
    with torch.no_grad():
        parts = [probe(*inputs.batch(index)) for index in torch.arange(len(inputs)).split(256)]
    return torch.cat(parts).double().sigmoid().numpy()
