"""Any number of rows, predicted into a folder of shards that are each there whole; continued after a kill."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from datasets import Dataset, Features, Value
from datasets.table import InMemoryTable
from tqdm.auto import tqdm

from ..artefact import place_of
from ..base_models import base_fingerprint
from ..files import replacing, write_atomically
from ..identity import folder_digest
from ..json_files import Fields, parse_json, read_json
from ..provenance.origins import as_dataset
from ..whole_numbers import check_whole
from .inputs import EMPTY, as_table, encode
from .predictor import Predictor
from .table import added_columns, arrow_table, column_types, refuse_clash

#: The manifest; says how was predicted, and at the end which rows lie where.
MANIFEST = "predictions.json"
FORMAT_VERSION = 1
#: Name of a shard, and where in it stands which rows it holds.
SHARD, _NUMBER = "shard-{:06d}.parquet", re.compile(r"shard-(\d{6,})\.parquet")
METADATA = b"peft_calib"
#: A process that predicts its shards by itself, whatever others there are.
ALONE: Any = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True)


def predict_to(
    folder: str | Path,
    predictor: Predictor,
    rows: Any,
    shard_rows: int = 8192,
    *,
    num_samples: int | None = None,
    how: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    prefix: str = "",
    all_probabilities: bool = False,
    accelerator: Any = None,
    progress: bool = True,
) -> Path:
    """Predict any number of rows into a folder of Parquet files, which hold their columns and what was predicted.

    Rows are cut into shards of `shard_rows`, in their order. Each is written whole or not at all, and one that is
    there is not made again, so that the same call goes on after a kill. Under `accelerate launch` each process takes
    every n-th shard. A shard's bytes depend neither on the number of processes nor on interruptions, and no more than
    one shard is in memory. The added columns are those of `peft-calib predict`.

    Args:
        folder: Where to; new, empty, or begun by the same call.
        predictor: Of `peft_calib.load`.
        rows: As for `Predictor.predict`, or a stream of texts, pairs or rows: a `datasets.IterableDataset`, a
            generator. A stream must give the same rows in every process and after an interruption.
        shard_rows: Rows of a shard.
        num_samples: As for `Predictor.predict`.
        how: As for `Predictor.predict`.
        seed: As for `Predictor.predict`.
        batch_size: As for `Predictor.predict`.
        prefix: Of the names of the added columns.
        all_probabilities: Add the probability of every class, too.
        accelerator: The running `Accelerator`; a `PartialState` when `None`.
        progress: Show a bar of the shards, on the main process.

    Returns:
        The folder, with a manifest in `predictions.json`: adapter, seed, draws, temperature, and the rows of each
        shard. `datasets.load_dataset("parquet", data_files=f"{folder}/*.parquet")` reads it.

    Raises:
        FileExistsError: If the folder holds something else.
        ValueError: If it was begun in another way, by another adapter or with other rows; if there is no row; or for
            what `Predictor.predict` refuses.

    Example:
        >>> predictor = peft_calib.load("runs/b")  # doctest: +SKIP
        >>> predict_to("predicted", predictor, stream, shard_rows=100_000)  # doctest: +SKIP
    """
    # the manifest and the shards hold plain numbers
    shard_rows, seed = check_whole(shard_rows, "shard_rows", 1), check_whole(seed, "seed")
    num_samples = None if num_samples is None else check_whole(num_samples, "num_samples", 1)
    batch_size = None if batch_size is None else check_whole(batch_size, "batch_size", 1)
    state = PartialState() if accelerator is None else accelerator
    place = Path(folder)
    way = predictor.way_of(how, num_samples)
    names = predictor.added_names(prefix, all_probabilities, how, num_samples, seed)
    made = {
        "num_samples": predictor.num_samples_for(way) if num_samples is None else num_samples,
        "how": way,
        "seed": seed,
        "batch_size": predictor.batch_size_for(batch_size),
    }
    settings = {"shard_rows": shard_rows, "added": names, **made, **_about(predictor, way)}
    cut = _cut(rows, shard_rows, predictor.artefact.inputs.text_columns)
    parts = iter(cut.parts)
    first = next(parts, None)
    if first is None:
        raise ValueError(EMPTY)
    _begin(place, settings, state)
    shards = _Shards(place, predictor, made, names)
    done = []
    hidden = not (progress and state.is_main_process)
    for number, part in enumerate(tqdm(chain([first], parts), total=cut.total, desc="shards", disable=hidden)):
        if number % state.num_processes == state.process_index:
            shards.make(number, number * shard_rows, part)
        done.append(len(part))
    state.wait_for_everyone()
    if state.is_main_process:
        shards.finish(settings, done)
    state.wait_for_everyone()
    return place


def _about(predictor: Predictor, how: str) -> dict[str, Any]:
    """What decides over the answers besides the call."""
    artefact = predictor.artefact
    method, told = predictor.recalibration(how)
    return {
        "adapters": {name: folder_digest(place_of(predictor.folder, name)) for name in artefact.names},
        "temperature": getattr(method, "temperature", None),
        "recalibration": told,
        "parameters": None if method is None else method.state()["parameters"],
        "error_head": predictor.error_head.digest,
        "decisions": predictor.decisions.digest,
        "base": base_fingerprint(predictor.model),
        "label_names": list(predictor.label_names),
        "label_tokens": artefact.label_tokens,
        "inputs": {name: value for name, value in asdict(artefact.inputs).items() if name != "batch_size"},
    }


def _begin(place: Path, settings: dict[str, Any], state: Any) -> None:
    """Write the manifest of a new folder, or hold that of one that was begun against the call."""
    found = place / MANIFEST
    if found.is_file():
        before = read_json(found, "Name another folder").content
        plain = json.loads(json.dumps(settings))
        differing = [name for name, value in plain.items() if before.get(name) != value]
        if differing or before.get("format_version") != FORMAT_VERSION:
            listed = "; ".join(f"{name}: {before.get(name)!r} there, {plain[name]!r} now" for name in differing)
            raise ValueError(f"{place} was begun in another way ({listed}). Name another folder, or remove it.")
    elif place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise FileExistsError(f"{place} holds something that is no folder of predictions; name another one.")
    state.wait_for_everyone()  # every process has looked before one writes
    if state.is_main_process and not found.is_file():
        place.mkdir(parents=True, exist_ok=True)
        _write(found, {**settings, "rows": None, "shards": None})
    state.wait_for_everyone()


def _write(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps({"format_version": FORMAT_VERSION, **content}, indent=1, allow_nan=False) + "\n")


@dataclass(frozen=True)
class _Shards:
    """The shards of one folder."""

    place: Path
    predictor: Predictor
    made: Mapping[str, Any]
    names: Sequence[str]

    def make(self, number: int, first: int, rows: Dataset) -> None:
        """Predict and write a shard, unless it is there."""
        path, digest = self.place / SHARD.format(number), _digest(rows)
        if path.is_file():
            if _said(path).text("digest") != digest:
                raise ValueError(
                    f"{path} was made of other rows than those given now (from row {first} on). Name another folder."
                )
            return
        predictor, source = self.predictor, f"rows {first} to {first + len(rows) - 1}"
        refuse_clash(rows.column_names, self.names, source, "prefix=, such as prefix='model_'")
        encoded = encode(rows, predictor.artefact, predictor.tokenizer, source)
        found = predictor.predict_encoded(encoded, **self.made, accelerator=ALONE)
        table = arrow_table(rows, added_columns(found, self.names), column_types(found, self.names))
        told = {"first": first, "rows": len(rows), "cut": found.num_cut, "digest": digest}
        metadata = {**(table.schema.metadata or {}), METADATA: json.dumps(told)}
        with replacing(path) as partial:
            pq.write_table(table.replace_schema_metadata(metadata), partial)

    def finish(self, settings: dict[str, Any], counts: Sequence[int]) -> None:
        """Write into the manifest which rows lie where; say what was cut."""
        paths = [self.place / SHARD.format(number) for number in range(len(counts))]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise ValueError(f"{self.place} lacks {', '.join(missing[:4])}; run the same call again.")
        beyond = [
            p.name for p in self.place.iterdir() if (m := _NUMBER.fullmatch(p.name)) and int(m[1]) >= len(counts)
        ]
        if beyond:
            raise ValueError(f"{self.place} holds shards of more rows than were given ({beyond[0]}).")
        said = [_said(path) for path in paths]
        listed = [
            {"file": path.name, "first": fields.integer("first"), "rows": fields.integer("rows")}
            for path, fields in zip(paths, said, strict=True)
        ]
        cut = sum(fields.integer("cut") for fields in said)
        _write(self.place / MANIFEST, {**settings, "rows": sum(counts), "cut": cut, "shards": listed})
        if cut:
            warnings.warn(
                f"{cut} of {sum(counts)} texts are longer than {settings['inputs']['max_length']} tokens and were "
                "cut, as in training.",
                UserWarning,
                stacklevel=3,
            )


def _said(path: Path) -> Fields:
    """What a shard says of itself."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except pa.ArrowException as error:
        raise ValueError(f"{path} is damaged ({error}). Remove it, and run the same call again.") from error
    mend = "Remove it, and run the same call again"
    return parse_json(metadata.get(METADATA, b"{}").decode(), str(path), mend)


