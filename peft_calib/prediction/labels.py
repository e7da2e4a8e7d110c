"""What a prediction of several labels says: a probability for each, of which any number may hold."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import datasets
import torch

from .result import DrawnProbabilities


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class LabelsPrediction(DrawnProbabilities):
    """Probabilities of labels, of which an item may have any number: K draws and what follows. All on the CPU.

    As of classes the predictive probability of a label is the mean of the draws', never of their logits. `entropy` and
    `mutual_information` are sums over the labels, each a question of yes or no.

    Args:
        sample_probabilities: Float32 (K, N, L), a sigmoid each; NaN for draws that were not made.
        num_forwards: Cost in units of one deterministic forward of the batch.
        how: How it was made.
        seed: Key of the draws.
        antithetic: Whether they were made in mirrored pairs.
        labels: (N, L) zeros and ones, if the batch had them.

    Example:
        >>> p = LabelsPrediction(sample_probabilities=torch.tensor([[[1.0, 0.9]], [[0.0, 0.9]]]), num_forwards=2)
        >>> p.probabilities, p.predictions.tolist()
        (tensor([[0.5000, 0.9000]]), [[True, True]])
    """

    def _facts(self) -> list[str]:
        return [f"{self._samples.shape[-1]} labels"] if len(self) else []

    @property
    def probabilities(self) -> torch.Tensor:
        """Mean of the draws' probabilities, float32 (N, L)."""
        return self._predictive.float()

    @property
    def predictions(self) -> torch.Tensor:
        """Labels of a probability of 1/2 and more, bool (N, L)."""
        return self._predictive >= 0.5

    @cached_property
    def entropy(self) -> torch.Tensor:
        """Sum of the labels' entropies, nats, float64 (N,)."""
        return _entropies(self._predictive).sum(-1)

    @cached_property
    def mutual_information(self) -> torch.Tensor:
        """Sum over the labels of what the draws disagree on, nats, float64 (N,); 0 for one draw."""
        mean = self._mean(self._p)
        return (_entropies(mean) - self._mean(_entropies(self._p))).sum(-1).clamp_min(0)

    def to_dataset(self) -> datasets.Dataset:
        """One row for each item: probabilities, predictions and the entropies.

        Returns:
            A `datasets.Dataset`.
        """
        columns = self._columns() | {"probabilities": self.probabilities.tolist()}
        columns |= {"prediction": self.predictions.tolist()}
        columns |= {name: getattr(self, name).tolist() for name in ("entropy", "mutual_information")}
        return datasets.Dataset.from_dict(columns)


def _entropies(p: torch.Tensor) -> torch.Tensor:
    """Entropy of yes or no, nats, of the shape of the probabilities."""
    return torch.special.entr(p) + torch.special.entr(1 - p)
