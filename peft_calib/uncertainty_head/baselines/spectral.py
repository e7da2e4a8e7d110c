"""The dense layer of a head with its weight divided by its spectral norm, as a feature for distances."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn


class SpectralDense:
    """`phi = act(W h / |W|_2 + b)` of `(N, D)` features `h`, with a head's own dense layer and activation.

    What Zabolotnyi et al. (2025) measure the distances of encoders in. The norm is exact, where they iterate.

    Args:
        weight: `(D', D)`.
        bias: `(D',)` or None.
        activation: Applied last.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, activation: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        weight = weight.detach().double()
        self.weight = weight / torch.linalg.matrix_norm(weight, 2)
        self.bias = None if bias is None else bias.detach().double()
        self.activation = activation

    def __call__(self, features: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(np.asarray(features, dtype=np.float64))
        return self.activation(nn.functional.linear(rows, self.weight, self.bias)).numpy()

    @classmethod
    def of(cls, head: nn.Module) -> SpectralDense | None:
        """Of a head with a layer `dense`; None for one that is a single linear layer.

        Args:
            head: Such as the `classifier` of a RoBERTa (tanh) or an ELECTRA (its own `activation`, GELU).

        Returns:
            The transform, or None.

        Example:
            >>> from transformers import RobertaConfig
            >>> from transformers.models.roberta.modeling_roberta import RobertaClassificationHead
            >>> head = RobertaClassificationHead(RobertaConfig(hidden_size=8, num_labels=2))
            >>> transform = SpectralDense.of(head)
            >>> round(float(torch.linalg.matrix_norm(transform.weight, 2)), 6), SpectralDense.of(nn.Linear(8, 2))
            (1.0, None)
        """
        dense = getattr(head, "dense", None)
        if not isinstance(dense, nn.Linear):
            return None
        activation = getattr(head, "activation", None)
        return cls(dense.weight, dense.bias, activation if callable(activation) else torch.tanh)
