"""Rows of a calibrated model: labels drawn from their own probabilities."""

import numpy as np

from peft_calib.calibration.inputs import softmax


def drawn_rows(seed: int, size: int, classes: int, spread: float, levels: int | None = None):
    """`(N, C)` probabilities and labels; with `levels` nearly all rows are tied with others, and hardly calibrated."""
    generator = np.random.default_rng(seed)
    p = softmax(spread * generator.normal(size=(size, classes)))
    y = (generator.random((size, 1)) > p.cumsum(axis=1)).sum(axis=1).clip(max=classes - 1)
    if levels is not None:
        p = np.round(levels * p) + 1e-3
        p /= p.sum(axis=1, keepdims=True)
    return p, y
