"""Texts in, calibrated probabilities out: an adapter with all that belongs to it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..artefact import Artefact
from ..calibration.recalibrate import FittedMethod, load_state
from ..json_files import Fields
from ..prediction import predict_dataset
from ..prediction.engine import check_how
from ..prediction.members import predict_members
from ..prediction.sources import LawDraws
from ..tuners.laws import laws_of
from .calibrating import calibrated, saved
from .decisions import Decisions
from .error_head import NONE, ErrorHead
from .inputs import Encoded, encode
from .kinds import KINDS, Kind
from .table import ERROR, added_names


@dataclass(frozen=True, repr=False)
class Predictor:
    """An adapter on its base model that answers texts with calibrated probabilities; made by `peft_calib.load`.

    Attributes:
        model: The base model with the adapter, or with the members of an ensemble.
        tokenizer: Of the base model.
        artefact: What was stored beside the adapter: classes, inputs, recalibrations.
        folder: Where it was loaded from.
        label_names: Names of the classes, in order.
        adapter_names: The adapters in the model; several for an ensemble.
        error_head: The uncertainty head beside the adapter.
        decisions: The decision rules beside the adapter.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    artefact: Artefact
    folder: Path
    label_names: tuple[str, ...]
    adapter_names: tuple[str, ...] = ("default",)
    error_head: ErrorHead = field(default_factory=ErrorHead)
    decisions: Decisions = field(default_factory=Decisions)
    _methods: dict[str, FittedMethod] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for how, state in self.artefact.ways.items():
            method = load_state(state)
            if method.num_classes != len(self.label_names):
                of = f"{method.num_classes} {self.kind.unit}"
                raise ValueError(
                    f"{self.folder}: the recalibration of how={how!r} is for {of}, and the "
                    f"adapter has {len(self.label_names)}. Fit it again on a calibration split."
                )
            self._methods[how] = method

    def __repr__(self) -> str:
        ways = ", ".join(f"{how}: {self.recalibration(how)[1]}" for how in self._methods) or self.recalibration("")[1]
        what = f"{len(self.label_names)} {self.kind.unit}"
        return f"Predictor({str(self.folder)!r}, {what}, how={self.main_way!r}, {ways})"

    @property
    def kind(self) -> Kind:
        """What the adapter answers with."""
        return KINDS[self.artefact.kind]

    @property
    def main_way(self) -> str:
        """How the adapter is made to predict: with draws where it has some, else with its mean."""
        if len(self.adapter_names) > 1 or self.artefact.main_way == "sample":
            return "sample"
        if self.artefact.main_way is not None:  # a recalibration of the mean alone: it is what was calibrated
            return "mean"
        return "sample" if any(law.config.draws_differ for law in self._laws()) else "mean"

    def way_of(self, how: str | None, num_samples: int | None) -> str:
        """The way that was asked for; draws where only their number was."""
        if how is None and num_samples is not None and self.main_way == "mean":
            if not any(law.config.draws_differ for law in self._laws()):
                raise ValueError("The adapter is deterministic: it has no draws, so num_samples means nothing to it.")
            return "sample"
        how = self.main_way if how is None else how
        check_how(how)
        return how

    def predict(
        self,
        texts: Any,
        num_samples: int | None = None,
        how: str | None = None,
        seed: int = 0,
        *,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Any:
        """Predict texts, pairs of texts or the rows of a table.

        Args:
            texts: A list of texts, of pairs of texts, a `datasets.Dataset` or another table with the columns that the
                adapter was trained on (labels may be among them, or not), or one with `input_ids`. For a language
                model that answers with a letter, texts are whole prompts.
            num_samples: Draws K; as many as the temperature was fitted with if not given.
            how: As for `peft_calib.predict`; with draws where the adapter has some, else `"mean"`, if not given.
                `"late"` gives the draws of `"sample"` and has their temperature, `"linear"` has none.
            seed: Key of the draws.
            batch_size: Rows of a forward; that of the training's evaluations if not given.
            progress: Show a bar.

        Returns:
            The prediction, in the order of the rows. Of classes it is a `CalibratedPrediction` with `label_names`,
            `labels_predicted`, calibrated `probabilities` (N, C), `temperature`, `entropy` and `mutual_information`
            (nats), and with an uncertainty head beside the adapter `error_probability`, from the same forward; with a
            decision rule there it has `answered` (N,) or `sets` (N, C), and in `decision` what these promise. Of
            labels it is a `LabelsAnswer` with `probabilities` (N, L), and of numbers a `NumberAnswer` with `mean`,
            `sd`, `lower` and `upper`. Texts that are longer than what the adapter was trained on are cut as in
            training; `num_cut` counts them, and a warning says so.

        Raises:
            TypeError: If a text is no text, or there is a stream instead of rows.
            ValueError: If there is no row, or texts are given for pairs, or for what `peft_calib.predict` refuses.

        Example:
            >>> predictor = peft_calib.load("runs/bayesian/adapter")  # doctest: +SKIP
            >>> predictor.predict(["a lovely film"]).labels_predicted  # doctest: +SKIP
            ['good']
        """
        rows = encode(texts, self.artefact, self.tokenizer)
        if rows.num_cut:
            warnings.warn(
                f"{rows.num_cut} of {len(rows)} texts are longer than {self.artefact.inputs.max_length} tokens and "
                "were cut, as in training.",
                UserWarning,
                stacklevel=2,
            )
        return self.predict_encoded(rows, num_samples, how, seed, batch_size=batch_size, progress=progress)

    def predict_encoded(
        self,
        rows: Encoded,
        num_samples: int | None = None,
        how: str | None = None,
        seed: int = 0,
        *,
        batch_size: int | None = None,
        progress: bool = False,
        accelerator: Any = None,
    ) -> Any:
        """The same for rows that are inputs already; `accelerator` as for `predict_dataset`."""
        how = self.way_of(how, num_samples)
        method, told = self.recalibration(how)
        fitted = self.num_samples_for(how)
        count = fitted if num_samples is None else num_samples
        if method is not None and how != "mean" and count != fitted:
            told = f"{told}, fitted with {fitted} draws"
        # rows of similar length side by side, as in an evaluation: less padding
        order = np.argsort([len(ids) for ids in rows.columns["input_ids"]], kind="stable")
        places, shared = order.tolist(), {"batch_size": self.batch_size_for(batch_size), "progress": progress}
        shared["accelerator"] = accelerator
        serves, head = self.error_head.serves(how, self.count_of(how, count), method, self.artefact)
        errors = None
        if serves:
            made, errors = self.error_head.predict(rows, places, how, seed, {"tokenizer": self.tokenizer, **shared})
            self._check_classes(made)
        else:
            made = self._made(rows.as_dataset(places), how, count, seed, shared)
        said = {"label_names": self.label_names, "recalibration": told, "num_cut": rows.num_cut}
        said |= self.kind.said_of(rows)
        if self.error_head.told != NONE:
            said["error_head"] = head
        if errors is not None:
            said["error_probability"] = errors[self.kind.items_in_order(made, order)]
        answer = self.kind.answer(self.kind.in_order(made, order), method, self.artefact, **said)
        return self.decisions.applied(answer, how, self.count_of(how, count), seed, self.artefact)

    def calibrate(
        self,
        rows: Any,
        labels: Sequence[str | int] | None = None,
        method: FittedMethod | None = None,
        *,
        how: str | None = None,
        num_samples: int | None = None,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> Predictor:
        """Fit a recalibration on labelled rows that were not trained on: the way to one for a LoRA of another tool.

        Args:
            rows: What `predict` takes.
            labels: Name or position of the class of each row, where the rows have no column of them; zeros and ones
                `(N, L)` of labels, or numbers.
            method: Unfitted; a `TemperatureScaling` if not given. Of labels a `LabelScaling`, of numbers always the
                noise.
            how: `"mean"` or `"sample"`; as `predict` chooses if not given.
            num_samples: Draws K.
            seed: Key of the draws.
            batch_size: As for `predict`.

        Returns:
            A predictor that applies it, on the same model. The model carries it, too: `save` writes it beside the
            adapter, with a record of the rows, on which no report is made.

        Raises:
            ValueError: If a row has no label of the classes, there are too few, or rows were trained on.
        """
        return calibrated(self, rows, labels, method, how, num_samples, seed, batch_size)

    def save(self, folder: str | Path) -> Path:
        """Write the adapter with all that belongs to it: `peft_calib.load(folder)` answers as this predictor does."""
        return saved(self, folder)

    def gives_errors(self, how: str | None, num_samples: int | None) -> bool:
        """Whether predictions that are asked for in this way have an `error_probability`."""
        way = self.way_of(how, num_samples)
        count = self.num_samples_for(way) if num_samples is None else num_samples
        return self.error_head.serves(way, self.count_of(way, count), self.recalibration(way)[0], self.artefact)[0]

    def further_columns(self, how: str | None, num_samples: int | None, seed: int) -> list[str]:
        """What a table that is predicted in this way has besides label and probabilities: P(error), decisions."""
        errors, way = self.gives_errors(how, num_samples), self.way_of(how, num_samples)
        count = self.count_of(way, self.num_samples_for(way) if num_samples is None else num_samples)
        return [*([ERROR] if errors else []), *self.decisions.columns(way, count, seed, errors, self.artefact)]

    def added_names(
        self, prefix: str, all_probabilities: bool, how: str | None, num_samples: int | None, seed: int
    ) -> list[str]:
        """Names of the columns that predictions of some way add to a table."""
        if all_probabilities and self.kind.of_words:
            raise ValueError(
                "--all-probabilities (all_probabilities=True) is of rows with one answer, not of entities"
            )
        own = self.kind.columns(self.further_columns(how, num_samples, seed))
        return added_names(prefix, own, self.label_names if all_probabilities and self.kind.has_probabilities else ())

    def count_of(self, how: str, count: int | None) -> int | None:
        """How many draws a prediction has where their number was left to the adapter, for a head or rule of draws."""
        asked = self.error_head.bound is not None or bool(self.decisions.stored)
        if how not in ("sample", "late") or count is not None or not asked:
            return count
        return LawDraws(self.model, 0).default_num_samples

    def seed_of(self, how: str, seed: int) -> int | None:
        """The seed that a way of predicting hangs on: that of a stochastic law's draws, and else None."""
        drawn = how != "mean" and len(self.adapter_names) == 1 and any(law.stochastic for law in self._laws())
        return seed if drawn else None

    def recalibration(self, how: str) -> tuple[Any, str]:
        """What is applied to a way of predicting, None for nothing; and in words."""
        way = "sample" if how == "late" else how
        method = self._methods.get(way)
        if method is None:
            what = "temperature" if self.kind.has_probabilities else "noise"
            return None, f"no {what} is stored" + (f" for how={how!r}" if self._methods else "")
        return method, self.kind.told(method)

    def num_samples_for(self, how: str) -> int | None:
        """Draws that a way of predicting was calibrated with; None where it was not: as many as the law has."""
        state: Mapping[str, Fields] = self.artefact.ways
        way = state.get("sample" if how in ("late", "linear") else how)
        if way is None:
            return len(self.adapter_names) if len(self.adapter_names) > 1 else None
        return way.integer("num_samples", default=None)

    def batch_size_for(self, batch_size: int | None) -> int:
        """Rows of a forward: those asked for, or as in training."""
        return batch_size or self.artefact.inputs.batch_size or 8

    def _made(self, rows: Any, how: str, count: int | None, seed: int, shared: dict[str, Any]) -> Any:
        options: dict[str, Any] = {
            "processing_class": self.tokenizer,
            "task": self.kind.predict_task if self.artefact.label_tokens is None else "next_token",
            "label_tokens": self.artefact.label_tokens,
            **shared,
        }
        if len(self.adapter_names) > 1:
            if how != "sample":
                raise ValueError(f"An ensemble of adapters predicts with how='sample', its members; got {how!r}.")
            if count is not None and not 1 <= count <= len(self.adapter_names):
                raise ValueError(f"The ensemble has {len(self.adapter_names)} members, num_samples is {count}.")
            found: Any = predict_members(self.model, rows, self.adapter_names[:count], **options)
        else:
            if how != "mean" and not self._laws():
                raise ValueError(
                    f"how={how!r} (--how {how}) takes draws, and this adapter is deterministic, it has none: leave "
                    "out how and the number of draws."
                )
            found = predict_dataset(self.model, rows, how=how, num_samples=count, seed=seed, **options)  # type: ignore
        self._check_classes(found)
        return found

    def _check_classes(self, found: Any) -> None:
        size = getattr(found, found.samples_name).shape[-1]
        if size != len(self.label_names):
            raise ValueError(
                f"The adapter answers with {size} {self.kind.unit}, and "
                f"{len(self.label_names)} are named: {', '.join(self.label_names[:8])}. Give label_names to load."
            )

    def _laws(self) -> list[Any]:
        return list(laws_of(self.model, active=True))
