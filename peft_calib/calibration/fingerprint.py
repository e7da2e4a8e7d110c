"""Which rows were these? Fingerprints that tell whether two sets of rows overlap, in whatever order they come."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..json_files import Fields
from .answers import SMALLEST_MEAN_PROBABILITY

# Up to this many rows are remembered one by one; of more, those with the smallest hashes (a bottom-k sketch).
SKETCH_SIZE = 4096
# From so many different rows on a count that divides those of all of them is a copy, and no accident: of counts that
# come about by chance two divides all with probability 2^-20.
FEWEST_TO_TELL_COPIES = 20
# Standard errors of what look alike by chance from which on rows are said to be own ones.
STANDARD_ERRORS = 3.0
# To what log-probabilities are rounded where logits and probabilities of one row should be alike: far above what a
# softmax in float32 rounds, so that nearly all rows survive it, and far below what tells rows apart.
LOG_STEP = 1e-4
# Entries of a block whose exponentials are at hand at a time.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class SplitFingerprint:
    """A digest of a set of rows, and a sample of row hashes that is the same sample in any other set."""

    digest: str  # Hex SHA-256 of the sorted row hashes; equal for the same rows in any order
    num_rows: int  # Rows in the set
    hashes: tuple[int, ...]  # Sorted smallest row hashes, at most `SKETCH_SIZE`

    @classmethod
    def of(cls, predictions: np.ndarray, labels: np.ndarray) -> SplitFingerprint:
        """Fingerprint of `(N, C)` predictions with `(N,)` labels; float32 resolution, so storage does not matter."""
        return cls.of_hashes(row_hashes(predictions, labels))

    @classmethod
    def of_hashes(cls, hashes: np.ndarray) -> SplitFingerprint:
        """Fingerprint of `(N,)` uint64 row hashes."""
        ordered = np.sort(hashes)
        digest = hashlib.sha256(ordered.astype("<u8").tobytes()).hexdigest()
        return cls(digest, len(ordered), tuple(int(h) for h in ordered[:SKETCH_SIZE]))

    def seen(self, hashes: np.ndarray) -> float:
        """Share of some rows that are rows of this set, beyond what look alike by chance; 1 for the very same rows.

        Pairs of rows that are alike across both sets are counted, and pairs within each. New rows are alike across at
        most as often as the geometric mean of within and within (Cauchy & Schwarz), however few levels they come in
        and whatever their shares are; an own row has its pair on top. Copies in one set alone hide nothing, since the
        other has no pairs; where all rows of a set come equally often, they count once. Of rows that differ in both
        sets each that is known is an own one; else nothing is said below `STANDARD_ERRORS`, so that few own rows, or
        copies in both sets, of rows in few levels may pass.
        """
        if len(hashes) == self.num_rows and SplitFingerprint.of_hashes(hashes).digest == self.digest:
            return 1.0
        ours = np.array(self.hashes, dtype=np.uint64)
        if self.num_rows > SKETCH_SIZE:  # the last one may be cut in two
            ours, hashes = ours[ours < ours[-1]], hashes[hashes < ours[-1]]
        if not len(ours) or not len(hashes):
            return 0.0
        kinds, which = np.unique(np.concatenate([ours, hashes]), return_inverse=True)
        fitted = _without_copies(np.bincount(which[: len(ours)], minlength=len(kinds)))
        judged = _without_copies(np.bincount(which[len(ours) :], minlength=len(kinds)))
        return _own_share(fitted, judged)

    def to_dict(self) -> dict[str, Any]:
        return {"digest": self.digest, "num_rows": self.num_rows, "hashes": [f"{h:016x}" for h in self.hashes]}

    @classmethod
    def from_fields(cls, fields: Fields) -> SplitFingerprint:
        """The inverse of `to_dict`, from the fields of a file; a ValueError names field and value."""
        digest, num_rows = fields.text("digest"), fields.integer("num_rows", least=1)
        hashes: Sequence[str] = fields.listing("hashes", str)
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise fields.wrong("digest", "64 hexadecimal digits")
        if len(hashes) != min(num_rows, SKETCH_SIZE) or not all(re.fullmatch(r"[0-9a-f]{16}", h) for h in hashes):
            raise fields.wrong("hashes", f"{min(num_rows, SKETCH_SIZE)} row hashes of 16 hexadecimal digits")
        found = cls(digest, num_rows, tuple(int(h, 16) for h in hashes))
        if list(found.hashes) != sorted(found.hashes):
            raise fields.wrong("hashes", "row hashes in order")
        if num_rows <= SKETCH_SIZE and cls.of_hashes(np.array(found.hashes, np.uint64)).digest != digest:
            raise fields.wrong("digest", "the SHA-256 of the row hashes beside it")
        return found


def _without_copies(counts: np.ndarray) -> np.ndarray:
    """How often each kind of row came, where all came a multiple of some times: that many times less."""
    came = counts[counts > 0]
    return counts // np.gcd.reduce(came) if len(came) >= FEWEST_TO_TELL_COPIES else counts


def _own_share(fitted: np.ndarray, judged: np.ndarray) -> float:
    """Share of judged rows that are fitted ones, by how often each kind of row came in either set."""
    known = float(judged[fitted > 0].sum() / judged.sum())
    if fitted.max() == 1 and judged.max() == 1:
        return known
    both = fitted + judged
    weight = 2.0 / np.maximum(both, 2)  # frequent kinds tell little of single rows
    across = (weight * fitted * judged).sum()
    within = [(weight * count * (count - 1.0)).sum() for count in (fitted, judged)]
    own = across - np.sqrt(within[0] * within[1])
    if own <= STANDARD_ERRORS * _standard_error(fitted, judged, weight):
        return 0.0
    return min(float(own / (weight * judged).sum()), known)


def _standard_error(fitted: np.ndarray, judged: np.ndarray, weight: np.ndarray) -> float:
    """Of `own`, of new rows: `t (t - 1) / 2` for a kind that came `t` times, on whichever side each of them fell.

    It is told by all kinds, or by those on both sides and how likely that is. Copies in one set raise the first.
    """
    both = fitted + judged
    variance = weight**2 * both * (both - 1.0) / 2.0
    share = judged.sum() / both.sum()
    mixed = (fitted > 0) & (judged > 0)
    likely = 1.0 - share ** both[mixed] - (1.0 - share) ** both[mixed]
    return float(np.sqrt(min(variance.sum(), (variance[mixed] / likely).sum())))


def row_hashes(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`(N,)` uint64 hashes of rows, each of its float32 predictions and its label."""
    words = np.concatenate(
        [predictions.astype("<f4").view("<u4").astype(np.uint64), labels[:, None].astype(np.uint64)], axis=1
    )
    state = np.full(len(labels), 0x9E3779B97F4A7C15, np.uint64)
    with np.errstate(over="ignore"):
        for column in words.T:
            state = _mixed(state ^ (column + np.uint64(0x9E3779B97F4A7C15)))
    return state


