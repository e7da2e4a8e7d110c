"""Which rows were these? Fingerprints that tell whether two sets of rows overlap, in whatever order they come."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..json_files import Fields

# Up to this many rows are remembered one by one; of more, those with the smallest hashes (a bottom-k sketch).
SKETCH_SIZE = 4096


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

    def overlap(self, hashes: np.ndarray) -> float:
        """Share of these rows in this set; of a larger set only hashes up to the largest remembered are judged."""
        known = np.array(self.hashes, dtype=np.uint64)
        judged = hashes if self.num_rows <= SKETCH_SIZE else hashes[hashes <= known[-1]]
        return float(np.isin(judged, known).mean()) if len(judged) else 0.0

    def repeated(self, hashes: np.ndarray) -> float:
        """Share of these rows in this set, by rows that occur in it once; 1 for the very same rows.

        Unlike `overlap` it does not take rows that only look alike for the same ones: of probabilities that come in a
        few levels, or are exactly 1, new rows equal old ones by the hundred.
        """
        if len(hashes) == self.num_rows and SplitFingerprint.of_hashes(hashes).digest == self.digest:
            return 1.0
        known, counts = np.unique(np.array(self.hashes, dtype=np.uint64), return_counts=True)
        judged = hashes if self.num_rows <= SKETCH_SIZE else hashes[hashes <= known[-1]]
        return float(np.isin(judged, known[counts == 1]).mean()) if len(judged) else 0.0

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


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea & Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
