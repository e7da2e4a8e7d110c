"""The rows that a rule is fitted on: labelled, unseen by the adapter, and each input once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..artefact import Inputs, place_of
from ..predictor import Predictor
from ..predictor.inputs import Encoded, choices_of, encode, text_names
from ..provenance.columns import MEND, without_missing
from ..provenance.row_hashes import hash_rows
from ..provenance.splits import RowSet, SplitRecord, check_unseen, distinct_rows, read_split
from .folder import RunFolder
from .loading import load_task, read_record
from .predicting import chosen_split
from .rows import TestData, load_test_rows
from .sources import FileFormat, read_splits, source_name

#: What rows are wanted for, in messages.
PURPOSE = "decided on"
#: Columns that a run knows its texts by, whatever they are called in its source.
OF_TEXTS, OF_CHOICES, OF_WORDS = ("text", "text_pair"), ("question", "choices"), "tokens"


@dataclass(frozen=True)
class RowsToDecide:
    """Labelled rows as inputs, the hashes they are known by, and how many were left out: seen ones, repeated ones."""

    name: str
    encoded: Encoded
    known: Mapping[str, RowSet]
    left_out: int = 0
    repeated: int = 0

    @classmethod
    def of(
        cls, name: str, found: Encoded, known: Mapping[str, RowSet], hashes: np.ndarray, seed: int, left_out: int = 0
    ) -> RowsToDecide:
        """One row of each input; `hashes` are those of the inputs, in the order of the rows."""
        assert found.labels is not None
        labels = np.asarray(found.labels) if found.words is None else _numbered(found.labels)
        if labels.ndim > 1:  # several labels a row: equal ones have one number
            labels = np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)
        kept = distinct_rows(hashes, labels, seed).tolist()
        once = found.select(kept)
        sets = {kind: RowSet(kind, np.unique(rows.hashes)) for kind, rows in known.items()}
        return cls(name, once, sets, left_out, len(found) - len(kept))


def _numbered(labels: Sequence[Sequence[int]]) -> np.ndarray:
    """A number for each list of tags, the same for equal ones, whatever the order of the rows."""
    numbers = {tags: number for number, tags in enumerate(sorted({tuple(tags) for tags in labels}))}
    return np.array([numbers[tuple(tags)] for tags in labels])


def rows_for(place: Path, data: Any, where: dict[str, Any], seed: int) -> Callable[[Predictor], RowsToDecide]:
    """What reads the rows once there is a predictor; whatever can be refused without one is refused at once."""
    unknown = set(where) - {"split", "subset", "encoding", "delimiter", "drop_missing", "text_column", "label_column"}
    if unknown:
        raise TypeError(f"decide() has no argument {', '.join(sorted(unknown))}")
    form = FileFormat(where.get("encoding"), where.get("delimiter"))
    source = TestData(data, where.get("subset"), where.get("split"), form, bool(where.get("drop_missing")))
    run = RunFolder(place)
    if not run.finished.is_file():
        return _rows_of_adapter(source, where.get("text_column"), where.get("label_column"), seed)
    if where.get("text_column") or where.get("label_column"):
        raise ValueError("the columns of a run are those of its training: leave out --text-column and --label-column")
    if data is None and source.split is None:
        raise ValueError(
            "name labelled rows to fit the rule on with --data, or a split of the run's own data with --split; rows "
            "that the run has not seen, and that you will not report on"
        )
    return _rows_of_run(run, source, seed)


def _rows_of_run(run: RunFolder, source: TestData, seed: int) -> Callable[[Predictor], RowsToDecide]:
    task = load_task(run)
    rows = load_test_rows(task, read_record(run, task), source, PURPOSE)

    def encoded(predictor: Predictor) -> RowsToDecide:
        known, found = RowSet.of(rows.rows), task.encode_for_predictor(rows.rows, predictor.tokenizer)
        return RowsToDecide.of(rows.name, found, {known.kind: known}, rows.keys, seed, rows.left_out)

    return encoded


def _rows_of_adapter(
    source: TestData, texts: Sequence[str] | None, label: str | None, seed: int
) -> Callable[[Predictor], RowsToDecide]:
    if source.source is None:
        raise ValueError("name labelled rows to fit the rule on with --data: rows that nothing was fitted on")
    name = source_name(source.source)
    table = chosen_split(read_splits(source.source, source.subset, source.form), source.split, name)

    def encoded(predictor: Predictor) -> RowsToDecide:
        own = predictor.artefact.inputs
        inputs = replace(own, text_columns=tuple(texts) if texts else own.text_columns)
        inputs = replace(inputs, label_column=label or inputs.label_column)
        rows = table
        if source.drop_missing:
            rows, _ = without_missing(rows, [*(inputs.text_columns or ("text",)), *inputs.choices_columns])
        found = encode(rows, replace(predictor.artefact, inputs=inputs), predictor.tokenizer, name, MEND)
        is_known = predictor.kind.is_known
        unlabelled = len(found) if found.labels is None else sum(not is_known(label) for label in found.labels)
        if unlabelled:
            raise ValueError(
                f"{name}: {unlabelled} of {len(found)} rows have no label that is one of the {predictor.kind.unit} "
                f"({', '.join(predictor.label_names[:8])}); a rule is fitted on labelled rows (--label-column)"
            )
        forms = [found.as_dataset(range(len(found)))]
        record = read_split(place_of(predictor.folder, predictor.artefact.names[0]))
        if found.words is not None:
            # a run calls its words `tokens`, and rows of tokens are called so, too
            check_unseen_forms(record, {one.kind: one for one in map(RowSet.of, forms)}, name)
            forms = [*forms, rows, *word_forms(found.words.texts, inputs, own)]
        elif "input_ids" not in rows.column_names:
            forms = [*text_forms(rows, inputs, own, name), rows, *forms]
        known = {one.kind: one for one in map(RowSet.of, forms)}
        check_unseen_forms(record, known, name)
        return RowsToDecide.of(name, found, known, hash_rows(forms[0])[1], seed)

    return encoded


def word_forms(texts: Sequence[Sequence[str]], inputs: Inputs, own: Inputs) -> list[Dataset]:
    """The words of rows under each name that training may have known them by."""
    names = dict.fromkeys((OF_WORDS, *(inputs.text_columns or ()), *(own.text_columns or ())))
    return [Dataset.from_dict({name: texts}) for name in names]


def text_forms(rows: Dataset, inputs: Inputs, own: Inputs, name: str) -> list[Dataset]:
    """What the rows say without their labels and other columns, under each name that training may have known it by.

    A run calls its texts as its tasks do, a Trainer as its table did; the column of the label is no input, whatever
    its name, though a table that was recorded whole has it among its columns.
    """
    given, label = text_names(inputs, rows), inputs.label_column
    columns = [rows[column][:] for column in given]
    tables = [given, own.text_columns or given]
    if inputs.choices_columns:
        named = dict(zip(OF_CHOICES, (columns[0], choices_of(rows, inputs.choices_columns, name)), strict=True))
        forms = [Dataset.from_dict(named)]
        asked = {column: rows[column][:] for column in inputs.choices_columns}
    else:
        forms, asked = [Dataset.from_dict(dict(zip(OF_TEXTS, columns, strict=False)))], {}
    for names in tables:
        if len(names) == len(columns):
            table = dict(zip(names, columns, strict=True)) | asked
            forms.append(Dataset.from_dict(table))
            if label in rows.column_names and own.label_column and own.label_column not in table:
                forms.append(Dataset.from_dict({**table, own.label_column: rows[label][:]}))
    return forms


def check_unseen_forms(record: SplitRecord, known: Mapping[str, RowSet], name: str, purpose: str = PURPOSE) -> None:
    """Refuse rows that the adapter's record knows, in whatever form it knows rows."""
    forms = {*record.trained_on, *record.calibrated_on}
    for kind in sorted(forms & set(known)):
        seen = ({k: v for k, v in rows.items() if k == kind} for rows in (record.trained_on, record.calibrated_on))
        check_unseen(SplitRecord(*seen), known[kind], purpose)
    if forms and not forms & set(known):
        warnings.warn(
            f"The adapter knows the rows it was trained on as {', '.join(sorted(forms))}, and those of {name} are "
            f"{', '.join(sorted(known))}: that none of them was trained on cannot be checked.",
            UserWarning,
            stacklevel=4,
        )
