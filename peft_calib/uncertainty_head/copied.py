"""A second copy of a classification head that can be trained while the first one goes on predicting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.func import functional_call


class CopiedHead(nn.Module):
    """The heads of K functions, each moved by one shared, trainable distance from where it was.

    Parameters are `theta_k = theta0_k + delta`, with `delta` starting at zero: at the start the copy answers what the
    frozen heads answer, and `|theta - theta0|^2` is `|delta|^2` whatever K is.

    Args:
        module: A head in evaluation mode, float32; used for its computation and never changed.
        starts: The parameters and buffers of each head, by name; functions that share a head have one entry.
    """

    def __init__(self, module: nn.Module, starts: Sequence[Mapping[str, torch.Tensor]]) -> None:
        super().__init__()
        self._module = [module]  # in a list, so that its parameters are not counted, moved or saved as ours
        self.trained = [name for name, _ in module.named_parameters()]
        self.starts = [{name: value.detach().clone() for name, value in start.items()} for start in starts]
        self.delta = nn.ParameterList(nn.Parameter(torch.zeros_like(starts[0][name])) for name in self.trained)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(K, N, D)` features to `(K, N, C)` logits; one start serves all K functions."""
        starts = self.starts * len(features) if len(self.starts) == 1 else self.starts
        return torch.stack([self._one(start, rows) for start, rows in zip(starts, features, strict=True)])

    def squared_distance(self) -> torch.Tensor:
        """`sum_k |theta_k - theta0_k|^2` over all tensors, biases included: a number, not averaged."""
        return sum((delta.square().sum() for delta in self.delta), start=torch.zeros(()))

    def _one(self, start: Mapping[str, torch.Tensor], features: torch.Tensor) -> torch.Tensor:
        moved = {name: start[name] + delta for name, delta in zip(self.trained, self.delta, strict=True)}
        return functional_call(self._module[0], {**start, **moved}, (features,))
