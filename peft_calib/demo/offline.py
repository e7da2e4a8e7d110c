"""What the examples run on where there is no network: real sentences, and models small enough for seconds on a CPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from ..runs.embedded import DOCUMENTATION, embedded_model, embedded_rows

#: A word as code writes it: with an underscore, a call, a dotted name or capitals inside.
CODE = re.compile(r"\w+_\w*|\w+\(.*|\w+\.\w+|[a-z]+[A-Z]\w*|[A-Z]\w*[a-z][A-Z]\w*|[A-Z]{2,}|\W*\d[\d.,x]*\W*")
#: A small vocabulary, into which most of the time would go; large weights, so that words can be told apart.
TINY = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128, "hidden_size": 64,
    "initializer_range": 0.1,
}  # fmt: skip
VOCABULARY = 2000


def offline_sentences(*libraries: str, each: int = 200) -> Dataset:
    """Sentences of the documentation of installed libraries, with the library as their label.

    Args:
        libraries: Which, of those of `load_text_data("documentation")`.
        each: Sentences of each.

    Returns:
        Rows with `text` and `label`, the libraries in turn.

    Raises:
        ValueError: For a library that is none of them.

    Example:
        >>> offline_sentences("numpy", "pandas", each=2)["label"][:]
        ['numpy', 'pandas', 'numpy', 'pandas']
    """
    rows = embedded_rows(DOCUMENTATION)
    names = rows.features["label"].names
    unknown = sorted(set(libraries) - set(names))
    if unknown:
        raise ValueError(f"no sentences of {', '.join(unknown)}; there are some of {', '.join(names)}")
    found: dict[str, list[str]] = {name: [] for name in libraries}
    for text, label in zip(rows["text"][:], rows["label"][:], strict=True):
        if names[label] in found and len(found[names[label]]) < each:
            found[names[label]].append(text)
    turns = [
        (text, name) for texts in zip(*found.values(), strict=True) for text, name in zip(texts, found, strict=True)
    ]
    return Dataset.from_dict({"text": [text for text, _ in turns], "label": [name for _, name in turns]})


def offline_words(each: int = 100) -> Dataset:
    """The same sentences as words, each with the tag `CODE` or `O`.

    Args:
        each: Sentences of each library.

    Returns:
        Rows with `tokens` and `tags`.

    Example:
        >>> row = offline_words(each=1)[0]
        >>> len(row["tokens"]) == len(row["tags"]), set(row["tags"]) <= {"O", "CODE"}
        (True, True)
    """
    sentences = offline_sentences("numpy", "pandas", "torch", each=each)["text"][:]
    words = [text.split() for text in sentences]
    tags = [["CODE" if CODE.fullmatch(word) else "O" for word in row] for row in words]
    return Dataset.from_dict({"tokens": words, "tags": tags})


def tiny_encoder(folder: str | Path) -> str:
    """Write an encoder of two layers with random weights and a small vocabulary; it learns words, not language.

    Args:
        folder: Folder to write.

    Returns:
        The folder, as a name for `from_pretrained`.
    """
    sizes = {"intermediate_size": 128}
    return _written(folder, BertForSequenceClassification, BertConfig, sizes)


def tiny_language_model(folder: str | Path) -> str:
    """Write a language model of two layers with random weights and a small vocabulary: it learns words only.

    Args:
        folder: Folder to write.

    Returns:
        The folder, as a name for `from_pretrained`.
    """
    sizes = {"intermediate_size": 96, "num_key_value_heads": 2}
    return _written(folder, LlamaForCausalLM, LlamaConfig, sizes)


def _written(folder: str | Path, model_class: Any, config_class: Any, sizes: dict[str, int]) -> str:
    texts = embedded_rows(DOCUMENTATION)["text"][:]
    tokenizer = AutoTokenizer.from_pretrained(embedded_model()).train_new_from_iterator(texts, VOCABULARY)
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.sep_token_id}
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        torch.manual_seed(0)
        model = model_class(config_class(vocab_size=len(tokenizer), **special, **TINY, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
