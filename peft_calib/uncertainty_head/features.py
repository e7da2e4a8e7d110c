"""What a frozen model hands its classification head, row by row: all that an uncertainty head is fitted on."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Features, logits and labels of the items of some rows, from one pass of the frozen model.

    An item is what is predicted: a row, a token that has a label, the answer to a prompt. The first axis counts
    functions: 1 for a deterministic prediction, K for draws or members, whose probabilities are averaged.

    Attributes:
        features: `(K, N, D)` float32, the input of the classification head at the position it reads.
        logits: `(K, N, C)` float32, what that head answered.
        labels: `(N,)` int64, or None where rows are unlabelled.
        hashes: `(N,)` uint64, one hash for each item's row and label (`calibration.fingerprint`), against fits and
            reports on the same rows.
        options: `(N, C)` bool, the answers an item can have, or None if every item can have all.
        items: `(N, 2)` int64, row and token of each item of a token classification, or None for one item a row.
        adapter: Digest of the adapter (`peft_calib.identity`), or None for a model without one.
    """

    features: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor | None = None
    hashes: np.ndarray | None = None
    options: torch.Tensor | None = None
    items: torch.Tensor | None = None
    adapter: str | None = None

    def __len__(self) -> int:
        return self.logits.shape[1]

    @property
    def num_classes(self) -> int:
        """How many classes the logits are over."""
        return self.logits.shape[-1]

    @property
    def probabilities(self) -> torch.Tensor:
        """`(N, C)` float64, averaged over the functions; an option an item does not have gets 0."""
        logits = self.logits.double()
        if self.options is not None:
            logits = logits.masked_fill(~self.options, -torch.inf)
        return logits.softmax(-1).mean(0)

    @property
    def predicted(self) -> torch.Tensor:
        """`(N,)` int64, the class predicted for each item."""
        return self.probabilities.argmax(-1)

    @property
    def errors(self) -> torch.Tensor:
        """`(N,)` bool, where the prediction is not the label."""
        if self.labels is None:
            raise ValueError(
                "These features have no labels, so that errors are unknown. Extract them of labelled rows."
            )
        return self.predicted != self.labels

    def select(self, index: torch.Tensor) -> FeatureSet:
        """The items at `index`, `(M,)` int64 or `(N,)` bool."""
        index = index.nonzero().flatten() if index.dtype == torch.bool else index

        def picked(name: str, value: Any) -> Any:
            if value is None or name == "adapter":
                return value
            if isinstance(value, np.ndarray):
                return value[index.numpy()]
            return value[:, index] if name in ("features", "logits") else value[index]

        return replace(self, **{field.name: picked(field.name, getattr(self, field.name)) for field in fields(self)})
