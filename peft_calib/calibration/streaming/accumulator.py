"""Calibration of any number of rows in fixed memory, over batches and processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch

from ..answers import unwrapped
from ..bins import CHUNK, FEWEST_ROWS, BinStatistics, equal_mass_bins, top_outcomes
from ..inputs import NoRowsError, Rows, as_numpy, as_rows, check_num_bins
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
        self._kept: list[tuple[np.ndarray, np.ndarray]] | None = None
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
        plain = self._plain(predictions, labels, mask)
        batch = TopLabelSums(self.num_bins)
        if plain is None or not batch.add(*plain, checked=False):
            # Rows to drop, half precision, logits: prepared and checked again; bad input gets its message here.
            try:
                rows = as_rows(predictions, labels, input=self.input, mask=mask, ignore_index=self.ignore_index)
            except NoRowsError as nothing:  # normal in an evaluation
                self._check_classes(nothing.num_classes or self.num_classes)
                return
            plain = rows.probabilities, rows.labels
            batch = TopLabelSums(self.num_bins)
            batch.add(*plain, checked=True)
        self._take(*plain, batch)

    def _plain(self, predictions: Any, labels: Any, mask: Any) -> tuple[np.ndarray, np.ndarray] | None:
        """Arrays that need no preparation, their values unchecked; None for all others."""
        drops_a_class = self.ignore_index is not None and self.ignore_index >= 0
        if self.input != "probabilities" or mask is not None or drops_a_class:
            return None
        p, y = as_numpy(unwrapped(predictions)), as_numpy(labels, "labels")
        simple = (
            p.ndim == 2 and p.dtype in (np.float32, np.float64) and y.shape == p.shape[:1] and y.dtype.kind in "iu"
        )
        return (p, y.astype(np.int64, copy=False)) if simple and p.shape[1] > 1 and len(y) else None

    def _check_classes(self, num_classes: int | None) -> None:
        if self.num_classes is not None and num_classes != self.num_classes:
            raise ValueError(f"This accumulator has seen {self.num_classes} classes; the batch has {num_classes}.")

    def _take(self, probabilities: np.ndarray, labels: np.ndarray, batch: TopLabelSums) -> None:
        self._check_classes(probabilities.shape[1])
        if self.num_classes is None:
            self._start(probabilities.shape[1])
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
        confidence, correct = top_outcomes(probabilities, labels)
        self._top.add(confidence[None], correct[None])
        columns = np.ascontiguousarray(probabilities.T, dtype=np.float64)
        self._classes.add(columns, labels == np.arange(len(columns))[:, None])
        self._entropy += float(row_entropy(columns.T).sum())

    def _keep(self, probabilities: np.ndarray, labels: np.ndarray) -> None:
        if self._kept is not None and self.num_rows <= self._exact_rows:
            # Copies: the caller may reuse the batch's memory.
            self._kept.append((probabilities.astype(np.float64), labels.copy()))
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
        whole: list[Any] = [[self._sums.num_rows, self._sums.num_impossible], *map(np.ravel, counts)]
        real: list[Any] = [[self._sums.nll, self._sums.brier, self._entropy], *map(np.ravel, sums)]
        return {"counts": torch.from_numpy(np.concatenate(whole)), "sums": torch.from_numpy(np.concatenate(real))}

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
            ends = np.cumsum([array.size for array in arrays])
            for array, part in zip(arrays, np.split(values, ends[:-1]), strict=True):
                array[...] = part.reshape(array.shape)
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
        names = ("num_bins", "num_classes", "input", "ignore_index", "ordered")
        total = CalibrationAccumulator(**{name: getattr(self, name) for name in names})
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
            probabilities, labels = map(np.concatenate, zip(*self._kept, strict=True))
            values = compute_panel(Rows(probabilities, labels), self.num_bins)
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
        arrays: Iterable[Any] = chain(self.state().values(), *(self._kept or []))
        return sum(array.nbytes for array in arrays)

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

        def mass(column: int | None, above_threshold: bool) -> BinStatistics:
            return equal_mass_bins(sketch.groups(column, above_threshold), self.num_bins)

        columns = range(len(sketch.counts))
        every, kept = (stacked([mass(k, above) for k in columns]) for above in (False, True))
        return ColumnBins(sketch.bins(), every, kept, mass(None, True))

    def _check_started(self) -> None:
        if self.num_classes is None:
            raise ValueError(
                "No batch was added yet, so the number of classes is unknown; add one, or give num_classes to the "
                "constructor."
            )
