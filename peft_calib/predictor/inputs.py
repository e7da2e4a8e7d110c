"""Texts, pairs and rows of a table as what a model reads, cut as in training; what is cut is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from string import ascii_uppercase
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..artefact import Artefact, Inputs
from ..prediction.heads import check_label_tokens
from ..provenance.columns import FILL_IN, check_column, texts_of
from ..provenance.origins import as_dataset, at, frame_columns
from .encoded import EMPTY, Encoded
from .kinds import KINDS
from .kinds.classes import LABELS
from .words import encode_words

#: Names under which a table that says nothing else has its texts.
TEXTS = ("text", "sentence", "prompt")


def encode(
    rows: Any, artefact: Artefact, tokenizer: PreTrainedTokenizerBase, source: str = "", mend: str = FILL_IN
) -> Encoded:
    """What a user asks about, as inputs.

    Args:
        rows: A list of texts or of pairs of texts, a `datasets.Dataset`, or a table that can be made one; for a tagger
            lists of words.
        artefact: How rows become inputs, the classes that labels are read as, and whether tokens stand for them.
        tokenizer: Of the base model.
        source: How messages call the rows.
        mend: What messages say of a row without a text.

    Raises:
        TypeError: If it is none of these, or a text is no text.
        ValueError: If there is no row, a row lacks a text, or the rows are pairs and should be texts, or the reverse.
    """
    table, inputs, classes = as_table(rows), artefact.inputs, artefact.classes or ()
    if KINDS[artefact.kind].of_words:
        return encode_words(rows if table is None else table, artefact, tokenizer, source, mend)
    if table is None:
        columns = _listed(rows, inputs)
        labels = None
    elif not len(table):
        raise ValueError(EMPTY)
    elif "input_ids" in table.column_names:
        names = [name for name in table.column_names if name not in LABELS]
        return Encoded({name: table[name][:] for name in names}, KINDS[artefact.kind].targets(table, inputs, classes))
    else:
        columns = _of_table(table, inputs, source or f"the {type(rows).__name__} given", mend)
        labels = KINDS[artefact.kind].targets(table, inputs, classes)
    # where a token answers, the end of a text is where the question is put
    tokenized = tokenized_texts if artefact.label_tokens is None else tokenized_prompts
    found = tokenized(columns, tokenizer, inputs.max_length)
    none = next((row for row, ids in enumerate(found["input_ids"]) if not ids), None)
    if none is not None:
        raise ValueError(f"row {none} holds no token ({columns[0][none]!r}), so nothing can be said about it.")
    return Encoded(found, labels, _count_cut(found["input_ids"], columns, inputs, tokenizer))


def tokenized_texts(
    columns: Sequence[list[str]], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> dict[str, list]:
    """Inputs of texts, or of pairs given as two columns; what is too long loses its end."""
    return dict(tokenizer(*columns, truncation=True, max_length=max_length))


def tokenized_prompts(
    columns: Sequence[list[str]], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> dict[str, list]:
    """Inputs of prompts without an end mark; a long one keeps its end, where the question is put."""
    side, tokenizer.truncation_side = tokenizer.truncation_side, "left"
    try:
        ids = tokenizer(*columns, truncation=True, max_length=max_length)["input_ids"]
    finally:
        tokenizer.truncation_side = side
    ids = [row[:-1] if row and row[-1] == tokenizer.eos_token_id else row for row in ids]
    return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}


def letter_tokens(letters: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token of each letter, with a leading space where the tokenizer has that as one token."""
    try:
        return check_label_tokens([f" {letter}" for letter in letters], tokenizer, None)
    except ValueError:
        return check_label_tokens(list(letters), tokenizer, None)


