"""The states of all tokens at one layer, beside the features of their items, for a probe that attends to them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import nn

from ...prediction import Prediction, predict_dataset
from ...prediction.engine import choose_source
from ...tuners.asked import only_here
from ...tuners.late import blocks_of
from ...tuners.rows import main_input_name
from ..features import FeatureSet


@dataclass(frozen=True, eq=False)
class SequenceFeatures(FeatureSet):
    """Features of items with the states of their tokens, those of all items one behind another.

    Attributes:
        tokens: `(M, D)` states of the tokens that are not padding, float16 or float32.
        ends: `(N,)` int64, how many tokens there are up to each item, its own included.
    """

    tokens: torch.Tensor | None = None
    ends: torch.Tensor | None = None

    def select(self, index: torch.Tensor) -> SequenceFeatures:
        """The items at `index`, with their tokens."""
        assert self.tokens is not None and self.ends is not None
        plain = super().select(index)
        index = index.nonzero().flatten() if index.dtype == torch.bool else index
        starts = torch.cat([self.ends.new_zeros(1), self.ends[:-1]])
        picked = [torch.arange(int(starts[i]), int(self.ends[i])) for i in index]
        ends = torch.tensor([len(rows) for rows in picked], dtype=torch.int64).cumsum(0)
        rows = torch.cat(picked) if picked else torch.zeros(0, dtype=torch.int64)
        return with_tokens(plain, self.tokens[rows], ends)


def with_tokens(features: FeatureSet, tokens: torch.Tensor, ends: torch.Tensor) -> SequenceFeatures:
    """Features with the `(M, D)` states of their tokens and the `(N,)` ends of their items among them."""
    own = {field.name: getattr(features, field.name) for field in fields(FeatureSet)}
    return SequenceFeatures(**own | {"tokens": tokens, "ends": ends})


def token_states(
    model: nn.Module,
    data: Any,
    features: FeatureSet,
    *,
    layer: int = -1,
    dtype: torch.dtype = torch.float16,
    **options: Any,
) -> SequenceFeatures:
    """Capture the states of the tokens of rows at one layer, in one pass of the frozen model.

    What is kept is one state a token that is not padding, of one layer: `2 D` bytes a token in float16. No hidden
    states of other layers, and of the batch under way only, are ever held.

    Args:
        model: The model the features are of, a transformer with a list of blocks.
        data: The rows the features are of, in their order, as for `predict_dataset`.
        features: Their features, of one item a row and one function.
        layer: Index into the blocks; -1 is the last.
        dtype: What the states are kept in.
        **options: Of `predict_dataset`: `batch_size`, `processing_class`, `collate_fn`, `task`, `label_tokens`.

    Returns:
        The features with the states.

    Raises:
        ValueError: If the model has no such layer, or the rows are not those of the features.
    """
    root = choose_source(model, "mean", 0).root
    blocks = blocks_of(root)
    if not -len(blocks) <= layer < len(blocks):
        raise ValueError(f"{type(root).__name__} has {len(blocks)} blocks, so there is no layer {layer}.")
    kept = _Kept(main_input_name(root), dtype)
    with only_here() as here:
        handles = [
            root.register_forward_pre_hook(here(kept.ask), with_kwargs=True),
            blocks[layer].register_forward_hook(here(kept.keep)),
        ]
        try:
            found = predict_dataset(model, data, how="mean", progress=False, **options)
        finally:
            for handle in handles:
                handle.remove()
    assert isinstance(found, Prediction)
    if len(found) != len(features) or not np.allclose(found.probabilities, features.probabilities, atol=1e-3):
        raise ValueError(
            "These rows are not those of the features: the model predicts other probabilities for them. Pass the rows "
            "in the order in which the features were extracted, and features of one function and one item a row."
        )
    lengths = torch.cat(kept.lengths)
    return with_tokens(features, torch.cat(kept.states), lengths.cumsum(0))


class _Kept:
    """What two hooks keep of a pass: the mask of the batch under way, and the states it lets through."""

    def __init__(self, main: str, dtype: torch.dtype) -> None:
        self.main, self.dtype = main, dtype
        self.states: list[torch.Tensor] = []
        self.lengths: list[torch.Tensor] = []

    def ask(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        main = kwargs.get(self.main, args[0] if args else None)
        self.mask = torch.ones(main.shape[:2], dtype=torch.bool) if mask is None else mask.bool().cpu()

    def keep(self, module: nn.Module, args: tuple, output: Any) -> None:
        states = output if isinstance(output, torch.Tensor) else output[0]
        self.states.append(states.detach()[self.mask.to(states.device)].to("cpu", self.dtype))
        self.lengths.append(self.mask.sum(1))
