"""Features at the input of a head, beside the logits it answers with, from the forward that predicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..prediction.draws import evaluating
from ..prediction.heads import Head, Items, NextTokenHead, TokenHead
from ..prediction.result import NotFiniteError
from ..tuners.asked import only_here
from .copied import CopiedHead, copied
from .located import Located

#: How far the logits of the copied head may lie from the model's, as a share of the largest logit (at least of 1), by
#: the dtype that the model's head computes in: about 10 times what was seen to come of rounding.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
#: The same for a head with quantised weights, whose inputs are rounded, too.
QUANTISED = 4e-2


@dataclass(frozen=True)
class Read:
    """What was read of one batch: features (K, N, D), logits (K, N, C), where and what its items are, and the cost."""

    features: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor | None
    positions: torch.Tensor | None
    rows: int
    num_forwards: float = 1.0


class FeatureReader:
    """Reads features and logits of one batch after the other; set up once.

    Args:
        located: The model and its head.
        check: Hold every batch against a copy of the head, which has to answer like the model.

    Raises:
        ValueError: For a head that cannot be copied (with `check`).
    """

    def __init__(self, located: Located, check: bool = True) -> None:
        self.located, self.predictor = located, located.predictor
        self.capture = _Capture(self.predictor.head, located)
        self.of_tokens = isinstance(self.predictor.head, TokenHead)
        self.copy: CopiedHead | None = copied(located) if check else None
        self.predictor.head = self.capture

    def __call__(self, batch: Mapping[str, Any]) -> Read:
        """Read one batch.

        Raises:
            ValueError: If the model answers with NaN or infinity, its head is not used as heads are, or the copied
                head does not reproduce its logits.
        """
        predictor = self.predictor
        with torch.no_grad(), evaluating(predictor.source.model):
            items = predictor.prepare(batch)
            values, cost = predictor.answers(items)
        finite = values.isfinite().all(-1)
        if not finite.all():
            raise NotFiniteError(~finite)
        width = self.capture.width
        features, logits = values[..., :width].contiguous(), values[..., width:].contiguous()
        self._check(features, logits)
        positions = items.positions.cpu() if self.of_tokens and items.positions is not None else None
        labels = None if items.labels is None else items.labels.cpu()
        return Read(features, logits, labels, positions, items.rows, cost)

    @torch.no_grad()
    def _check(self, features: torch.Tensor, logits: torch.Tensor) -> None:
        """The identity that all that follows rests on."""
        if self.copy is None or not logits.numel():
            return
        again = self.copy(features)
        name, root = self.located.name, type(self.predictor.source.root).__name__
        if again.shape != logits.shape:
            raise ValueError(
                f"The module {name!r} of {root} answers with {again.shape[-1]} numbers an item, the model with "
                f"{logits.shape[-1]} logits: it is not the classification head. Name that with head_module=."
            )
        gap, scale = float((again - logits).abs().max()), max(1.0, float(logits.abs().max()))
        tolerance = max(TOLERANCES.get(dtype, QUANTISED) for dtype in self.capture.dtypes) * scale
        if gap > tolerance:
            raise ValueError(
                f"A copy of the head {name!r} does not reproduce the logits of {root}: they differ by {gap:.2g}, and "
                f"rounding explains {tolerance:.2g}. Likely causes: the model changes the logits after its head (a "
                "scale, a soft cap); the head reads another token than the first or the last one; it is computed in a "
                "quantised form or under autocast; another adapter or dropout acts on it; or head_module= names "
                "another module. No uncertainty head can be fitted on such features."
            )


class _Capture(Head):
    """The head of a prediction, with what the model's head was given: values are features and logits side by side."""

    def __init__(self, inner: Head, located: Located) -> None:
        self.inner, self.module, self.name = inner, located.module, located.name
        self.width = 0
        self.dtypes = {parameter.dtype for parameter in located.module.parameters()}
        self._calls: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def values(self, logits: torch.Tensor) -> torch.Tensor:
        """As they are, without a softmax."""
        return logits

    def asked(self, inputs: dict[str, Any], labels: torch.Tensor | None, rows: int) -> Items:
        return self.inner.asked(inputs, labels, rows)

    def share_of_positions(self, items: Items) -> float:
        return self.inner.share_of_positions(items)

    @contextmanager
    def reading(self, root: nn.Module, items: Items) -> Iterator[None]:
        """Note what the head is given and answers, in this call chain only."""
        calls = self._calls[id(items)] = []

        def note(_: nn.Module, args: tuple, output: Any) -> None:
            calls.append((args[0] if args else None, output))

        with self.inner.reading(root, items), only_here() as here:
            handle = self.module.register_forward_hook(here(note))
            try:
                yield
            finally:
                handle.remove()
                del self._calls[id(items)]

    def read(self, logits: torch.Tensor, items: Items, count: int) -> torch.Tensor:
        """(count, N, D + C)."""
        values = self.inner.read(logits, items, count)
        calls = self._calls[id(items)]
        if len(calls) != 1 or not all(isinstance(part, torch.Tensor) for part in calls[0]):
            raise ValueError(
                f"The module {self.name!r} was called {len(calls)} times in one forward; a classification head is "
                "called once, with one tensor. Name the module that answers with logits: head_module='...'."
            )
        inputs, outputs = calls[0]
        self.dtypes |= {inputs.dtype, outputs.dtype}
        features = self._at_items(inputs, outputs, logits, items, count)
        if features.shape[:2] != values.shape[:2]:
            raise ValueError(
                f"The head {self.name!r} was given {tuple(inputs.shape)} for {items.rows} rows, which is not one "
                "input an item (as in a model for multiple choice, which is asked once for every choice)."
            )
        self.width = features.shape[-1]
        return torch.cat([features.float().to(values.device), values.float()], dim=-1)

    def _at_items(
        self, inputs: torch.Tensor, outputs: torch.Tensor, logits: torch.Tensor, items: Items, count: int
    ) -> torch.Tensor:
        """What the head was given at the position that it, or the model after it, reads: (count, N, D)."""
        if inputs.dim() == 2 and not isinstance(self.inner, TokenHead):
            return inputs.unflatten(0, (count, -1))
        if inputs.dim() != 3:
            raise ValueError(
                f"The head {self.name!r} was given a tensor of shape {tuple(inputs.shape)}; known are one vector a "
                "row and one vector a token."
            )
        if isinstance(self.inner, TokenHead):
            row, position = items.positions.to(inputs.device).unbind(1)
            return inputs.unflatten(0, (count, -1))[:, row, position]
        if isinstance(self.inner, NextTokenHead):
            return inputs[:, 0].unflatten(0, (count, -1))
        at = inputs[:, 0] if outputs.dim() == 2 else self._where_answered(inputs, outputs, logits)
        return at.unflatten(0, (count, -1))

    def _where_answered(self, inputs: torch.Tensor, outputs: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The input at the token whose answer became the model's: whatever its rule about padding, that is it."""
        if not logits.isfinite().all():
            return inputs[:, -1]  # told apart, and refused, where all answers are looked at
        same = (outputs.to(logits.dtype) == logits.to(outputs.device).unsqueeze(1)).all(-1)
        if not same.any(dim=1).all():
            raise ValueError(
                f"The head {self.name!r} answers for every token, and the model's logits are the answer for none of "
                "them (does it average over tokens, or change the logits afterwards?). Name the module that answers "
                "with the model's logits: head_module='...'."
            )
        last = same.shape[1] - 1 - same.flip(1).int().argmax(dim=1)
        return inputs[torch.arange(len(inputs), device=inputs.device), last]