def _digest(rows: Dataset) -> str:
    """One text for the contents of rows."""
    content = {name: rows[name][:] for name in rows.column_names}
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class _Cut:
    """Rows in parts of equal number; how many parts, where that is known."""

    parts: Iterable[Dataset]
    total: int | None


def _cut(rows: Any, size: int, text_columns: tuple[str, ...] | None) -> _Cut:
    """Rows of any kind as data sets of `size` rows, made as they are asked for."""
    streams = hasattr(rows, "__next__") or not hasattr(rows, "__len__")
    table = None if streams else as_table(rows)
    if table is None:
        total = None if streams else -(-len(rows) // size)
        return _Cut(_collected(rows, size, text_columns, getattr(rows, "features", None)), total)
    starts = range(0, len(table), size)
    return _Cut((table.select(range(a, min(a + size, len(table)))) for a in starts), len(starts))


def _collected(
    rows: Iterable[Any], size: int, text_columns: tuple[str, ...] | None, features: Features | None
) -> Iterator[Dataset]:
    """Texts, pairs or rows out of a stream, `size` at a time."""
    entries = (_as_row(row, number, text_columns) for number, row in enumerate(rows))
    first: Dataset | None = None
    for number, part in enumerate(iter(lambda: list(islice(entries, size)), [])):
        if features is not None:
            yield Dataset.from_list([dict(row) for row in part], features=features)
        elif first is None:
            first = _first(part)
            yield first
        else:
            yield _alike(part, first, number)


def _as_row(row: Any, number: int, text_columns: tuple[str, ...] | None) -> Mapping[str, Any]:
    if isinstance(row, Mapping):
        return row
    texts = [row] if isinstance(row, str) else row
    names = text_columns or ("text", "text_pair")[: len(texts) if isinstance(texts, (list, tuple)) else 1]
    fits = isinstance(texts, (list, tuple)) and len(texts) == len(names) and all(isinstance(t, str) for t in texts)
    if not fits:
        raise TypeError(
            f"Row {number} is {str(row)[:60]!r} ({type(row).__name__}); a row with columns, or {len(names)} text(s) "
            f"({', '.join(names)}), is expected."
        )
    return dict(zip(names, texts, strict=True))


def _first(part: list[Mapping[str, Any]]) -> Dataset:
    """The first rows of a stream that does not say its types; a column without a value is one of texts."""
    rows = _joined(part)
    empty = {name: Value("string") for name, kind in rows.features.items() if kind == Value("null")}
    return rows.cast(Features({**rows.features, **empty})) if empty else rows


def _alike(part: list[Mapping[str, Any]], first: Dataset, number: int) -> Dataset:
    """Later rows in the types of the first ones: the files of a folder are read as one table."""
    rows, schema = _joined(part), first.features.arrow_schema
    mend = "Give a datasets.IterableDataset whose features= say the columns and their types"
    added = [name for name in rows.column_names if name not in schema.names]
    if added:
        raise ValueError(f"Shard {number} has a column {added[0]!r}, which the first shard has not. {mend}.")
    if rows.features == first.features:
        return rows
    columns = []
    for field in schema:
        found = rows.data.column(field.name) if field.name in rows.column_names else pa.nulls(len(rows))
        try:
            pa.array(found.to_pylist(), field.type)  # refuses numbers where texts stood, which a cast writes as texts
            columns.append(found.cast(field.type))  # refuses fractions where whole numbers stood
        except (pa.ArrowException, TypeError) as error:
            told = rows.features[field.name].dtype if hasattr(rows.features[field.name], "dtype") else "other values"
            raise ValueError(
                f"The column {field.name!r} is {field.type} in the first shard and {told} in shard {number} "
                f"({str(error).partition(chr(10))[0]}). {mend}."
            ) from error
    return Dataset(InMemoryTable(pa.Table.from_arrays(columns, schema=schema)))


def _joined(part: list[Mapping[str, Any]]) -> Dataset:
    names = list(dict.fromkeys(name for row in part for name in row))
    return as_dataset({name: [row.get(name) for row in part] for name in names})
