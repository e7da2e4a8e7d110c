"""`peft-calib predict`: a table of texts in, the same table with calibrated probabilities out."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset

from ..console import quiet
from ..files import replacing, write_atomically
from ..json_files import describe, without_nan
from ..predictor import Predictor, load
from ..predictor.inputs import encode
from ..predictor.kinds import KINDS
from ..predictor.table import added_columns, arrow_table, column_types, refuse_clash
from ..provenance.columns import MEND, without_missing
from .folder import RunFolder
from .loading import load_task
from .processes import processes
from .sources import READERS, FileFormat, read_splits, source_name

#: Of labels that an adapter does not know, how many are named.
SHOWN = 5


@dataclass(frozen=True)
class Predicted:
    """A table that was predicted; `without_value` rows lacked a text and were left out.

    `strange` has, of each row whose label the adapter does not know, what it says; such rows are predicted as any.
    """

    path: Path
    prediction: Any
    without_value: int = 0
    strange: Sequence[Sequence[str]] = ()

    def lines(self) -> list[str]:
        """What a user should know of it."""
        found = self.prediction
        told = self.summary["told"]
        draws = f"{found.num_samples} draws" if found.how != "mean" else "the mean adapter"
        lines = [f"{len(found)} rows by {draws}, {found.recalibration}: {told}"]
        if found.error_probability is not None:
            lines.append(f"{found.error_head}: {float(found.error_probability.mean()):.1%} errors expected")
        if self.answered is not None:
            lines.append(f"{self.answered} of {len(found)} rows are answered")
        if self.mean_set_size is not None:
            lines.append(f"a set holds {self.mean_set_size:.2f} classes on average")
        if found.decision:
            lines.append(found.decision)
        if found.num_cut:
            lines.append(f"{found.num_cut} row(s) are longer than what the adapter was trained on, and were cut")
        if self.strange:
            lines.append(
                f"{len(self.strange)} row(s) have a label that the adapter does not know ({self._strange_told()}); "
                "they are predicted all the same"
            )
        if self.without_value:
            lines.append(f"{self.without_value} row(s) without a text were left out")
        return [*lines, f"Written to {self.path}"]

    @property
    def strange_counts(self) -> dict[str, int]:
        """How many rows say what of themselves that the adapter does not know, the most frequent first."""
        return dict(Counter(word for words in self.strange for word in set(words)).most_common())

    def _strange_told(self) -> str:
        counts = self.strange_counts
        told = [f"{describe(word)} {count}" for word, count in list(counts.items())[:SHOWN]]
        return ", ".join([*told, *([f"{len(counts) - SHOWN} more"] if len(counts) > SHOWN else [])])

    @property
    def summary(self) -> dict[str, Any]:
        """What was predicted, in numbers and in words."""
        return next(kind for kind in KINDS.values() if kind.makes(self.prediction)).summary(self.prediction)

    @property
    def answered(self) -> int | None:
        """Rows that are answered; None where there is no rule that says so."""
        answered = getattr(self.prediction, "answered", None)
        return None if answered is None else int(answered.sum())

    @property
    def mean_set_size(self) -> float | None:
        """Classes in a prediction set; None where there is no rule that gives sets."""
        sets = getattr(self.prediction, "sets", None)
        return None if sets is None else float(sets.double().sum(-1).mean())

    def to_dict(self) -> dict[str, Any]:
        """What `peft-calib predict --json` prints."""
        found = self.prediction
        return {
            "output": str(self.path),
            "rows": len(found),
            "how": found.how,
            "num_samples": found.num_samples,
            "recalibration": found.recalibration,
            **{name: value for name, value in self.summary.items() if name != "told"},
            **({} if self.answered is None else {"rows_answered": self.answered}),
            **({} if self.mean_set_size is None else {"mean_set_size": self.mean_set_size}),
            "rows_cut": found.num_cut,
            "rows_without_text": self.without_value,
            "rows_with_unknown_label": len(self.strange),
            "unknown_labels": self.strange_counts,
        }


def predict_table(
    adapter: str | Path,
    data: Any,
    output: str | Path,
    *,
    how: str | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    subset: str | None = None,
    split: str | None = None,
    encoding: str | None = None,
    delimiter: str | None = None,
    drop_missing: bool = False,
    text_column: Sequence[str] | None = None,
    prefix: str = "",
    all_probabilities: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    batch_size: int | None = None,
    **loading: Any,
) -> Predicted:
    """Predict the rows of a table and write it with what was predicted behind its columns.

    Args:
        adapter: A run, an adapter's folder or a Hub id.
        data: The rows: a path, a Hub id or a table in memory; labels are not needed.
        output: A .csv, .tsv, .json, .jsonl, .ndjson or .parquet file.
        how: As for `Predictor.predict`.
        num_samples: Draws; as many as the temperature was fitted with if not given.
        seed: Key of the draws.
        subset: Configuration name of a Hub data set.
        split: Which split; `test` if not given and there are several.
        encoding: Of text files that are not UTF-8.
        delimiter: Of CSV files whose delimiter cannot be found from their rows; also of the output.
        drop_missing: Leave out rows without a text.
        text_column: Columns of the texts, where they are called otherwise than in training.
        prefix: Of the names of the added columns.
        all_probabilities: Add the probability of every class, too.
        overwrite: Replace an output that is there.
        progress: Show a bar.
        batch_size: Rows of a forward.
        loading: Further arguments of `peft_calib.load`: `base_model`, `label_tokens`, `max_length`, ...

    Returns:
        Path and prediction.

    Raises:
        FileExistsError: If the output is there.
        ValueError: For an output of another type, a column that has one of the added names, rows without a text, or
            for what `peft_calib.load` refuses.
    """
    out = _checked_output(Path(output), overwrite)
    name, form = source_name(data), FileFormat(encoding, delimiter)
    rows = chosen_split(read_splits(data, subset, form), split, name)
    with quiet():
        predictor = loaded_predictor(adapter, loading)
        artefact, inputs = predictor.artefact, predictor.artefact.inputs
        if text_column:
            inputs = replace(inputs, text_columns=tuple(text_column))
        added = predictor.added_names(prefix, all_probabilities, how, num_samples, seed)
        refuse_clash(rows.column_names, added, name, "--prefix, such as --prefix model_")
        dropped = 0
        if drop_missing:
            rows, dropped = without_missing(rows, [*(inputs.text_columns or ("text",)), *inputs.choices_columns])
        encoded = encode(rows, replace(artefact, inputs=inputs), predictor.tokenizer, name, MEND)
        found = predictor.predict_encoded(encoded, num_samples, how, seed, batch_size=batch_size, progress=progress)
    if processes().is_main_process:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_table(out, rows, added_columns(found, added), form.delimiter, column_types(found, added))
    processes().wait_for_everyone()
    return Predicted(out, found, dropped, predictor.kind.strange(rows, inputs, predictor.label_names))


def write_table(
    path: Path, rows: Dataset, added: dict[str, list], delimiter: str | None = None, types: Any = None
) -> None:
    """Write a table with further columns behind its own, in the format that the name of the file says.

    Args:
        path: The file.
        rows: The table.
        added: The further columns.
        delimiter: Of a text file.
        types: Arrow types of those added columns whose values do not say them.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        with replacing(path) as partial:
            pq.write_table(arrow_table(rows, added, types), partial)
        return
    columns = {**{name: rows[name][:] for name in rows.column_names}, **added}
    lines = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    if READERS[suffix] is not None:
        stream = io.StringIO()
        writer = csv.writer(stream, delimiter=delimiter or READERS[suffix] or ",", lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_field(value) for value in line.values()] for line in lines)
        write_atomically(path, stream.getvalue())
        return
    texts = [json.dumps(without_nan(line), ensure_ascii=False, default=str, allow_nan=False) for line in lines]
    if suffix == ".json":
        write_atomically(path, "[\n" + ",\n".join(texts) + "\n]\n")
    else:
        write_atomically(path, "".join(f"{text}\n" for text in texts))


def _field(value: Any) -> Any:
    """A value in a CSV file: nothing as nothing, lists and mappings as JSON."""
    if isinstance(value, (list, dict, bool)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return value


def _checked_output(path: Path, overwrite: bool) -> Path:
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{path} is not of a known type: name a file that ends in one of {', '.join(READERS)}")
    if path.is_dir() or (path.exists() and not overwrite):
        raise FileExistsError(f"{path} exists; name another file, or pass --overwrite to replace it")
    return path


def chosen_split(splits: Any, split: str | None, source: str) -> Dataset:
    """The split that was named, the only one, or `test`."""
    name = split or next(iter(splits)) if len(splits) == 1 else split or "test"
    if name not in splits:
        raise ValueError(f"{source} has no split {name!r}; it has {', '.join(splits)}: name one with --split")
    return splits[name]


def loaded_predictor(adapter: str | Path, loading: dict[str, Any]) -> Predictor:
    """A predictor of a run, of a folder or of the Hub."""
    folder = RunFolder(Path(adapter).absolute())
    if folder.finished.is_file():
        load_task(folder)  # a method from outside is known to PEFT once it is imported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no temperature stands in the result's line
        return load(adapter, **{**loading, "label_tokens": loading.get("label_tokens") or None})
