"""The entities that a tagger of words finds, each with the probability that span and type are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..inputs import as_numpy, check_seed
from .spans import TagSet


@dataclass(frozen=True, eq=False)
class Entities:
    """Entities that were found, in the order of sentences and words.

    Attributes:
        probability: `(E,)` float64, that span and type are right, if the model's probabilities are.
        correct: `(E,)` bool, whether both are; None without labels.
        sentences: `(E,)` int64, number of the sentence of each, counted from 0 in the order they were given.
        spans: `(E, 2)` int64, the first item of each, and the one after its last.
        types: Such as `"PER"`.
        num_sentences: Sentences there are.
        counts: Of each type, `(S, 3)` int64: entities found, true ones, and right ones of every sentence; None without
            labels.
    """

    probability: np.ndarray
    correct: np.ndarray | None
    sentences: np.ndarray
    spans: np.ndarray
    types: tuple[str, ...]
    num_sentences: int
    counts: Mapping[str, np.ndarray] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.probability)

    def one_a_sentence(self, seed: int = 0) -> np.ndarray:
        """`(E,)` bool, one entity of each sentence that has any, drawn by chance.

        The entities of one sentence are right and wrong together, and exact tests count independent rows. So a rule
        is fitted with this as its `mask`; what it promises is for an entity drawn like these.
        """
        draws = np.random.default_rng(check_seed(seed)).random(len(self))
        order = np.lexsort((draws, self.sentences))
        first = np.ones(len(self), bool)
        first[1:] = np.diff(self.sentences[order]) != 0
        chosen = np.zeros(len(self), bool)
        chosen[order[first]] = True
        return chosen


def find_entities(
    probabilities: Any, tag_names: Sequence[str] | Mapping[Any, str], sentences: Any, labels: Any = None
) -> Entities:
    """The entities in the most probable tags, with the probability of each.

    A span and type are found in the tags of largest mean probability, as `spans_of` reads them. Their probability is
    that of all tags of the sentence in which the same entity stands: `P(B-PER) P(I-PER) (1 - P(I-PER))` for two words
    of a name before a word that could continue it. Given a draw the model tags words independently, so it is a sum of
    products, taken in one pass; of draws it is the mean, which keeps that the words of one draw lean the same way.

    Args:
        probabilities: `(N, C)` of words (the first token of each), or `(K, N, C)` of draws.
        tag_names: Tag of each class, in order: `O`, and `B-`, `I-`, ... before a type, or a type alone. Or a mapping
            of number to tag: the model's `id2label`.
        sentences: `(N,)`, to which sentence each word belongs; words of one stand together, in order.
        labels: `(N,)` class of each word, if known.

    Returns:
        The entities.

    Raises:
        ValueError: If these are not paired, not probabilities, or words of a sentence do not stand together.

    Example:
        >>> p = [[0.1, 0.8, 0.1], [0.2, 0.1, 0.7], [0.8, 0.1, 0.1]]  # anna smith wrote
        >>> found = find_entities(p, ["O", "B-PER", "I-PER"], [0, 0, 0], labels=[1, 2, 0])
        >>> found.types, found.spans.tolist(), found.correct.tolist()
        (('PER',), [[0, 2]], [True])
        >>> found.probability.round(3).tolist()  # (0.8 + 0.1) 0.7 (1 - 0.1): an I- that continues nothing begins one
        [0.567]
    """
    names = _names(tag_names)
    draws, owners, tags = _checked(probabilities, names, sentences, labels)
    reader = TagSet(names)
    best = draws.mean(axis=0).argmax(axis=1)
    starts = np.flatnonzero(np.diff(owners, prepend=owners[0] - 1))
    ends = [*starts[1:].tolist(), len(owners)]
    chances, places, spans, types, right = [], [], [], [], []
    counts: dict[str, np.ndarray] = {}
    for number, (start, stop) in enumerate(zip(starts.tolist(), ends, strict=True)):
        made = reader.spans([names[tag] for tag in best[start:stop]])
        true = set() if tags is None else set(reader.spans([names[tag] for tag in tags[start:stop]]))
        for kind, first, last in made:
            chances.append(float(reader.chance(draws[:, start:stop], kind, first, last).mean()))
            spans.append((start + first, start + last))
        places += [number] * len(made)
        types += [kind for kind, _, _ in made]
        right += [one in true for one in made]
        for column, group in enumerate((made, true, true & set(made))):
            for kind, _, _ in group:
                counts.setdefault(kind, np.zeros((len(starts), 3), np.int64))[number, column] += 1
    known = tags is not None
    return Entities(
        np.array(chances, np.float64),
        np.array(right, bool) if known else None,
        np.array(places, np.int64),
        np.array(spans, np.int64).reshape(-1, 2),
        tuple(types),
        len(starts),
        dict(sorted(counts.items())) if known else None,
    )


def _names(given: Any) -> list[str]:
    """Tag of each class, from a sequence or a mapping of number (or its digits, as JSON has them) to tag."""
    names = given.tolist() if isinstance(given, np.ndarray) else given
    if isinstance(given, Mapping):
        numbered = {str(key): name for key, name in given.items()}
        names = [numbered.get(str(number)) for number in range(len(given))]
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) and n for n in names):
        raise ValueError(
            "tag_names must be the tags of the classes as texts, in order, such as ['O', 'B-PER', 'I-PER'], or the "
            f"model's id2label, numbers from 0 to tags; got {given!r:.80}."
        )
    return list(names)


def _checked(
    probabilities: Any, tag_names: Sequence[str], sentences: Any, labels: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """`(K, N, C)` float64, `(N,)` sentences and `(N,)` labels."""
    given = as_numpy(probabilities, "probabilities")
    draws = (given[None] if given.ndim == 2 else given).astype(np.float64)
    if draws.ndim != 3 or draws.shape[2] != len(tag_names) or not draws.size:
        raise ValueError(
            f"probabilities must be (N, C) or (K, N, C) with C = {len(tag_names)}, one for each of tag_names, got "
            f"shape {given.shape}."
        )
    if not ((draws >= 0.0) & (draws <= 1.0 + 1e-6)).all() or np.abs(draws.sum(axis=2) - 1.0).max() > 1e-3:
        raise ValueError("probabilities must lie in [0, 1] and sum to 1 for every word; of logits take the softmax.")
    owners = as_numpy(sentences, "sentences")
    if owners.shape != draws.shape[1:2]:
        raise ValueError(f"sentences must say of each of {draws.shape[1]} words where it belongs, got {owners.shape}.")
    if 1 + int((owners[1:] != owners[:-1]).sum()) != len(np.unique(owners)):
        raise ValueError("The words of one sentence must stand together, in order; sort them by sentence.")
    numbers = np.unique(owners, return_inverse=True)[1]
    if labels is None:
        return draws, numbers, None
    tags = as_numpy(labels, "labels")
    if tags.shape != owners.shape or tags.dtype.kind not in "iu" or not ((tags >= 0) & (tags < draws.shape[2])).all():
        raise ValueError(
            f"labels must hold one of 0 to {draws.shape[2] - 1} for each of {len(owners)} words, got {tags.dtype} of "
            f"shape {tags.shape}; leave out words without a label (-100)."
        )
    return draws, numbers, tags