def softmax_hashes(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`(N,)` uint64 hashes of labelled rows that are nearly always the same for logits and for their probabilities.

    Of the log-probabilities of the three likeliest classes and of the label, rounded to `LOG_STEP`: as few as tell
    rows apart, since the more are rounded the more often one comes to lie on the other side of an edge.

    Args:
        logits: `(N, C)`, up to a constant a row; log-probabilities are such. -inf masks a class.
        labels: `(N,)` class ids.
    """
    told = np.empty((len(labels), min(3, logits.shape[1]) + 1))
    rows = max(1, _BLOCK // logits.shape[1])
    for start in range(0, len(labels), rows):
        part = slice(start, start + rows)
        shifted = logits[part] - logits[part].max(axis=1, keepdims=True)
        shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        told[part, -1] = shifted[np.arange(len(shifted)), labels[part]]
        likeliest = told.shape[1] - 1
        told[part, :-1] = np.sort(np.partition(shifted, -likeliest, axis=1)[:, -likeliest:], axis=1)
    # A probability of float32 is 1.2e-38 or says nothing; 0 is added since -0 has other bits.
    steps = np.rint(np.maximum(told, np.log(SMALLEST_MEAN_PROBABILITY)) / LOG_STEP) + 0.0
    return row_hashes(steps, labels)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea & Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
