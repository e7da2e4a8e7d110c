"""A callback that keeps what the frozen lower layers answer, so that later epochs begin above them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..console import own_random_state
from ..prediction.sources import shared_root
from ..tuners.laws import holders_of
from ..tuners.trunk_cache import CACHES, CannotCacheError, TrunkCache, rows_of

logger = logging.getLogger(__name__)

#: Rows of the batch that what is kept is held against.
_CHECKED = 8


class TrunkCacheCallback(TrainerCallback):
    """Computes the states below the first layer that trains once for each training row, before the first step.

    For adapters whose layers begin above frozen ones: an `EnsembleLoraConfig`, or any law with `layers_to_transform`.
    Every step then begins at the first layer that trains. Losses are those without the cache to rounding, and a
    resumed run ends with the bits of an uninterrupted one. Each process computes all rows.

    It switches itself off where it cannot be right: no frozen layers below, inputs beside tokens, streaming data, rows
    that a collator changes at random, a trunk whose states depend on padding or on chance (dropout below an adapter
    that has one function a row), states that do not fit. `reason` then says why, and the training goes on without.

    Args:
        max_bytes: Memory that the states may take, in bytes.
        dtype: Type in which they are kept; the base model's when `None`. `torch.bfloat16` halves them, and rounds.
        folder: Where a file keeps them if they take more; it is removed at the end.

    Attributes:
        reason: Why nothing is kept; `None` while it is.

    Example:
        >>> callback = TrunkCacheCallback(max_bytes=2**30)
        >>> # Trainer(model, args, train_dataset=..., callbacks=[callback])
    """

    def __init__(
        self, max_bytes: int = 2**31, dtype: torch.dtype | None = None, folder: str | Path | None = None
    ) -> None:
        if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 0:
            raise ValueError(f"max_bytes must be a number of bytes, not negative, got {max_bytes!r}.")
        self.max_bytes, self.dtype = max_bytes, dtype
        self.folder = None if folder is None else Path(folder)
        self.reason: str | None = "the training has not begun"

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        root = shared_root(kwargs["model"])
        self.reason = None
        try:
            if not holders_of(root):
                raise CannotCacheError("the model carries no adapter of peft_calib")
            loader = kwargs["train_dataloader"]
            dataset, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
            if not hasattr(dataset, "__len__") or collate is None:
                raise CannotCacheError("the training rows are a stream")
            with own_random_state():  # collators and rows may draw
                CACHES[root] = self._cache(root, dataset, collate)
        except CannotCacheError as error:
            self.reason = str(error)
            logger.info("The states below the first trained layer are not kept: %s.", error)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        CACHES.pop(shared_root(kwargs["model"]), None)

    def _cache(self, root: nn.Module, dataset: Any, collate: Callable[[list], Any]) -> TrunkCache:
        # a batch of each row alone, so that it has no padding but what the collator always adds
        batches = [[row for row, _ in rows_of(dict(collate([dataset[i]])))] for i in range(len(dataset))]
        cache = TrunkCache(root, chain(*batches), self.dtype, self.max_bytes, self.folder)
        # the shortest and the longest, so that there is padding in the batch if there ever is
        numbers = sorted(range(len(batches)), key=lambda i: max(map(len, batches[i]), default=0))
        some = collate([dataset[i] for i in dict.fromkeys([*numbers[: _CHECKED // 2], *numbers[-_CHECKED // 2 :]])])
        cache.check(root, send_to_device(dict(some), next(root.parameters()).device, non_blocking=True))
        return cache
