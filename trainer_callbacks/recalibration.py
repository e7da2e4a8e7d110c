"""A temperature fitted at the end of training on held-out rows, and stored with the adapter it was fitted for."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, default_data_collator
from transformers.utils import logging

from peft_calib.artefact import ARTEFACT_FILE, read_artefact
from peft_calib.artefact import RECALIBRATION_FILE as RECALIBRATION_FILE  # where others have it from
from peft_calib.calibration.recalibrate import Recalibrator, TemperatureScaling, load_state
from peft_calib.calibration.recalibrate.temperature import check_enough_rows
from peft_calib.console import own_random_state
from peft_calib.identity import digest_of_folder
from peft_calib.prediction.draws import check_num_samples
from peft_calib.provenance.companions import attach_recalibration, detach_file
from peft_calib.provenance.row_tables import as_rows
from peft_calib.provenance.splits import RowSet, record_split
from peft_calib.tuners.laws import laws_of

from .adapter_state import check_readable
from .checkpoints import checkpoint_folder
from .forwards import labels_of_batch, logits_of_rows
from .outputs import label_names_of

logger = logging.get_logger(__name__)


class RecalibrationCallback(TrainerCallback):
    """Fits a temperature on the calibration split when training ends, and stores it with the adapter.

    Before training it compares the split with the training rows and refuses an overlap. Which rows were trained on and
    calibrated on, and the temperature, are then written beside the adapter at every save (`calibration_split.json`,
    `predictor.json`); read the latter with `load_recalibration`. Put it after a `BestCalibrationCallback`, whose
    choice it calibrates.

    A temperature that the rows do not support is left off, and the file says so: `fit` holds its interval and the
    reason. What cannot be fitted when training is over (too few rows, logits that are NaN) is a warning: the trained
    adapter is worth more than its temperature.

    Args:
        calibration_dataset: Held-out rows with labels, prepared like the training rows, see `calibration_split`; a
            data frame of such columns will do.
        method: What to fit; a new `TemperatureScaling` if omitted.
        num_samples: Fit on the mean probabilities of this many draws of the adapter, for those who predict that way;
            None takes the deterministic adapter.
        seed: Of the draws.
        data_collator: Makes a batch of rows; the Trainer's if omitted.
        batch_size: Rows of a batch; the Trainer's evaluation batch size if omitted.
        answer_token_ids: Token of each class, for multiple choice by a causal language model.

    Example:
        >>> from peft_calib import calibration_split
        >>> rows = [{"input_ids": [i, i + 1], "labels": i % 2} for i in range(20)]
        >>> train, calibration = calibration_split(rows, fraction=0.2)
        >>> callback = RecalibrationCallback(calibration)  # Trainer(..., train_dataset=train, callbacks=[callback])
    """

    def __init__(
        self,
        calibration_dataset: Any,
        method: Recalibrator | None = None,
        *,
        num_samples: int | None = None,
        seed: int = 0,
        data_collator: Callable[[list], Mapping[str, Any]] | None = None,
        batch_size: int | None = None,
        answer_token_ids: list[int] | None = None,
    ) -> None:
        self.calibration_dataset = as_rows(calibration_dataset)
        self.method = TemperatureScaling() if method is None else method
        self.num_samples = None if num_samples is None else check_num_samples(num_samples)
        self.seed, self.data_collator, self.batch_size = seed, data_collator, batch_size
        self.answer_token_ids = answer_token_ids
        self._rows = RowSet.of(calibration_dataset)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Refuse rows that are trained on too, have no labels, or cannot be drawn for; record both sets."""
        model = kwargs["model"]
        check_readable(model)
        detach_file(model, ARTEFACT_FILE)  # of an earlier training
        if self.num_samples is not None and next(laws_of(model, active=True), None) is None:
            raise TypeError(
                f"RecalibrationCallback(num_samples={self.num_samples}) draws from an adapter of this package, and "
                f"{type(model).__name__} has none. Leave num_samples out."
            )
        loader = kwargs.get("train_dataloader")
        self._check_labels(model, loader, args)
        rows = getattr(loader, "dataset", None)
        try:
            trained_on = RowSet.of(rows)
        except TypeError as error:
            warnings.warn(
                f"The calibration split could not be compared with the training rows: {error}",
                UserWarning,
                stacklevel=2,
            )
            trained_on = None
        record_split(model, trained_on=trained_on, calibrated_on=self._rows)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Fit, attach to the model, and add to the last checkpoint if that holds the same adapter."""
        model = kwargs["model"]
        try:
            logits, labels = logits_of_rows(
                model,
                *self._rows_and_collator(kwargs.get("train_dataloader")),
                batch_size=self.batch_size or args.per_device_eval_batch_size,
                num_samples=self.num_samples,
                seed=self.seed,
                answer_token_ids=self.answer_token_ids,
                label_names=args.label_names,
            )
            self.method.fit(logits, labels)
        except Exception as error:  # whatever it is: the training that it would end with is finished
            warnings.warn(
                f"RecalibrationCallback fitted nothing, and {ARTEFACT_FILE} is not written: "
                f"{str(error) or type(error).__name__}",
                UserWarning,
                stacklevel=2,
            )
            return
        # what was decided about a temperature
        fit = getattr(self.method, "fit_result", None)
        if fit is not None and fit.applied and fit.at_bound is None:
            logger.info(f"RecalibrationCallback: {fit.reason}")
        elif fit is not None:
            warnings.warn(f"RecalibrationCallback: {fit.reason}", UserWarning, stacklevel=2)
        about = {"num_samples": self.num_samples, "seed": self.seed, "label_tokens": self.answer_token_ids}
        try:
            found = attach_recalibration(model, self.method.state(), **about)
            folder = checkpoint_folder(args, state)
            if args.process_index == 0 and digest_of_folder(folder) in found.adapters.values():
                found.write(folder)
        except Exception as error:  # as above
            warnings.warn(
                f"RecalibrationCallback could not store what it fitted in {ARTEFACT_FILE}: "
                f"{str(error) or type(error).__name__}",
                UserWarning,
                stacklevel=2,
            )

    def _rows_and_collator(self, loader: Any) -> tuple[Any, Callable[[list], Mapping[str, Any]]]:
        collate = self.data_collator or getattr(loader, "collate_fn", None) or default_data_collator
        rows, names = self.calibration_dataset, getattr(getattr(loader, "dataset", None), "column_names", None)
        if names and hasattr(rows, "select_columns"):
            # collators cannot digest columns that the Trainer took from the training rows
            rows = rows.select_columns([name for name in rows.column_names if name in names])
        return rows, collate

    def _check_labels(self, model: Any, loader: Any, args: TrainingArguments) -> None:
        """Refuse, before anything is trained, rows that a batch has no classes of."""
        rows, collate = self._rows_and_collator(loader)
        with own_random_state(0):
            batch = copy.deepcopy(collate)([rows[i] for i in range(min(2, len(rows)))])
        labels = labels_of_batch(batch, label_names_of(model, args.label_names))
        if labels.dim() < 2 and isinstance(self.method, TemperatureScaling):
            try:
                check_enough_rows(len(rows))
            except ValueError as error:
                warnings.warn(f"RecalibrationCallback will fit nothing: {error}", UserWarning, stacklevel=3)


def load_recalibration(folder: str | Path, how: str | None = None) -> Recalibrator:
    """What `RecalibrationCallback` stored beside an adapter, or `peft-calib train`.

    Args:
        folder: Of the saved adapter.
        how: For which way of predicting, `"mean"` or `"sample"` (also for `"late"`). When `None` that of the adapter's
            main way, as `peft_calib.load` takes it: the draws where they have one, else the mean.

    Returns:
        The fitted method; `transform(logits)` gives calibrated probabilities.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it was fitted for other weights than the folder's, or is damaged, or there is none for `how`.
    """
    found = read_artefact(folder)
    if found is None or not found.ways:
        raise FileNotFoundError(
            f"{folder} has no recalibration ({ARTEFACT_FILE}). Train with a RecalibrationCallback, or fit a "
            "TemperatureScaling on a calibration split."
        )
    if digest_of_folder(folder) is not None:
        found.check_belongs(folder)
    way = found.main_way if how is None else ("sample" if how == "late" else how)
    if way not in found.ways:
        raise ValueError(f"{folder} has no recalibration for how={how!r}; it has one for {' and '.join(found.ways)}.")
    return load_state(found.ways[way])
