"""Fewer resamples where a test does not read the intervals: tests/calibration holds them to what they promise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from peft_calib.calibration.entities import report as entities
from peft_calib.calibration.labels import report as labels
from peft_calib.calibration.report import confidence, measured


@contextmanager
def few_resamples(count: int = 40) -> Iterator[None]:
    """Reports take their intervals from `count` resamples instead of a thousand and more."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (entities, labels, confidence, measured):
            patch.setattr(module, "num_resamples_for", lambda *_: count)
        yield
