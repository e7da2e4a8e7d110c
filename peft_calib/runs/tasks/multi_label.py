"""Several labels a text, of which any number may hold; and the one label of a reranker: is this text relevant."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ...artefact import Inputs
from ...calibration.recalibrate.temperature import final_linear
from ...predictor.inputs import tokenized_texts
from ...predictor.kinds.labels import SEPARATORS, columns_of_flags, labels_in, named_values, separator_of
from ...provenance.columns import check_column, texts_of
from ...provenance.origins import at
from ..labels import LabelMap
from ..settings import RunConfig
from .base import encoded
from .sequence import TEXTS, SequenceClassification

#: More labels than this, in most rows a new one, are texts.
MOST_LABELS = 1000


def _labels_of(rows: Dataset, values: Sequence[Any], separator: str | None, source: str) -> list[list[str]]:
    """The labels of every row; an error says where one cannot be read."""
    found = []
    for row, value in enumerate(values):
        try:
            found.append(labels_in(value, separator))
        except ValueError as error:
            raise ValueError(f"{at(source, rows, row)}: {error}") from None
    return found


def _warn_of_other_separators(found: Sequence[Sequence[str]], config: RunConfig) -> None:
    inside = sorted({label for row in found for label in row if any(mark in label for mark in SEPARATORS)})
    if inside and config.label_names is None:
        warnings.warn(
            f"{config.data}: {len(inside)} labels hold what often stands between labels, such as {inside[0]!r}; "
            f"labels are taken apart at {config.label_separator!r}. Name it with --label-separator",
            UserWarning,
            stacklevel=2,
        )


class MultiLabel(SequenceClassification):
    """Columns `text_column` (one or two), and `label_columns` of zeros and ones or one `label_column` of lists."""

    predict_task: ClassVar[str] = "labels"
    kind: ClassVar[str] = "labels"

    @classmethod
    def learn(cls, config: RunConfig, rows: Dataset) -> MultiLabel:
        """The labels that the training rows have: the columns' names, or all that are in the lists."""
        if config.label_columns:
            for name in config.label_columns:
                check_column(rows, name, "label", config.data)
            columns_of_flags(rows, config.label_columns, config.data)
            return cls(config, _label_map(config.label_columns, config.data))
        check_column(rows, config.label_column, "labels", config.data)
        values = named_values(rows, config.label_column)
        if config.label_separator is None:
            config = replace(config, label_separator=separator_of(values))
        found = _labels_of(rows, values, config.label_separator, config.data)
        _warn_of_other_separators(found, config)
        names = config.label_names or sorted({label for row in found for label in row})
        if len(names) > MOST_LABELS:
            raise ValueError(
                f"{config.data}: {len(names)} different labels in {len(found)} rows are texts, not labels. Name the "
                "column of the labels with --label-column, or what stands between them with --label-separator"
            )
        task = cls(config, _label_map(names, config.data))
        task._encoded(rows, config.data, config.train_split)
        return task

    @classmethod
    def columns(cls, config: RunConfig) -> list[str]:
        """A row without a label is one that has none."""
        return [*config.text_column, *config.label_columns]

    def canonical(self, rows: Dataset, source: str, split: str) -> Dataset:
        """Columns `text`, `text_pair` for pairs, and `labels`, 0.0 or 1.0 for each, as the loss takes."""
        columns = dict(zip(TEXTS, self.config.text_column, strict=False))
        texts = {key: texts_of(rows, column, "text", source) for key, column in columns.items()}
        labels = [list(map(float, row)) for row in self._encoded(rows, source, split)]
        return Dataset.from_dict(texts | {"labels": labels})

    def _encoded(self, rows: Dataset, source: str, split: str) -> list[list[int]]:
        assert self.labels is not None
        if self.config.label_columns:
            for name in self.config.label_columns:
                check_column(rows, name, "label", source)
            return columns_of_flags(rows, self.config.label_columns, source)
        check_column(rows, self.config.label_column, "labels", source)
        index = {name: position for position, name in enumerate(self.labels.names)}
        found = []
        values = named_values(rows, self.config.label_column)
        for row, named in enumerate(_labels_of(rows, values, self.config.label_separator, source)):
            unknown = [label for label in named if label not in index]
            if unknown:
                raise ValueError(
                    f"{at(source, rows, row)}: row {row} of {split} has the label {unknown[0]!r}; known are "
                    f"{', '.join(self.labels.names[:20])}. What stands between labels is said with --label-separator"
                )
            held = {index[label] for label in named}
            found.append([int(position in held) for position in range(len(index))])
        return found

    def inputs(self) -> Inputs:
        columns, separator = tuple(self.config.label_columns), self.config.label_separator
        return replace(super().inputs(), label_columns=columns, label_separator=separator)

    def with_any_label(self, rows: Dataset) -> Dataset:
        raise ValueError(f"rows of other origin are told by confidence, of which {self.config.task} has none")

    def encode_training(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Tokens, and `labels`."""

        def encode(batch: dict[str, list]) -> dict[str, list]:
            texts = [batch[name] for name in TEXTS if name in batch]
            return tokenized_texts(texts, tokenizer, self.config.max_length) | {"labels": batch["labels"]}

        return encoded(rows, encode)

    def start_head(self, model: nn.Module, train: Dataset) -> None:
        """The bias of each label at the log-odds of its share, where the head has one (Lin et al., 2017).

        From a probability of 1/2 each the first steps only push all logits down, with whatever moves them: the adapter
        learned to answer the same for every text, and 150 steps on 20 labels ended at the base rates.
        """
        labels = np.asarray(train["labels"][:])
        shares = (labels.sum(axis=0) + 1.0) / (len(labels) + 2.0)
        layer = final_linear(model, labels.shape[1])
        if layer.bias is not None:
            odds = torch.as_tensor(np.log(shares) - np.log1p(-shares))
            layer.bias.data.copy_(odds.to(layer.bias))

    def targets(self, rows: Dataset) -> list[Any]:
        return rows["labels"][:]


class Reranking(MultiLabel):
    """Columns `text_column` (a query and a text) and `label_column`, 1 where it is relevant: one logit a pair."""

    @classmethod
    def learn(cls, config: RunConfig, rows: Dataset) -> Reranking:
        check_column(rows, config.label_column, "label", config.data)
        flags = [row[0] for row in columns_of_flags(rows, [config.label_column], config.data)]
        if min(flags) == max(flags):
            raise ValueError(f"{config.data}: every row has the label {flags[0]}; relevant and other texts are needed")
        config = replace(config, label_columns=[config.label_column])
        return cls(config, LabelMap(("relevant",), (("relevant", 0),)))


def _label_map(names: Sequence[str], source: str) -> LabelMap:
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{source}: labels must be different texts, and at least one; got {list(names)}")
    return LabelMap(tuple(names), tuple((name, position) for position, name in enumerate(names)))
