"""Prediction of a whole data set, over all processes that Accelerate knows of, in the order of its rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal

import datasets
import torch
from accelerate import Accelerator, PartialState
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from tqdm.auto import tqdm
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, default_data_collator

from ..tuners.rows import count_rows, main_input_name
from ..whole_numbers import check_whole
from .engine import BatchPredictor, How, choose_source
from .heads import TokenHead
from .labels import LabelsPrediction
from .result import NotFiniteError, Prediction, RegressionPrediction


def predict_dataset(
    model: nn.Module,
    data: Any,
    how: How = "sample",
    num_samples: int | Literal["auto"] | None = None,
    seed: int = 0,
    *,
    weights: Sequence[float] | torch.Tensor | None = None,
    batch_size: int = 8,
    processing_class: Any = None,
    collate_fn: Callable[[list], Mapping[str, Any]] | None = None,
    split: Literal["rows", "draws"] = "rows",
    accelerator: Accelerator | PartialState | None = None,
    progress: bool = True,
    tolerance: float = 0.02,
    max_samples: int = 16,
    antithetic: bool | None = None,
    dropout: float | None = None,
    adapter_names: Sequence[str] | None = None,
    task: str = "auto",
    label_tokens: Sequence[int | str] | None = None,
    memory_budget: int | None = None,
) -> Prediction | LabelsPrediction | RegressionPrediction:
    """Predict every row of a data set; each process gets the whole result.

    Draw k is the same function for all rows, so the result depends neither on the batch size nor on the number of
    processes. Batches are formed first and then dealt out, so nothing is padded and nothing has to be cut off.

    Args:
        model: As for `predict`; on every process the same.
        data: A tokenised `datasets.Dataset` or other map-style dataset, or a `DataLoader` that keeps the order.
        how: As for `predict`.
        num_samples: As for `predict`.
        seed: As for `predict`.
        weights: As for `predict`.
        batch_size: Rows of a batch; a `DataLoader` has its own.
        processing_class: Tokenizer or processor that pads the rows of a batch to equal length.
        collate_fn: Makes a batch of a list of rows, instead of the collator that goes with `processing_class`.
        split: What is dealt to the processes: the batches, or the draws (for few rows and many draws).
        accelerator: The running `Accelerator`; a `PartialState` when `None`.
        progress: Show a bar, on the main process.
        tolerance: As for `predict`.
        max_samples: As for `predict`.
        antithetic: As for `predict`.
        dropout: As for `predict`.
        adapter_names: As for `predict`.
        task: As for `predict`.
        label_tokens: As for `predict`; `processing_class` serves as the tokenizer.
        memory_budget: As for `predict`.

    Returns:
        One prediction in the order of the data, with its labels if there are any.

    Raises:
        TypeError: If `data` is none of these.
        ValueError: If it is empty, its loader shuffles or is already dealt out, or for what `predict` refuses.
    """
    state = PartialState() if accelerator is None else accelerator
    source = choose_source(model, how, seed, dropout, adapter_names, antithetic)
    options = {"task": task, "label_tokens": label_tokens, "tokenizer": processing_class, "weights": weights}
    options["budget"] = memory_budget
    if split not in ("rows", "draws"):
        raise ValueError(f"split must be 'rows' or 'draws', got {split!r}.")
    # checked before the draws are dealt, so that bad input is refused on every process alike
    whole = BatchPredictor(source, how, num_samples, seed, tolerance=tolerance, max_samples=max_samples, **options)
    predictor = _own_share(whole, state, options) if split == "draws" and state.num_processes > 1 else whole
    of_tokens = predictor is not None and isinstance(predictor.head, TokenHead)
    loader, batches = loader_of(data, source.root, of_tokens, batch_size, processing_class, collate_fn, state)
    dealt = dealt_batches(loader, batches, split, state, progress and state.is_main_process)
    parts = [] if predictor is None else _predicted(predictor, dealt)
    return _joined(gather_object(parts) if state.num_processes > 1 else parts)


def _own_share(whole: BatchPredictor, state: Any, options: dict[str, Any]) -> BatchPredictor | None:
    """The prediction of this process's share of the draws; `None` where there are more processes than draws."""
    if whole.how == "mean" or whole.adaptive:
        raise ValueError("split='draws' deals a fixed number of draws; use split='rows' here.")
    total = whole.num_samples
    share = torch.arange(total).tensor_split(state.num_processes)[state.process_index].tolist()
    if not share:
        return None
    return BatchPredictor(whole.source, whole.how, len(share), whole.seed, first=share[0], total=total, **options)


def _predicted(predictor: BatchPredictor, batches: Iterable[tuple[int, Mapping[str, Any]]]) -> list[tuple]:
    """Number, first draw, rows and prediction of each batch; what is not finite is told when all are in."""
    parts: list[tuple] = []
    for index, batch in batches:
        try:
            found = predictor(batch)
        except NotFiniteError as error:
            found = error.wrong
        parts.append((index, predictor.first, count_rows(batch, main_input_name(predictor.source.root)), found))
    return parts


