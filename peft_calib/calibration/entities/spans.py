"""Entities in the tags of words, and how likely tags that are drawn word by word have a given one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Marks in front of a tag's type, as in `B-PER`: of the schemes IOB2, IOBES and BILOU.
_BEGINS, _ENDS, _MARKS, _ALONE = "BSU", "ESLU", "BIESLU", "SU"
#: What seqeval calls the type of a tag that is a mark alone.
_NAMELESS = "_"
#: In place of a mark where a tag is a type: one that continues its like.
_PLAIN = "-"
#: Mark and type of a tag; both empty outside of entities.
_Parts = tuple[str, str]


def spans_of(tags: Sequence[str], names: Sequence[str] | None = None) -> list[tuple[str, int, int]]:
    """Entities in the tags of one sentence: type, first token, and the one after the last.

    Tags of IOB2 and IOBES are read as seqeval reads them by default: an `I-` that continues nothing of its type begins
    an entity, and of `B`, `I` alone the type is `_`. `L-` and `U-` of BILOU mean `E-` and `S-`. Tags without a mark
    are types; equal ones beside each other are one entity. The last two seqeval reads otherwise.

    Args:
        tags: `O` outside of entities; `B-`, `I-`, `E-` (`L-`) and `S-` (`U-`) before a type, or a type alone.
        names: All tags there are, which tell a mark from a type that looks marked, such as `E-mail`: a type is marked
            if there is a `B-` or `I-` of it, or an `S-` (`U-`) where other types have that beside theirs. Without
            them a tag is marked if it looks so.

    Example:
        >>> spans_of(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"])
        [('PER', 0, 2), ('LOC', 3, 4), ('LOC', 4, 5)]
        >>> spans_of(["E-mail", "O", "B-PER"], ["O", "B-PER", "I-PER", "E-mail"])
        [('E-mail', 0, 1), ('PER', 2, 3)]
    """
    return _spans([_by_look(tag) for tag in tags]) if names is None else TagSet(names).spans(tags)


def _spans(parts: Sequence[_Parts]) -> list[tuple[str, int, int]]:
    found, start, before, ended = [], 0, "", True
    for place, (mark, kind) in enumerate([*parts, ("", "")]):
        continues = _goes_on(before, mark, kind) and not ended
        if before and not continues:
            found.append((before, start, place))
        if not continues:
            start, before = place, kind
        ended = not kind or mark in _ENDS
    return found


def _goes_on(before: str, mark: str, kind: str) -> bool:
    """Whether a tag after one of the type `before`, which is no end, goes on with its entity."""
    return bool(kind) and kind == before and mark not in _BEGINS


class TagSet:
    """Which tags are of which type, and which one continues the entity of another; the whole set decides.

    Args:
        names: Tag of each class, in order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._parts = _by_set(names)
        parts = [self._parts[name] for name in names]
        self.types = tuple(kind for _, kind in parts)
        #: `(C, C)` bool, whether the second, after the first, goes on with its entity.
        self.continues = np.array([
            [_goes_on(before, mark, kind) and ended not in _ENDS for mark, kind in parts] for ended, before in parts
        ])  # fmt: skip

    def spans(self, tags: Sequence[str]) -> list[tuple[str, int, int]]:
        """Entities in the tags of one sentence, see `spans_of`."""
        unknown = next((tag for tag in tags if tag not in self._parts), None)
        if unknown is not None:
            raise ValueError(f"{unknown!r} is none of the tags {list(self._parts)}; name every tag there is.")
        return _spans([self._parts[tag] for tag in tags])

    def chance(self, probabilities: np.ndarray, kind: str, first: int, last: int) -> np.ndarray:
        """P(the tags of a sentence have this very entity), where words are tagged independently.

        The sum over all tags that `spans` reads so: of the type from the first word on, where nothing of its type
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


def _by_set(names: Sequence[str]) -> dict[str, _Parts]:
    """Mark and type of each tag, by all of them."""
    looks = {name: _by_look(name) for name in names}
    marked = {kind for mark, kind in looks.values() if mark in ("B", "I")}
    alone = {kind for mark, kind in looks.values() if mark and mark in _ALONE}
    if alone & marked:  # the scheme has a mark for entities of one word, and a type may have no other
        marked |= alone
    return {
        name: parts if parts[1] in marked or name == "O" else (_PLAIN, name) for name, parts in looks.items()
    }  # fmt: skip


def _by_look(tag: str) -> _Parts:
    """Mark and type as a tag looks alone."""
    if tag == "O":
        return "", ""
    if tag[:1] in tuple(_MARKS) and tag[1:2] in ("", "-"):
        return tag[0], tag[2:] or _NAMELESS
    return _PLAIN, tag
