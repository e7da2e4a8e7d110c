"""Rows from anywhere: a CSV, JSON lines or Parquet file, a folder of such files, or a data set of the Hub."""

from __future__ import annotations

from pathlib import Path

from datasets import DatasetDict, load_dataset

__all__ = ["read_splits"]

READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def read_splits(source: str | Path, subset: str | None = None) -> DatasetDict:
    """Read every split of a source.

    Args:
        source: path of a .csv, .tsv, .json, .jsonl or .parquet file (also .gz of those; its rows are the split
            `train`), of a folder of such files, or the id of a Hub data set.
        subset: configuration name of a Hub data set, such as `"cola"` of `"nyu-mll/glue"`.

    Returns:
        The splits by name.

    Raises:
        FileNotFoundError: if the path of a file does not exist.
        ValueError: if a file has an unknown type or holds nothing.
    """
    path = Path(source)
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    if path.is_dir() or (suffix not in READERS and not path.exists()):
        return load_dataset(str(source), subset)
    if not path.exists():
        raise FileNotFoundError(f"there is no data file {source}")
    if suffix not in READERS:
        raise ValueError(f"{source} is not of a known type: expected one of {', '.join(READERS)} (or .gz of those)")
    if path.stat().st_size == 0:
        raise ValueError(f"{source} is empty: it holds no row")
    options = {"sep": "\t"} if suffix == ".tsv" else {}
    try:
        return load_dataset(READERS[suffix], data_files=str(path), **options)
    except ValueError as error:
        if "corresponds to no data" not in str(error):  # what datasets says of a header without rows
            raise
        raise ValueError(f"{source} is empty: it holds no row") from error
