"""When two texts give the same answer, and how alike they are, without a model."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
#: A point or comma between digits, and a minus before one, belong to the number.
_OF_NUMBERS = re.compile(r"(?<=\d)[.,](?=\d)|(?<!\w)-(?=\d)")
_WORDS = re.compile(r"[^\W_]+")


def normalise_answer(text: str) -> str:
    """A text as it is compared: NFKC, lower case, without punctuation, `a`, `an`, `the`, and extra white space.

    That is how SQuAD compares answers (Rajpurkar et al., 2016), but for numbers: theirs makes 35 of 3.5 and 5 of -5.
    Symbols such as `$`, `+` and `%` are no punctuation and stay.

    Example:
        >>> normalise_answer("The  Sun.") == normalise_answer("sun"), normalise_answer("3.5") == normalise_answer("35")
        (True, False)
    """
    text = unicodedata.normalize("NFKC", text).lower()
    kept = {match.start() for match in _OF_NUMBERS.finditer(text)}
    plain = (c for i, c in enumerate(text) if i in kept or not unicodedata.category(c).startswith("P"))
    return " ".join(_ARTICLES.sub(" ", "".join(plain)).split())


def answers_match(answers: Sequence[str], references: Sequence[Any]) -> np.ndarray:
    """Which answers equal their reference after `normalise_answer`: exact match.

    Args:
        answers: `(N,)` texts.
        references: `(N,)` texts, or lists of texts of which any will do.

    Returns:
        `(N,)` bool.

    Raises:
        ValueError: If they are not paired.

    Example:
        >>> answers_match(["The Sun.", "a moon"], ["sun", ["a star", "Mars"]]).tolist()
        [True, False]
    """
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers were given for {len(references)} references.")
    accepted = ([right] if isinstance(right, str) else right for right in references)
    pairs = zip(answers, accepted, strict=True)
    return np.array([normalise_answer(answer) in set(map(normalise_answer, right)) for answer, right in pairs], bool)


def rouge_l(first: str, second: str) -> float:
    """ROUGE-L (Lin, 2004): F1 of the longest common subsequence of words, in [0, 1].

    With `l` its length, `P = l / |second|`, `R = l / |first|` and `F = 2 P R / (P + R) = 2 l / (|first| + |second|)`.
    Words are runs of letters and digits, in lower case. Two texts without a word are alike.

    Example:
        >>> round(rouge_l("the cat sat down", "The cat lay down."), 3)
        0.75
    """
    left, right = (_WORDS.findall(text.lower()) for text in (first, second))
    if not left and not right:
        return 1.0
    return 2.0 * _common_subsequence(left, right) / (len(left) + len(right))


def _common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest one: `L[i][j] = L[i-1][j-1] + 1` where words are equal, else the larger neighbour."""
    above = [0] * (len(right) + 1)
    for word in left:
        row = [0]
        for j, other in enumerate(right):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        above = row
    return above[-1]
