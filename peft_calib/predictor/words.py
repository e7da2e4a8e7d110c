"""Rows of words as a tagger reads them: the first token of each word answers for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..artefact import Artefact, Inputs
from ..provenance.columns import FILL_IN, check_column
from ..provenance.origins import at
from .encoded import EMPTY, Encoded, Words
from .kinds import KINDS

#: Names under which a table that says nothing else has its words.
WORDS = ("tokens", "words")
#: Label of a token that answers for no word.
NONE = -100


def encode_words(
    given: Any, artefact: Artefact, tokenizer: PreTrainedTokenizerBase, source: str = "", mend: str = FILL_IN
) -> Encoded:
    """Lists of words, or a table with a column of them, as inputs.

    Args:
        given: A data set, or a list of lists of words.
        artefact: What the columns are called, and the tags.
        tokenizer: Of the base model.
        source: How messages call the rows.
        mend: What messages say of a row without words.

    Raises:
        TypeError: If a row is no list of words.
        ValueError: If there is no row, or one without words.
    """
    tags = None
    if isinstance(given, Dataset):
        name = word_column(artefact.inputs, given)
        source = source or "the table given"
        check_column(given, name, "words", source)
        rows = given[name][:]
        where = [f"{at(source, given, row)}: row {row} has" for row in range(len(rows))]
        tags = KINDS[artefact.kind].targets(given, artefact.inputs, artefact.classes or ())
        whole = tags is not None and all(map(KINDS[artefact.kind].is_known, tags))
        tags = tags if whole else None
    else:
        rows = list(given)
        where = [f"Row {row} is" for row in range(len(rows))]
    if not rows:
        raise ValueError(EMPTY)
    for place, words in zip(where, rows, strict=True):
        _check(words, place, mend)
    texts = [list(map(str, words)) for words in rows]
    return tokenized_words(texts, tags, tokenizer, artefact.inputs.max_length)


def tokenized_words(
    texts: Sequence[Sequence[str]],
    tags: Sequence[Sequence[int]] | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
) -> Encoded:
    """Inputs of rows of words, with their tags where these are known."""
    if not tokenizer.is_fast:
        raise ValueError("the base model has no fast tokenizer, which finds the words of the tokens")
    options: dict[str, Any] = {"is_split_into_words": True, "max_length": max_length}
    tokens = tokenizer(list(texts), truncation=max_length is not None, **options)
    kept, marks = [], []
    for row in range(len(texts)):
        firsts = first_tokens(tokens.word_ids(row))
        kept.append([word for word in firsts if word is not None])
        if not kept[-1]:
            raise ValueError(f"row {row} holds no token ({texts[row]!r:.80}), so nothing can be said about it.")
        marks.append(word_labels(firsts, [0] * len(texts[row]) if tags is None else tags[row]))
    full = [row for row, ids in enumerate(tokens["input_ids"]) if max_length and len(ids) >= max_length - 1]
    whole = tokenizer([texts[row] for row in full], is_split_into_words=True, verbose=False) if full else None
    cut = 0 if whole is None else sum(len(ids) > (max_length or 0) for ids in whole["input_ids"])
    return Encoded(dict(tokens), None if tags is None else list(tags), cut, Words(texts, kept, marks))


def first_tokens(word_ids: Sequence[int | None]) -> list[int | None]:
    """The word of each token that is the first of one, and None elsewhere."""
    before = [None, *word_ids[:-1]]
    return [None if word == last else word for word, last in zip(word_ids, before, strict=True)]


def word_labels(firsts: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    """The tag of a word at its first token, -100 elsewhere."""
    return [NONE if word is None else tags[word] for word in firsts]


def word_column(inputs: Inputs, table: Dataset) -> str:
    """The column of a table that holds the words."""
    if inputs.text_columns is not None:
        return inputs.text_columns[0]
    return next((name for name in WORDS if name in table.column_names), WORDS[0])


def _check(words: Any, where: str, mend: str) -> None:
    if not isinstance(words, (list, tuple)) or not all(isinstance(word, (str, int)) for word in words):
        raise TypeError(
            f"{where} {words!r:.60}; a list of words is expected, such as ['anna', 'wrote'], which JSON lines and "
            "Parquet files hold"
        )
    if not words:
        raise ValueError(f"{where} no words; {mend}")
