"""Batches of rows answered wherever a worker runs: for engines that deal rows to processes themselves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..provenance.origins import as_dataset
from .inputs import encode
from .loading import load
from .predictor import Predictor
from .shards import ALONE
from .table import added_columns, refuse_clash


class Scorer:
    """Answers a batch of rows with their columns and what `peft-calib predict` adds.

    It can be pickled, and carries no weights: each process loads the adapter when it is first asked. So it serves
    `datasets.Dataset.map` with several processes and Ray Data's `map_batches` as it is.

    Args:
        adapter: As for `peft_calib.load`.
        num_samples: As for `Predictor.predict`, like the next three.
        how: Way of predicting.
        seed: Of the draws; the same in all processes.
        batch_size: Rows of a forward.
        prefix: Of the names of the added columns.
        all_probabilities: Add the probability of every class, too.
        device: Where to; with a rank, the accelerator of that number among those there are.
        options: Further arguments of `peft_calib.load`.

    Example:
        >>> scorer = Scorer("runs/b", num_samples=8)
        >>> rows = rows.map(scorer, batched=True, with_rank=True, num_proc=4)  # doctest: +SKIP
        >>> ray_rows = ray_rows.map_batches(scorer, concurrency=4)  # doctest: +SKIP
    """

    def __init__(
        self,
        adapter: str | Path,
        num_samples: int | None = None,
        how: str | None = None,
        seed: int = 0,
        *,
        batch_size: int | None = None,
        prefix: str = "",
        all_probabilities: bool = False,
        device: str | torch.device | None = None,
        **options: Any,
    ) -> None:
        self.adapter, self.device, self.options = str(adapter), device, options
        self.made = {"num_samples": num_samples, "how": how, "seed": seed, "batch_size": batch_size}
        self.prefix, self.all_probabilities = prefix, all_probabilities
        self._predictor: Predictor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The settings: another process loads the adapter itself."""
        return {**self.__dict__, "_predictor": None}

    def __call__(self, batch: Mapping[str, Any], rank: int | None = None) -> dict[str, Any]:
        """Answer a batch.

        Args:
            batch: Column to the values of its rows, lists or arrays.
            rank: Number of the process, where there are several accelerators to choose from.

        Returns:
            The batch's columns, and behind them those that were added, as lists.

        Raises:
            ValueError: If a column is called as an added one would be, or for what `Predictor.predict` refuses.
        """
        predictor = self._loaded(rank)
        columns = {name: batch[name] for name in batch}
        made = {name: self.made[name] for name in ("how", "num_samples", "seed")}
        names = predictor.added_names(self.prefix, self.all_probabilities, **made)
        refuse_clash(list(columns), names, "the batch", "prefix=, such as prefix='model_'")
        if not columns or not len(next(iter(columns.values()))):
            return {**columns, **{name: [] for name in names}}  # engines ask an empty batch for its columns
        rows = as_dataset({name: list(values) for name, values in columns.items()})
        encoded = encode(rows, predictor.artefact, predictor.tokenizer, "the batch")
        return {**columns, **added_columns(predictor.predict_encoded(encoded, **self.made, accelerator=ALONE), names)}

    def _loaded(self, rank: int | None) -> Predictor:
        if self._predictor is None:
            device = self.device
            if device is None and rank is not None and torch.accelerator.is_available():
                kind = torch.accelerator.current_accelerator()
                device = torch.device(str(kind), rank % torch.accelerator.device_count())
            self._predictor = load(self.adapter, device=device, **self.options)
        return self._predictor
