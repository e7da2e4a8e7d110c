"""The states of all tokens at one layer, beside the features of their items, for a probe that attends to them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from ...prediction.engine import choose_source
from ...tuners.asked import only_here
from ...tuners.late import blocks_of
from ...tuners.rows import main_input_name
from ..features import FeatureSet, extract_features


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
    model: nn.Module, rows: Any, *, layer: int = -1, dtype: torch.dtype = torch.float16, **options: Any
) -> SequenceFeatures:
    """Extract features as `extract_features` does, and in the same pass the states of all tokens at one layer.

    What is kept is one state a token that is not padding, of one layer: `2 D` bytes a token in float16. The states of
    other layers are never held, and those of the batch under way only.

    Args:
        model: A transformer with a list of blocks.
        rows: As for `extract_features`.
        layer: Index into the blocks; -1 is the last.
        dtype: What the states are kept in.
        **options: Of `extract_features`; one function and one item a row.

    Returns:
        The features with the states.

    Raises:
        ValueError: If the model has no such layer, or there are several functions, or items within a row.
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
            features = extract_features(model, rows, **options)
        finally:
            for handle in handles:
                handle.remove()
    lengths = torch.cat(kept.lengths)
    if len(lengths) != len(features) or len(features.logits) > 1 or features.items is not None:
        raise ValueError(
            f"{len(lengths)} rows were read for {len(features)} items of {len(features.logits)} functions. States are "
            "kept of one function and one item a row: leave out num_samples and adapter_names."
        )
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
