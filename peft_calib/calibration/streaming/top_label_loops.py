# SPDX-License-Identifier: Apache-2.0
"""The fused pass over the top label as loops that numba compiles: the same sums in half the time or less.

Import it where numba may be missing only through `top_label_pass`. Every function takes `classes`, a tuple as long as
there are classes: its length is part of its type and so a constant of the compilation, loops over classes dissolve,
and those over rows become vector instructions. Compiling takes a second for each number of classes; numba keeps the
result beside this file or in the user's cache folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import float64, int32, int64, njit, uint32

from peft_calib.calibration.bins import NEAR, SHRINK
from peft_calib.calibration.inputs import SUM_TOLERANCE
from peft_calib.calibration.scores.binned import LOG_GROUP, SMALLEST_PROBABILITY

# Rows taken at a time, which stay in the fastest cache.
CHUNK = 1024
# Histograms side by side, so that successive rows of one bin do not wait for each other; a power of two.
LANES = 4


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Sums may be taken in any order, but a NaN stays one: the checks rely on its failing every comparison.
    options: dict[str, Any] = {"error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder that the result could be kept in
        return njit(**options)(function)


@_compiled
def sum_rows(p, labels, classes, edges, counts, confidence, totals):  # type: ignore[no-untyped-def]
    """Adds rows to sums.

    Args:
        p: `(N * C,)` float32 or float64 probabilities.
        labels: `(N,)` int64.
        classes: tuple of length C.
        edges: `(B + 1,)` float64 edges of the bins.
        counts: `(LANES, 2 B)` int64, wrong and right rows of each bin in turn.
        confidence: `(LANES, 2 B)` float64, sums of the confidence likewise.
        totals: `(3,)` float64: NLL, Brier score, rows whose true class had a probability of (nearly) 0.

    Returns:
        False if a row is no distribution, holds a number above 1, or has a label that is no class; then the sums are
        of no further use.
    """
    C = len(classes)
    best, of_label = np.empty(CHUNK), np.ones(CHUNK)
    # Unsigned: of a signed index numba asks each time whether it counts from the end.
    top, code = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.uint32)
    for start in range(0, len(labels), CHUNK):
        m = min(CHUNK, len(labels) - start)
        rows, y = p[C * start : C * (start + m)], labels[start : start + m]
        fine, squares = _find_top(rows, classes, best[:m], top)
        if not (fine and _find_label(rows, y, classes, of_label)):
            return False
        chosen, impossible = _find_bin(best[:m], top, y, of_label, edges, code)
        of_label[m:] = 1.0
        totals[0] += _log_loss(of_label)
        totals[1] += squares - 2.0 * chosen + m
        totals[2] += impossible
        for i in range(m):
            lane = uint32(i & (LANES - 1))
            counts[lane, code[i]] += 1
            confidence[lane, code[i]] += best[i]
    return True


@_compiled
def _find_top(p, classes, best, top):  # type: ignore[no-untyped-def]
    """Confidence and first most probable class of each row; whether all are distributions; the sum of squares."""
    C = len(classes)
    wrong, squares = int32(0), 0.0
    for i in range(len(best)):
        highest, total, square, first = float64(p[C * i]), 0.0, 0.0, int64(0)
        for c in range(C):
            value = float64(p[C * i + c])
            first = int64(c) if value > highest else first
            highest = value if value > highest else highest
            total += value
            square += value * value
            wrong |= int32(value < 0)  # a NaN or an infinity shows in the total
        wrong |= int32(not (abs(total - 1.0) <= SUM_TOLERANCE)) | int32(not (highest <= 1))
        squares += square
        best[i], top[i] = highest, first
    return wrong == 0, squares


@_compiled
def _find_label(p, labels, classes, of_label):  # type: ignore[no-untyped-def]
    """Probability of each row's label; whether every label is a class."""
    C = len(classes)
    wrong = int64(0)
    for i in range(len(labels)):
        label, value = labels[i], float64(p[C * i])
        for c in range(1, C):
            value = float64(p[C * i + c]) if label == c else value
        wrong |= int64((label < 0) | (label >= C))
        of_label[i] = value
    return wrong == 0


@_compiled
def _find_bin(best, top, labels, of_label, edges, code):  # type: ignore[no-untyped-def]
    """Twice the bin of each row, and 1 more if it is right; the sum of `of_label`; how many of it are (nearly) 0."""
    num_bins = len(edges) - 1
    near, chosen, impossible = int32(0), 0.0, int64(0)
    for i in range(len(best)):
        product = best[i] * (num_bins - SHRINK)
        index = int32(product)
        near |= int32(index + 1 - product < NEAR) & int32(best[i] < 1)
        code[i] = 2 * min(index, int32(num_bins - 1)) + int32(top[i] == labels[i])
        chosen += of_label[i]
        impossible += int64(of_label[i] < SMALLEST_PROBABILITY)
    if near:
        for i in range(len(best)):
            index = int32(code[i] >> 1)
            while index < num_bins - 1 and best[i] > edges[index + 1]:
                index += 1
            while index > 0 and best[i] <= edges[index]:
                index -= 1
            code[i] = 2 * index + int32(code[i] & 1)
    return chosen, impossible


@_compiled
def _log_loss(of_label):  # type: ignore[no-untyped-def]
    """Minus the sum of logarithms, taken of products: `of_label` is padded with ones to whole groups."""
    loss = 0.0
    for i in range(0, len(of_label), LOG_GROUP):
        product = 1.0
        for j in range(LOG_GROUP):
            product *= max(of_label[i + j], SMALLEST_PROBABILITY)
        loss -= math.log(product)
    return loss
