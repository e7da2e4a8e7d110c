"""Entities in the tags of words, and how likely tags that are drawn word by word have a given one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Marks in front of a tag's type, as in `B-PER`: of the schemes IOB2, IOBES and BILOU.
_BEGINS, _ENDS, _MARKS = "BSU", "ESLU", "BIESLU"


def spans_of(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Entities in the tags of one sentence: type, first token, and the one after the last.

    As the CoNLL script and seqeval read them: an `I-` that continues nothing of its type begins an entity. Tags
    without a mark are types; equal ones beside each other are one entity.

    Args:
        tags: `O` outside of entities; `B-`, `I-`, `E-` (`L-`) and `S-` (`U-`) before a type, or a type alone.

    Example:
        >>> spans_of(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"])
        [('PER', 0, 2), ('LOC', 3, 4), ('LOC', 4, 5)]
    """
    found, start, before, ended = [], 0, "", True
    for place, tag in enumerate([*tags, "O"]):
        mark, kind = _parts(tag)
        continues = bool(kind) and kind == before and mark not in _BEGINS and not ended
        if before and not continues:
            found.append((before, start, place))
        if not continues:
            start, before = place, kind
        ended = not kind or mark in _ENDS
    return found


class TagSet:
    """Which tags are of which type, and which one continues the entity of another.

    Args:
        names: Tag of each class, in order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        parts = [_parts(name) for name in names]
        self.types = tuple(kind for _, kind in parts)
        #: `(C, C)` bool, whether the second, after the first, goes on with its entity.
        self.continues = np.array([
            [bool(kind) and kind == before and mark not in _BEGINS and ended not in _ENDS for mark, kind in parts]
            for ended, before in parts
        ])  # fmt: skip

    def chance(self, probabilities: np.ndarray, kind: str, first: int, last: int) -> np.ndarray:
        """P(the tags of a sentence have this very entity), where words are tagged independently.

        The sum over all tags that `spans_of` reads so: of the type from the first word on, where nothing of its type
        goes on, through words that continue it, to one that does not, or the end.

        Args:
            probabilities: `(K, T, C)` of the words of a sentence, K draws.
            kind: Of the entity.
            first: Its first word.
            last: The one after its last.

        Returns:
            `(K,)`, one for each draw.
        """
        goes_on = self.continues.astype(np.float64)
        held = probabilities[:, first] * np.array([own == kind for own in self.types], np.float64)
        if first:
            held = held * (1.0 - probabilities[:, first - 1] @ goes_on)
        for place in range(first + 1, last):
            held = (held @ goes_on) * probabilities[:, place]
        if last < probabilities.shape[1]:
            held = held * (1.0 - probabilities[:, last] @ goes_on.T)
        return np.clip(held.sum(axis=1), 0.0, 1.0)


def _parts(tag: str) -> tuple[str, str]:
    """Mark and type of a tag; both empty outside of entities, and no mark means that equal ones are one entity."""
    return ("O", "") if tag == "O" else (tag[0], tag[2:]) if _is_marked(tag) else ("I", tag)


def _is_marked(tag: str) -> bool:
    return len(tag) > 2 and tag[1] == "-" and tag[0] in _MARKS
