"""Columns of a user's table, checked and brought to one form."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from .origins import at, is_missing, select_rows

#: What a row without a value needs.
FILL_IN = "fill it in, or leave such rows out"
#: The same for who uses the commands.
MEND = f"{FILL_IN} with --drop-missing"


def check_column(rows: Dataset, column: str, what: str, source: str) -> None:
    """Raise `ValueError` if the rows have no such column; the message names those they have."""
    if column in rows.column_names:
        return
    hint = ""
    if "messages" in rows.column_names and what == "text":
        hint = (
            ". A chat must be made a text first: write tokenizer.apply_chat_template(messages, tokenize=False) to a "
            "column of its own, or train with TRL's SFTTrainer, which takes our configurations"
        )
    elif {"prompt", "completion"} <= set(rows.column_names) and what == "text":
        hint = (
            ". Prompt and completion must be made one text first: write them, joined, to a column of its own, or "
            "train with TRL's SFTTrainer, which takes our configurations"
        )
    elif len(rows.column_names) == 1 and re.search(r"[^\w\s'-]", rows.column_names[0]):
        hint = ". If that is several columns, name what stands between them with --delimiter"
    raise ValueError(
        f"{source} has no column {column!r}; it has {', '.join(rows.column_names)}: say which one holds the {what}"
        + hint
    )


def texts_of(rows: Dataset, column: str, what: str, source: str, mend: str = MEND) -> list[str]:
    """The texts of a column; whole numbers are read as their digits, and `mend` is said where there is nothing."""
    check_column(rows, column, what, source)
    values = rows[column][:]
    texts = []
    for row, value in enumerate(values):
        if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
            value = str(value)
        if is_missing(value):
            raise ValueError(f"{at(source, rows, row)}: row {row} has no {what} ({value!r}); {mend}")
        if isinstance(value, (list, dict)):
            chat = isinstance(value, list) and value and isinstance(value[0], dict) and "content" in value[0]
            mend = "make a chat one text with tokenizer.apply_chat_template" if chat else "join it to one text"
            raise ValueError(
                f"{at(source, rows, row)}: row {row} has a {type(value).__name__} for its {what} "
                f"({str(value)[:60]}); a text is expected: {mend}, in a column of its own"
            )
        if not isinstance(value, str):
            raise ValueError(
                f"{at(source, rows, row)}: row {row} has no {what} but the {type(value).__name__} {value!r}; write it "
                "as a text"
            )
        texts.append(value)
    return texts


def without_missing(rows: Dataset, columns: Sequence[str]) -> tuple[Dataset, int]:
    """Leave out the rows that lack a value in one of the columns."""
    present = [column for column in columns if column in rows.column_names]
    missing = np.zeros(len(rows), bool)
    for column in present:
        missing |= np.fromiter(map(is_missing, rows[column][:]), bool, len(rows))
    return (select_rows(rows, np.flatnonzero(~missing)) if missing.any() else rows), int(missing.sum())
