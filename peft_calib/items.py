"""N, the number of items a training loss averages over in one epoch: counted on batches, as the loss counts them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.utils import find_labels

from .console import own_random_state
from .tuners.objective import shifts_labels

IGNORE_INDEX = -100
#: Of more rows than these, evenly spaced ones are counted.
MOST_ROWS = 20_000
BATCH = 64
ONE_LABEL = ("labels", "label", "label_ids")


def count_items(
    dataset: Any,
    collate: Callable[[list], Mapping[str, Any]] | None = None,
    model: nn.Module | None = None,
    *,
    most_rows: int = MOST_ROWS,
) -> int | None:
    """Number of items a training loss averages over in one epoch; None where it cannot be told.

    Rows where a row has one label. Where it has several, or gets its labels from the collator, rows are put into
    batches as in training, and labels other than -100 count, without the first position where the model shifts them.
    Of more than `most_rows` rows evenly spaced ones are counted and the sum is scaled up. A collator that masks at
    random counts alike in every run.
    """
    if dataset is None or not all(hasattr(dataset, name) for name in ("__len__", "__getitem__")) or not len(dataset):
        return None
    with own_random_state(0):
        first = dataset[0]
        if isinstance(first, Mapping) and {"chosen_ids", "rejected_ids"} <= set(first):
            return len(dataset)  # a pair is an item of TRL's RewardTrainer
        name = next((name for name in ONE_LABEL if isinstance(first, Mapping) and first.get(name) is not None), None)
        if name is not None and torch.as_tensor(first[name]).dim() == 0:
            return _labelled_rows(dataset, name)
        numbers = _spaced(len(dataset), most_rows)
        if collate is None:
            counts = _counts_of_rows(dataset, numbers)
        else:
            counts = _counts_of_batches(dataset, numbers, copy.deepcopy(collate), model)
        found = list(counts)
    if None in found:
        return None
    return max(1, round(sum(found) * len(dataset) / len(numbers)))


def count_batch(batch: Mapping[str, Any], model: nn.Module | None = None) -> int | None:
    """Items of one batch by the Trainer's rule for `num_items_in_batch`; None without labels."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    shifted, labels = batch.get("shift_labels"), batch.get("labels")
    if shifted is not None:
        labels = shifted
    elif labels is not None and labels.dim() > 1 and base is not None and shifts_labels(base):
        labels = labels[..., 1:]
    if labels is None and base is not None:
        labels = next((batch[name] for name in find_labels(type(base)) if batch.get(name) is not None), None)
    return None if labels is None else int((labels != IGNORE_INDEX).sum())


def _labelled_rows(dataset: Any, name: str) -> int:
    if not hasattr(dataset, "with_format") or name not in (getattr(dataset, "column_names", None) or ()):
        return len(dataset)  # reading every row of another data set may mean decoding every picture
    column = dataset.select_columns([name]).with_format("numpy")
    return max(1, sum(int((batch[name] != IGNORE_INDEX).sum()) for batch in column.iter(10_000)))


def _spaced(rows: int, most: int) -> Sequence[int]:
    return range(rows) if rows <= most else np.linspace(0, rows - 1, most).round().astype(int).tolist()


def _counts_of_rows(dataset: Any, numbers: Sequence[int]) -> Iterator[int | None]:
    for number in numbers:
        row = dataset[int(number)]
        if not isinstance(row, Mapping):
            yield None
        elif row.get("labels") is not None:
            yield int((torch.as_tensor(row["labels"]) != IGNORE_INDEX).sum())
        elif row.get("input_ids") is not None:
            mask = row.get("attention_mask")
            yield max(0, (len(row["input_ids"]) if mask is None else int(torch.as_tensor(mask).sum())) - 1)
        else:
            yield None


def _counts_of_batches(
    dataset: Any, numbers: Sequence[int], collate: Callable[[list], Mapping[str, Any]], model: nn.Module | None
) -> Iterator[int | None]:
    for start in range(0, len(numbers), BATCH):
        batch = collate([dataset[int(number)] for number in numbers[start : start + BATCH]])
        count = count_batch(batch, model) if isinstance(batch, Mapping) else None
        yield count
        if count is None:
            return
