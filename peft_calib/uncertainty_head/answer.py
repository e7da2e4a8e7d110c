"""What a head answers: how likely each prediction is to be wrong."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class ErrorPrediction:
    """How likely each prediction is to be wrong; the predictions are the frozen model's.

    Attributes:
        error_probability: `(N,)` float64, P(error), calibrated.
        uncertainty: `(N,)` float64, the score U it was made of: the head's, or the base score where that stayed.
        base_uncertainty: `(N,)` float64, the frozen model's own score.
        probabilities: `(N, C)` float64, the frozen model's, averaged over its functions.
        items: `(N, 2)` int64, row and token of each item, or None for one item a row.
    """

    error_probability: torch.Tensor
    uncertainty: torch.Tensor
    base_uncertainty: torch.Tensor
    probabilities: torch.Tensor
    items: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.error_probability)

    @property
    def confidence(self) -> torch.Tensor:
        """`(N,)`, `1 - P(error)`."""
        return 1 - self.error_probability

    @property
    def predicted(self) -> torch.Tensor:
        """`(N,)` int64, the class predicted for each item."""
        return self.probabilities.argmax(-1)
