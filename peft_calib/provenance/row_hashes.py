"""64-bit hashes of a row's inputs that do not depend on how the row is stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from .row_tables import as_rows

#: Columns that are no input of the model.
LABELS = frozenset({"label", "labels", "label_ids", "target", "targets", "length"})
ROW_NUMBERS = frozenset({"idx", "id", "index", "row_id", "__index_level_0__"})
BATCH = 1000


def hash_rows(rows: Any) -> tuple[str, np.ndarray]:
    """The kind of rows (`"tokens"`, or the names of their columns) and a uint64 hash of the inputs of each, (N,).

    Padding under an attention mask does not count, nor do labels and row numbers.
    """
    rows = as_rows(rows)
    if len(rows) == 0:
        raise ValueError("There is no row.")
    # a transform that tokenises on the fly is left out: the stored row says what it is
    first = rows.with_format(None)[0] if hasattr(rows, "with_format") else rows[0]
    if not isinstance(first, Mapping):
        return "row", np.fromiter((_digest(_encoded(row)) for row in rows), np.uint64, len(rows))
    if "input_ids" in first:
        names = ["input_ids", *(["attention_mask"] if "attention_mask" in first else [])]
        digests = (_digest(_tokens(*values)) for values in _columns(rows, names))
        return "tokens", np.fromiter(digests, np.uint64, len(rows))
    names = sorted(str(name) for name in first if name not in LABELS | ROW_NUMBERS)
    if not names:
        raise ValueError(f"A row holds nothing that tells it from others, only {', '.join(map(str, first))}.")
    digests = (_digest(b"".join(_encoded(value) for value in values)) for values in _columns(rows, names))
    return "+".join(names), np.fromiter(digests, np.uint64, len(rows))


def _columns(rows: Any, names: list[str]) -> Iterator[tuple[Any, ...]]:
    """The named columns of each row, read in batches where the rows allow it."""
    if hasattr(rows, "select_columns") and hasattr(rows, "iter"):
        for batch in rows.select_columns(names).with_format(None).iter(BATCH):
            yield from zip(*(batch[name] for name in names), strict=True)
    else:
        for index in range(len(rows)):
            row = rows[index]
            yield tuple(row.get(name) for name in names)


def _tokens(input_ids: Any, attention_mask: Any = None) -> bytes:
    ids = np.asarray(_plain(input_ids), np.int64)
    if attention_mask is not None:
        ids = ids[np.asarray(_plain(attention_mask)).astype(bool)]
    return ids.tobytes()


def _plain(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value


def _digest(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def _encoded(value: Any) -> bytes:
    """One value as bytes: equal for equal content, whether list, array or tensor, in 32 or 64 bits."""
    value = _plain(value)
    if isinstance(value, str):
        return _framed(b"s", value.encode("utf-8", "surrogatepass"))
    if isinstance(value, bytes):
        return _framed(b"b", value)
    if value is None:
        return b"n"
    if isinstance(value, (date, time, timedelta, Decimal)):
        return _framed(b"t", str(value).encode())
    if isinstance(value, Mapping):
        return _framed(b"d", b"".join(_encoded(str(key)) + _encoded(value[key]) for key in sorted(value, key=str)))
    if isinstance(value, (list, tuple)):
        array = _as_numbers(value)
        return _framed(b"l", b"".join(map(_encoded, value))) if array is None else _array(array)
    if isinstance(value, (bool, int, float, np.ndarray, np.generic)):
        return _array(np.asarray(value))
    if hasattr(value, "tobytes") and hasattr(value, "mode"):  # a picture
        return _framed(b"p", f"{value.mode}{value.size}".encode() + value.tobytes())
    raise TypeError(
        f"A row holds a {type(value).__name__}, which cannot be hashed. Rows are made of text, numbers, dates, "
        "arrays, pictures, and lists or mappings of those."
    )


def _as_numbers(values: list | tuple) -> np.ndarray | None:
    try:
        array = np.asarray(values)
    except ValueError:  # ragged
        return None
    return array if array.dtype.kind in "iufb" else None


def _array(array: np.ndarray) -> bytes:
    if array.dtype.kind not in "iufb":
        return _framed(b"l", b"".join(_encoded(item) for item in array.tolist()))
    kind, dtype = (b"f", "<f4") if array.dtype.kind == "f" and array.size else (b"i", "<i8")
    return _framed(kind, str(array.shape).encode() + np.ascontiguousarray(array, dtype).tobytes())


def _framed(kind: bytes, content: bytes) -> bytes:
    return kind + len(content).to_bytes(8, "little") + content
