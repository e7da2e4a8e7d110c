"""Rows from anywhere: a table in a file or in memory, a folder of such files, or a data set of the Hub."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_from_disk
from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

from ..provenance.origins import ATTRIBUTE, Origin, as_dataset, frame_columns
from .embedded import embedded_rows
from .text_files import DELIMITERS, decoded, read_csv, read_json

#: What is read here, and the usual delimiter of those that have one.
READERS = {".csv": ",", ".tsv": "\t", ".json": None, ".jsonl": None, ".ndjson": None, ".parquet": None}
#: What `save_to_disk` leaves in a folder.
SAVED = ("dataset_dict.json", "state.json")


@dataclass(frozen=True)
class FileFormat:
    """What a text file does not say of itself: its encoding, and a character (or its name) between fields."""

    encoding: str | None = None
    delimiter: str | None = None

    def __post_init__(self) -> None:
        if self.delimiter is None:
            return
        names = {name: mark for mark, name in DELIMITERS.items()} | {"\\t": "\t"}
        mark = names.get(self.delimiter.lower(), self.delimiter)
        if len(mark) != 1 or mark in '"\r\n':
            raise ValueError(f"delimiter is one character, or one of {', '.join(names)}; got {self.delimiter!r}")
        object.__setattr__(self, "delimiter", mark)


def read_splits(source: Any, subset: str | None = None, form: FileFormat | None = None) -> DatasetDict:
    """Every split of a file, a folder of files, a Hub data set, `"embedded:..."` or a table in memory."""
    form = form or FileFormat()
    if not isinstance(source, (str, Path)):
        _refuse_subset(source, subset)
        return _in_memory(source)
    if str(source).startswith("embedded:"):
        _refuse_subset(source, subset)
        return DatasetDict(train=embedded_rows(str(source)))
    path = Path(source)
    suffix = _suffix(path)
    if path.is_dir():
        return _folder(path, form) if subset is None else _of_hub(str(source), subset)
    if suffix not in READERS and not path.exists():
        return _of_hub(str(source), subset)
    if not path.exists():
        raise FileNotFoundError(f"there is no data file {source}")
    if suffix not in READERS:
        raise ValueError(f"{source} is not of a known type: expected one of {', '.join(READERS)} (or .gz of those)")
    _refuse_subset(source, subset)
    return DatasetDict(train=_file(path, form))


def _refuse_subset(source: Any, subset: str | None) -> None:
    if subset is not None:
        raise ValueError(
            f"{source_name(source)} has no subsets, so there is no {subset!r} in it: --subset names a configuration "
            "of a Hub data set; leave it out"
        )


def source_name(source: Any) -> str:
    """How messages and reports call a source."""
    return str(source) if isinstance(source, (str, Path)) else f"the {type(source).__name__} given"


def _of_hub(name: str, subset: str | None) -> DatasetDict:
    """A data set of the Hub, or of a folder that is laid out like one."""
    try:
        return load_dataset(name, subset)
    except OSError as error:  # also what `datasets` and the Hub's client raise
        told = str(error).strip().partition("\n")[0]
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(f"{name} is no file or folder here, and cannot be read from the Hub: {told}") from error


def _in_memory(source: Any) -> DatasetDict:
    if isinstance(source, DatasetDict):
        return source
    if isinstance(source, Dataset):
        return DatasetDict(train=source)
    columns = frame_columns(source)
    if columns is None:
        raise TypeError(
            f"rows cannot be read from a {type(source).__name__}; give a path, a Hub id, a data frame, a "
            "datasets.Dataset or a list of rows"
        )
    rows = as_dataset(columns)
    if not len(rows):
        raise ValueError(f"{source_name(source)} is empty: it holds no row")
    return DatasetDict(train=rows)


def _folder(path: Path, form: FileFormat) -> DatasetDict:
    """The files of a folder, in the splits that their names say, by the rules of `datasets`."""
    if any((path / name).is_file() for name in SAVED):
        found = load_from_disk(str(path))
        return found if isinstance(found, DatasetDict) else DatasetDict(train=found)
    try:
        files = DataFilesDict.from_patterns(get_data_patterns(str(path)), base_path=str(path))
    except (EmptyDatasetError, FileNotFoundError) as error:
        raise ValueError(f"{path} holds no data file: expected are {', '.join(READERS)} (or .gz of those)") from error
    splits: dict[str, list[Path]] = {}
    for split, names in files.items():
        readable = [Path(name) for name in names if _suffix(Path(name)) in READERS]
        if readable:
            splits[str(split)] = readable
    if not splits:
        return load_dataset(str(path))  # pictures, arrow files, ...: what datasets makes of them
    return DatasetDict({split: _joined([_file(name, form) for name in names]) for split, names in splits.items()})


def _joined(parts: list[Dataset]) -> Dataset:
    """The rows of several files, which still know their lines."""
    if len(parts) == 1:
        return parts[0]
    rows = concatenate_datasets(parts)
    origins = [getattr(part, ATTRIBUTE) for part in parts]
    setattr(rows, ATTRIBUTE, Origin.of_parts([(origin.files[0], origin.lines) for origin in origins]))
    return rows


def _file(path: Path, form: FileFormat) -> Dataset:
    """The rows of one file."""
    source, suffix = str(path), _suffix(path)
    content = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError) as error:
            raise ValueError(f"{path} cannot be unpacked: {error}") from error
    if not content.strip():
        raise ValueError(f"{source} is empty: it holds no row")
    if suffix == ".parquet":
        rows = _parquet(content, source)
    else:
        text = decoded(content, source, form.encoding)
        usual = READERS[suffix]
        if usual is None:
            columns, lines = read_json(text, source, lines_of_json=suffix != ".json")
        else:
            columns, lines = read_csv(text, source, form.delimiter, usual)
        rows = as_dataset(columns, Origin.of_parts([(source, lines)]))
    if not len(rows):
        raise ValueError(f"{source} is empty: it holds no row")
    return rows


def _parquet(content: bytes, source: str) -> Dataset:
    try:
        table = pq.read_table(pa.BufferReader(content))
    except pa.ArrowException as error:
        raise ValueError(f"{source} is no Parquet file, or a damaged one: {error}") from error
    for position, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):  # categories of pandas
            column = table.column(position).cast(field.type.value_type)
            table = table.set_column(position, field.name, column)
    rows = Dataset(table)
    setattr(rows, ATTRIBUTE, Origin.of_parts([(source, [0] * len(rows))]))
    return rows


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return suffixes[-1] if suffixes else ""
