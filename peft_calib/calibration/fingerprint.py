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
# Standard errors of what look alike by chance that are taken off beside it.
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

        A row is known by its hash where this set has it once (where all its rows come twice, or any same number of
        times, it is copies of another set, and they once), and makes one other row known. New rows have such a hash
        by chance, too: probabilities come in few levels, or are exactly 1. How many is told by the hashes that come
        twice here (Good, 1953: `2 N_2 / n`), and what that and three standard errors explain is taken off. Of rows
        that all differ nothing is.
        """
        if len(hashes) == self.num_rows and SplitFingerprint.of_hashes(hashes).digest == self.digest:
            return 1.0
        known, counts = np.unique(np.array(self.hashes, dtype=np.uint64), return_counts=True)
        judged = hashes if self.num_rows <= SKETCH_SIZE else hashes[hashes <= known[-1]]
        if not len(judged):
            return 0.0
        copies = self._copies(counts)
        found = float(np.isin(known[counts == copies], judged).sum()) / len(judged)
        chance = 0.0 if (counts == copies).all() else _by_chance(counts // copies, len(judged))
        return max(found - chance, 0.0)

    def _copies(self, counts: np.ndarray) -> int:
        """How often every row occurs at least, if the counts of all are multiples of it."""
        whole = counts if self.num_rows <= SKETCH_SIZE else counts[:-1]  # the last one may be cut in two
        return int(np.gcd.reduce(whole)) if len(whole) >= FEWEST_TO_TELL_COPIES else 1

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
        return cls(digest, num_rows, tuple(int(h, 16) for h in hashes))


def _by_chance(counts: np.ndarray, judged: int) -> float:
    """How large the share of new rows may be whose hash is one that came once, by how often each came."""
    twice, size = int((counts == 2).sum()), int(counts.sum())
    share = min(2.0 * twice / size, 1.0)
    of_estimate, of_rows = 4.0 * (twice + 1) / size**2, share * (1.0 - share) / judged
    return share + STANDARD_ERRORS * float(np.sqrt(of_estimate + of_rows))


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