def choice_prompt(prompt: str, question: str, choices: Sequence[str]) -> str:
    """The text that a model is asked to continue with a letter."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False)]
    return prompt.format(question=question, choices="\n".join(lines))


def choices_of(rows: Dataset, columns: Sequence[str], source: str) -> list[list[str]]:
    """Choices of each row: a column of lists, a column of `{"text": [...]}`, or one column a choice."""
    for column in columns:
        check_column(rows, column, "choices", source)
    if len(columns) > 1:
        found: list[Any] = [list(row) for row in zip(*(rows[column][:] for column in columns), strict=True)]
    else:
        found = rows[columns[0]][:]
        found = [row.get("text") if isinstance(row, dict) else row for row in found]
    for row, choices in enumerate(found):
        filled = isinstance(choices, list) and all(isinstance(text, str) and text.strip() for text in choices)
        if not filled or len(choices) < 2:
            raise ValueError(
                f"{at(source, rows, row)}: row {row} has the choices {choices!r}; a list of at least two texts is "
                "expected (or name one column a choice: choices_columns, --choices-column each)"
            )
    return found


def as_table(rows: Any) -> Dataset | None:
    """The rows as a data set; None for what is to be read as a list of texts."""
    if isinstance(rows, (str, bytes)):
        raise TypeError(f"A list of texts is expected, got one text: {rows[:60]!r}. Write predict([text]).")
    if isinstance(rows, IterableDataset) or hasattr(rows, "__next__"):
        raise TypeError(
            f"A {type(rows).__name__} is a stream, and predict gives one answer for all rows. Give a list, or write "
            "the answers to a folder with peft_calib.predict_to(folder, predictor, rows)."
        )
    if isinstance(rows, Dataset):
        return rows
    if isinstance(rows, (list, tuple)) and (not rows or not all(hasattr(row, "keys") for row in rows)):
        return None
    columns = frame_columns(rows)
    return None if columns is None else as_dataset(columns)


def _listed(rows: Any, inputs: Inputs) -> list[list[str]]:
    """The columns of a list of texts, or of pairs."""
    try:
        entries = list(rows)
    except TypeError:
        raise TypeError(
            f"A list of texts, of pairs of texts, or a data set is expected, got {type(rows).__name__}."
        ) from None
    if not entries:
        raise ValueError(EMPTY)
    pairs = isinstance(entries[0], (tuple, list))
    for row, entry in enumerate(entries):
        parts = entry if pairs and isinstance(entry, (tuple, list)) and len(entry) == 2 else [entry]
        if len(parts) != 1 + pairs or not all(isinstance(part, str) for part in parts):
            expected = "a pair of texts, as its first" if pairs else "a text"
            raise TypeError(f"Row {row} is {str(entry)[:60]!r} ({type(entry).__name__}); {expected} is expected.")
    if inputs.text_columns is not None and pairs != (len(inputs.text_columns) == 2):
        told = ("pairs of texts", "single texts")
        raise ValueError(
            f"The adapter was trained on {told[len(inputs.text_columns) != 2]} "
            f"({', '.join(inputs.text_columns)}), and these are {told[not pairs]}."
        )
    return [list(column) for column in zip(*entries, strict=True)] if pairs else [entries]


def text_names(inputs: Inputs, table: Dataset) -> tuple[str, ...]:
    """The columns of a table that hold the texts: those of the inputs, or one of the usual names."""
    if inputs.text_columns is not None:
        return tuple(inputs.text_columns)
    return tuple(name for name in TEXTS if name in table.column_names)[:1] or TEXTS[:1]


def _of_table(table: Dataset, inputs: Inputs, source: str, mend: str) -> list[list[str]]:
    """The text columns of a table; of a multiple-choice table its prompts."""
    names = text_names(inputs, table)
    what = "question" if inputs.choices_columns else "text"
    columns = [texts_of(table, name, what, source, mend) for name in names]
    if not inputs.choices_columns:
        return columns
    assert inputs.prompt is not None
    choices = choices_of(table, inputs.choices_columns, source)
    return [[choice_prompt(inputs.prompt, *row) for row in zip(columns[0], choices, strict=True)]]


def _count_cut(
    ids: list[list[int]], columns: list[list[str]], inputs: Inputs, tokenizer: PreTrainedTokenizerBase
) -> int:
    """How many rows are longer than what is read: those that fill it are looked at once more, whole."""
    if inputs.max_length is None:
        return 0
    full = [row for row, tokens in enumerate(ids) if len(tokens) >= inputs.max_length - 1]
    if not full:
        return 0
    again = [[column[row] for row in full] for column in columns]
    whole = tokenizer(*again, truncation=False, verbose=False)["input_ids"]
    return sum(len(tokens) > inputs.max_length for tokens in whole)


def with_limits(inputs: Inputs, max_length: int | None, batch_size: int | None) -> Inputs:
    """The same with what a caller or the base model says where it says something."""
    changed = {"max_length": max_length, "batch_size": batch_size}
    return replace(inputs, **{name: value for name, value in changed.items() if value is not None})
