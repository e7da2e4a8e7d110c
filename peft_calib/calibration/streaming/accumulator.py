"""Calibration of any number of rows in fixed memory, over batches and processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ..answers import unwrapped
from ..bins import CHUNK, FEWEST_ROWS, equal_mass_bins, top_label
from ..inputs import Rows, as_numpy, as_rows, check_num_bins
from ..report.report import CalibrationReport
from ..scores import binned
from ..scores.binned import warn_impossible
from ..scores.columns import ColumnBins, stacked
from ..scores.panel import compute_panel, panel_of, row_entropy, scores_of_groups
from ..scores.table import MOST_RESAMPLED_CLASSES, TACE_THRESHOLD
from ..scores.top_label_pass import TopLabelSums
from .sketch import CLASS_CELLS, TOP_CELLS, Grid, Sketch

# Bytes of rows kept as they are, so that small data sets get exact answers for every score.
EXACT_BYTES = 8192


class CalibrationAccumulator:
    """Sufficient statistics of a stream of predictions: `update` a batch at a time, `compute` at the end.

    The state does not grow with the number of rows: about 13 kB, and 5 kB a class; above 200 classes it is 400 bytes a
    class, and `ace_classwise`, `tace` and `tace_classwise` are left out. Accuracy, NLL, Brier and everything
    over uniform bins are exact. Scores that need rows in order (ACE, TACE, smooth ECE, KS, AURC, AUROC and its kin)
    are exact while the rows fit in 8 kB, and come from a histogram of some 500 cells afterwards: `order_error` bounds
    what that does to ACE.

    With `ordered=False` only the twelve scores of `table.UNORDERED_KEYS` are kept, in one kilobyte and some eight
    times faster. They are fastest on probabilities in order of rows, which is what a model gives. The squares of
    float32 numbers are summed 128 at a time in float32; everything else is in float64.

    In a distributed evaluation each process updates its own accumulator, then `reduce(accelerator)` adds them up.

    Args:
        num_bins: Bins of every binned score.
        num_classes: If known; else taken from the first batch. Needed where a process may get no batch at all.
        input: `"probabilities"` or `"logits"`, checked in every batch.
        ignore_index: Label of rows to drop, or None.
        ordered: Whether to keep what scores over class columns and over rows in order need.

    Raises:
        ValueError: For bad settings.

    Example:
        >>> accumulator = CalibrationAccumulator(num_bins=10)
        >>> accumulator.update([[0.9, 0.1], [0.6, 0.4]], [0, 0])
        >>> accumulator.update([[0.3, 0.7]], [1])
        >>> round(accumulator.compute()["ece"], 6)
        0.266667
    """

    def __init__(
        self,
        num_bins: int = 15,
        *,
        num_classes: int | None = None,
        input: str = "probabilities",
        ignore_index: int | None = -100,
        ordered: bool = True,
    ) -> None:
        self.num_bins = check_num_bins(num_bins)
        self.input, self.ignore_index, self.ordered = input, ignore_index, ordered
        self.num_classes: int | None = None
        if num_classes is not None:
            self._start(num_classes)

    def _start(self, num_classes: int) -> None:
        if num_classes < 2:
            raise ValueError(f"`num_classes` must be at least 2, got {num_classes}.")
        self.num_classes = num_classes
        self._sums = TopLabelSums(self.num_bins)
        self._entropy = 0.0
        self._top = self._classes = None
        self._exact_rows = EXACT_BYTES // (8 * (num_classes + 1))
        self._kept: list[Rows] | None = None
        if self.ordered:
            self._top = Sketch(Grid(TOP_CELLS, self.num_bins, TACE_THRESHOLD))
            # Of many classes only the uniform bins are kept: each in one cell, the threshold's in two.
            self._in_order = num_classes <= MOST_RESAMPLED_CLASSES
            cells = CLASS_CELLS if self._in_order else 1
            self._classes = Sketch(Grid(cells, self.num_bins, TACE_THRESHOLD), num_classes)
            self._kept = []

    @property
    def num_rows(self) -> int:
        """Rows measured so far."""
        return 0 if self.num_classes is None else self._sums.num_rows

    def update(self, predictions: Any, labels: Any, mask: Any = None) -> None:
        """Adds a batch; one without rows, or with every row masked, adds nothing.

        Args:
            predictions: As for `calibration_report`.
            labels: Integer class ids.
            mask: Boolean, of the labels' shape.

        Raises:
            ValueError: For bad input, or another number of classes than before; the state is left as it was.
            TypeError: For input of a wrong type.
        """
        if _nothing_left(labels, mask, self.ignore_index):
            _check_nothing(predictions, labels, self.num_classes)
            return
        plain = self._plain(predictions, labels, mask)
        batch = TopLabelSums(self.num_bins)
        if plain is None or not batch.add(*plain, checked=False):
            # Rows to drop, half precision, logits: prepared and checked again; bad input gets its message here.
            rows = as_rows(predictions, labels, input=self.input, mask=mask, ignore_index=self.ignore_index)
            plain = rows.probabilities, rows.labels
            batch = TopLabelSums(self.num_bins)
            batch.add(*plain, checked=True)
        self._take(*plain, batch)

    def _plain(self, predictions: Any, labels: Any, mask: Any) -> tuple[np.ndarray, np.ndarray] | None:
        """Arrays that need no preparation, their values unchecked; None for all others."""
        if self.input != "probabilities" or mask is not None or self._drops_a_class:
            return None
        p, y = as_numpy(unwrapped(predictions)), as_numpy(labels, "labels")
        simple = (
            p.ndim == 2 and p.dtype in (np.float32, np.float64) and y.shape == p.shape[:1] and y.dtype.kind in "iu"
        )
        return (p, y.astype(np.int64, copy=False)) if simple and p.shape[1] > 1 and len(y) else None

    @property
    def _drops_a_class(self) -> bool:
        return self.ignore_index is not None and self.ignore_index >= 0

    def _take(self, probabilities: np.ndarray, labels: np.ndarray, batch: TopLabelSums) -> None:
        if self.num_classes is None:
            self._start(probabilities.shape[1])
        if probabilities.shape[1] != self.num_classes:
            raise ValueError(
                f"This accumulator has seen {self.num_classes} classes; the batch has {probabilities.shape[1]}."
            )
        if batch.num_impossible:
            warn_impossible(batch.num_impossible, len(labels))
        self._sums += batch
        if self.ordered:
            size = max(FEWEST_ROWS, 2 * CHUNK // probabilities.shape[1])
            for start in range(0, len(labels), size):
                self._add_ordered(probabilities[start : start + size], labels[start : start + size])
            self._keep(probabilities, labels)

    def _add_ordered(self, probabilities: np.ndarray, labels: np.ndarray) -> None:
        assert self._top is not None and self._classes is not None
        confidence, predicted = top_label(probabilities)
        self._top.add(confidence[None], (predicted == labels)[None])
        columns = np.ascontiguousarray(probabilities.T, dtype=np.float64)
        self._classes.add(columns, labels == np.arange(len(columns))[:, None])
        self._entropy += float(row_entropy(columns.T).sum())

    def _keep(self, probabilities: np.ndarray, labels: np.ndarray) -> None:
        if self._kept is not None and self.num_rows <= self._exact_rows:
            # Copies: the caller may reuse the batch's memory.
            self._kept.append(Rows(probabilities.astype(np.float64), labels.copy()))
        else:
            self._kept = None

    @property
    def is_exact(self) -> bool:
        """Whether every score is exact: all rows are still at hand, or no score needs their order."""
        return self.num_classes is None or not self.ordered or self._kept is not None

    def merge(self, other: CalibrationAccumulator) -> CalibrationAccumulator:
        """Adds another accumulator's rows to this one, and returns this one.

        Raises:
            ValueError: If they differ in bins, classes or what they keep.
        """
        if other.num_classes is None:
            return self
        if self.num_classes is None:
            self._start(other.num_classes)
        mine, theirs = ((a.num_bins, a.num_classes, a.ignore_index, a.ordered) for a in (self, other))
        if mine != theirs:
            raise ValueError(
                f"Accumulators must agree in (bins, classes, ignore_index, ordered), got {mine} and {theirs}."
            )
        kept = None if self._kept is None or other._kept is None else self._kept + other._kept
        added = other.state()
        self.load_state({key: value + added[key] for key, value in self.state().items()})
        self._kept = kept if kept is not None and self.num_rows <= self._exact_rows else None
        return self

    def state(self) -> dict[str, torch.Tensor]:
        """The additive state: `counts` int64 and `sums` float64. Adding two states merges two streams."""
        counts, sums = self._arrays()
        whole = np.concatenate(
            [[self._sums.num_rows, self._sums.num_impossible], *(array.reshape(-1) for array in counts)]
        )
        real = np.concatenate(
            [[self._sums.nll, self._sums.brier, self._entropy], *(array.reshape(-1) for array in sums)]
        )
        return {"counts": torch.from_numpy(whole), "sums": torch.from_numpy(real)}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Takes over an additive state; kept rows are not part of it, so scores in order come from the histogram.

        Raises:
            ValueError: If the state belongs to other bins or classes, or is not one.
        """
        expected = {key: (value.shape, value.dtype) for key, value in self.state().items()}
        if {key: (value.shape, value.dtype) for key, value in state.items()} != expected:
            raise ValueError(
                f"This state does not fit {self.num_classes} classes and {self.num_bins} bins: {expected}."
            )
        counts, sums = state["counts"].cpu().numpy(), state["sums"].cpu().numpy()
        self._sums.num_rows, self._sums.num_impossible = int(counts[0]), int(counts[1])
        self._sums.nll, self._sums.brier, self._entropy = (float(value) for value in sums[:3])
        for arrays, values in zip(self._arrays(), (counts[2:], sums[3:]), strict=True):
            start = 0
            for array in arrays:
                array[...] = values[start : start + array.size].reshape(array.shape)
                start += array.size
        self._kept = None

    def _arrays(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Count arrays and sum arrays, in the order of the state."""
        self._check_started()
        counts: list[np.ndarray] = [self._sums.counts]
        sums: list[np.ndarray] = [self._sums.confidence]
        for sketch in (self._top, self._classes):
            if sketch is not None:
                counts.append(sketch.counts)
                sums.append(sketch.sums)
        return counts, sums

    def reduce(self, accelerator: Any) -> CalibrationAccumulator:
        """A new accumulator with the rows of every process, on every process.

        Args:
            accelerator: An `accelerate.Accelerator`.

        Returns:
            The sum over processes; itself unchanged if there is only one.

        Raises:
            ValueError: If `num_classes` is not known here (give it to the constructor).
        """
        self._check_started()
        if accelerator.num_processes == 1:
            return self
        total = CalibrationAccumulator(
            self.num_bins,
            num_classes=self.num_classes,
            input=self.input,
            ignore_index=self.ignore_index,
            ordered=self.ordered,
        )
        state = {key: value.to(accelerator.device) for key, value in self.state().items()}
        total.load_state({key: accelerator.reduce(value, reduction="sum") for key, value in state.items()})
        return total

    def compute(self) -> CalibrationReport:
        """The report, without intervals (they need rows; `calibration_report` has them).

        Raises:
            ValueError: If there was no row.
        """
        self._check_started()
        if self.num_rows == 0:
            raise ValueError("There is no row to measure: no batch was added, or every row was masked.")
        if self._kept is not None:
            values = compute_panel(_concatenated(self._kept), self.num_bins)
        else:
            values = panel_of(*self._parts())
        settings = {
            "num_rows": self.num_rows,
            "num_classes": self.num_classes,
            "num_bins": self.num_bins,
            "convention": "peft_calib",
            "confidence_level": None,
            "exact": self.is_exact,
        }
        class_bins = None if self._classes is None else self._classes.bins()
        return CalibrationReport(values, settings, self._sums.bins, class_bins)

    def order_error(self) -> float:
        """Bound on the error of `ace` that the histogram causes, `2 / N` times the rows in cells on a bin's boundary.

        0 while rows are exact. The actual error is usually a hundred times smaller.
        """
        return 0.0 if self.is_exact or self._top is None else 2.0 * self._top.boundary_mass(0, self.num_bins)

    @property
    def num_bytes(self) -> int:
        """Size of the state, kept rows included."""
        if self.num_classes is None:
            return 0
        kept = [array for rows in self._kept or [] for array in (rows.probabilities, rows.labels)]
        return sum(tensor.nbytes for tensor in self.state().values()) + sum(array.nbytes for array in kept)

    def _parts(self) -> Iterator[Mapping[str, np.ndarray | float]]:
        """The scores of sums, of bins, and of cells in order."""
        means = self._sums.means()
        yield means | ({"mean_entropy": self._entropy / self.num_rows} if self.ordered else {})
        yield binned.scores_of_bins(self._sums.bins)
        if self._top is None or self._classes is None:
            return
        yield scores_of_groups(self._top.groups(), self.num_bins)
        if self._in_order:
            yield binned.scores_of_columns(self._columns(self._classes), means["brier"])
        else:
            yield binned.scores_of_uniform_columns(self._classes.bins(), means["brier"])

    def _columns(self, sketch: Sketch) -> ColumnBins:
        """Bins of the class columns, cells standing for their rows where an equal-mass bin ends."""
        kept = [sketch.groups(k, above_threshold=True) for k in range(len(sketch.counts))]
        pooled = sketch.groups(None, above_threshold=True)
        return ColumnBins(
            sketch.bins(),
            stacked([equal_mass_bins(sketch.groups(k), self.num_bins) for k in range(len(kept))]),
            stacked([equal_mass_bins(groups, self.num_bins) for groups in kept]),
            equal_mass_bins(pooled, self.num_bins),
        )

    def _check_started(self) -> None:
        if self.num_classes is None:
            raise ValueError(
                "No batch was added yet, so the number of classes is unknown; add one, or give num_classes to the "
                "constructor."
            )


def _concatenated(kept: list[Rows]) -> Rows:
    return Rows(np.concatenate([rows.probabilities for rows in kept]), np.concatenate([rows.labels for rows in kept]))


def _nothing_left(labels: Any, mask: Any, ignore_index: int | None) -> bool:
    """Whether a batch has no row, or none once masked: normal in an evaluation, not an error."""
    target = np.asarray(labels.cpu() if isinstance(labels, torch.Tensor) else labels)
    if target.size == 0:
        return True
    if mask is None and (ignore_index is None or target.reshape(-1)[0] != ignore_index):
        return False
    keep = np.ones(target.shape, bool) if ignore_index is None else target != ignore_index
    if mask is not None:
        chosen = np.asarray(mask.cpu() if isinstance(mask, torch.Tensor) else mask)
        if chosen.shape != target.shape:
            return False
        keep &= chosen.astype(bool)
    return not keep.any()


def _check_nothing(predictions: Any, labels: Any, num_classes: int | None) -> None:
    """Raises ValueError for a batch without rows whose shape belongs to another stream."""
    shape = np.shape(as_numpy(unwrapped(predictions)))
    rows = np.shape(as_numpy(labels, "labels"))
    if 0 not in rows:
        return  # rows that are all masked; what they predict was never looked at
    if 0 not in shape[:1] and 0 not in shape:
        raise ValueError(f"predictions have {shape[0]} rows but there are 0 labels; they must be paired one to one.")
    known = num_classes is not None and len(shape) == len(rows) + 1 and shape[-1] > 0
    if known and shape[-1] != num_classes:
        raise ValueError(f"This accumulator has seen {num_classes} classes; the batch has {shape[-1]}.")
