"""Comparisons as tables for a terminal: all of it fits, however many scores are asked for."""

import numpy as np
import pytest
from rich.console import Console

from peft_calib.calibration import compare_groups, compare_many
from peft_calib.runs.comparison_table import comparison_table

LABELS = np.arange(60) % 3


def predictions(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.dirichlet([1.0, 1.0, 1.0], 60) * 0.5 + 0.5 * np.eye(3)[LABELS]


def shown(pairs, width: int) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison_table(pairs, {"most frequent class": {"nll": 1.0}}, "60 rows"))
    return console.export_text()


@pytest.mark.parametrize("scores", [["nll", "ece"], ["accuracy", "nll", "brier", "ece", "smooth_ece", "aurc", "mce"]])
def test_a_comparison_of_runs_fits_80_columns(scores):
    runs = {"a-run-with-a-rather-long-name-0": predictions(0), "b": predictions(1)}
    text = shown(compare_many(runs, LABELS, baseline="b", scores=scores, num_resamples=50), 80)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "…" not in text
    for word in (*scores, "60 rows", "most frequent"):
        assert word in text


def test_a_comparison_of_methods_fits_80_columns():
    runs = {name: [predictions(seed) for seed in seeds] for name, seeds in {"lora": (0, 1), "members": (2, 3)}.items()}
    scores = ["accuracy", "nll", "brier", "ece", "smooth_ece", "aurc"]
    text = shown(compare_groups(runs, LABELS, baseline="lora", scores=scores, num_resamples=50), 80)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "…" not in text
    assert text.count("lora") == 4  # each of two tables names it as a line and as what the other is held against
    assert text.count("±") == 2 * len(scores) + 1