def _joined(parts: list[tuple[int, int, int, Any]]) -> Prediction | LabelsPrediction | RegressionPrediction:
    """Batches in order, each with its draws in order."""
    if not parts:
        raise ValueError("The data holds no rows, so there is nothing to predict.")
    parts = sorted(parts, key=lambda part: part[:2])
    wrong = [(index, made) for index, _, _, made in parts if isinstance(made, torch.Tensor)]
    if wrong:
        shown = ", ".join(f"{index}: {made.any(0).nonzero().flatten().tolist()[:8]}" for index, made in wrong[:4])
        items = torch.cat([made.any(0) for _, made in wrong])
        total = sum(count for _, _, count, _ in parts)
        raise NotFiniteError(
            items[None], f" in {len(wrong)} batches of {total} rows in all (batch: items in it; {shown})"
        )
    rows = {index: count for index, _, count, _ in parts}
    batches: dict[int, list[Any]] = {index: [] for index in rows}
    for index, _, _, prediction in parts:
        batches[index].append(prediction)
    whole = [shares[0] if len(shares) == 1 else type(shares[0]).stack_draws(shares) for shares in batches.values()]
    return type(whole[0]).concatenate(whole, list(rows.values()))


def dealt_batches(
    loader: Any, batches: int | None, split: str, state: Any, progress: bool
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """This process's share of the batches, each with its number, under a bar."""
    rank, world = (state.process_index, state.num_processes) if split == "rows" else (0, 1)
    with torch.random.fork_rng(devices=[]):
        made = iter(loader)  # takes a seed for its workers from the global generator
    own = islice(enumerate(made), rank, None, world)
    yield from tqdm(own, total=batches and -(-(batches - rank) // world), desc="predict", disable=not progress)


def loader_of(
    data: Any,
    root: nn.Module,
    of_tokens: bool,
    batch_size: int,
    processing_class: Any,
    collate_fn: Callable | None,
    state: Any,
    called: str = "processing_class",
) -> tuple[Any, int | None]:
    """The batches in order, and their number if known; `called` is the caller's argument for what pads rows."""
    if isinstance(data, DataLoader):
        _check_loader(data, state)
        try:
            return data, len(data)
        except TypeError:  # an iterable dataset has no length
            return data, None
    if isinstance(data, datasets.IterableDataset) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise TypeError(
            f"data must be a datasets.Dataset, another map-style dataset or a DataLoader, got {type(data).__name__}."
        )
    batch_size = check_whole(batch_size, "batch_size", 1)
    if len(data) == 0:
        raise ValueError("The data holds no rows, so there is nothing to predict.")
    if isinstance(data, datasets.Dataset):
        data = model_columns(data, root)
    if collate_fn is None:
        collate_fn = partial(_collate_checked, collator_for(processing_class, of_tokens, called), root)
    return DataLoader(data, batch_size=batch_size, collate_fn=collate_fn), -(-len(data) // batch_size)


def _check_loader(loader: DataLoader, state: Any) -> None:
    if isinstance(getattr(loader, "sampler", None), RandomSampler):
        raise ValueError(
            "The DataLoader shuffles, so the order of the rows would be lost. Build it with shuffle=False."
        )
    if state.num_processes > 1 and isinstance(loader, (DataLoaderShard, DataLoaderDispatcher)):
        raise ValueError(
            "The DataLoader was prepared by Accelerate and deals its batches out already. Pass it as it was before "
            "accelerator.prepare."
        )


def collator_for(
    processing_class: Any, of_tokens: bool = False, called: str = "processing_class"
) -> Callable[[list], Mapping[str, Any]]:
    """What makes a batch of rows: padded by a tokenizer or processor, or else of rows that are of one length."""
    if processing_class is None:
        return partial(_collate_equal, called=called)
    return (DataCollatorForTokenClassification if of_tokens else DataCollatorWithPadding)(processing_class)


def model_columns(data: datasets.Dataset, root: nn.Module) -> datasets.Dataset:
    """Only the columns that the model takes, and labels, as `Trainer` does."""
    return data.select_columns(_taken(data.column_names, root))


def _taken(names: Iterable[str], root: nn.Module) -> list[str]:
    """Those of some columns that are inputs of a model, or labels."""
    labels = {"label", "labels", "label_ids"}
    known = {*inspect.signature(root.forward).parameters, *labels}
    kept = [name for name in names if name in known]
    if not set(kept) - labels:
        raise ValueError(
            f"None of the columns {list(names)} is an input of {type(root).__name__}. Tokenise the data first."
        )
    return kept


def _collate_checked(collate: Callable[[list], Mapping[str, Any]], root: nn.Module, rows: list) -> Mapping[str, Any]:
    """A batch of rows, of which texts and what is no mapping (or object with attributes) are refused in words."""
    wrong = next((row for row in rows if not isinstance(row, Mapping)), None)
    if isinstance(wrong, str):
        raise TypeError("The rows are texts. Tokenise them first: a row is a mapping such as tokenizer(text).")
    if wrong is not None and not hasattr(wrong, "__dict__"):
        raise TypeError(
            "A row must be a mapping of input names to values, such as tokenizer(text) or a row of a "
            f"datasets.Dataset, got {type(wrong).__name__}. Give collate_fn= for rows of another kind."
        )
    if wrong is None and any(isinstance(value, str) for value in rows[0].values()):
        _taken(rows[0], root)
    return collate(rows)


def _collate_equal(rows: list[Mapping[str, Any]], called: str = "processing_class") -> dict[str, Any]:
    """Rows as they are, which must be of one length."""
    for name in rows[0] if isinstance(rows[0], Mapping) else ():
        values = [row.get(name) for row in rows]
        lengths = {len(value) for value in values if isinstance(value, (list, tuple)) or getattr(value, "ndim", 0)}
        if len(lengths) > 1:
            raise ValueError(
                f"The rows of a batch have different lengths in {name!r} ({sorted(lengths)[:8]}), so they have to be "
                f"padded. Pass the tokenizer (or processor) as {called}=, a collator as collate_fn=, or use "
                "batch_size=1."
            )
    return default_data_collator(rows)
