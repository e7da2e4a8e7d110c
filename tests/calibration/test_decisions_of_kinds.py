"""Rules of labels and of numbers keep their promises over many splits, and what is commonly done does not."""

import json
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import decisions_of_kinds

    return decisions_of_kinds


def test_the_study_has_been_run_to_the_end_and_the_page_shows_it(study):
    results = json.loads((BENCHMARKS / "results" / "decisions_of_kinds.json").read_text())
    page = (BENCHMARKS.parent / "docs" / "decide.md").read_text()
    assert all(table in page for table in study.markdown(results)) and results["repeats"] == 2000
    cases = {line["case"] for line in results["labels"]}
    assert cases == set(study.CASES) == {"calibrated", "over-confident", "tied", "tiny"}
    for line in (*results["labels"], *results["numbers"]):
        if "plug-in" in line["kind"]:
            assert line["violations"] > (0.1 if line["case"] == "tied" else 0.4), line
        elif "on average" in line["kind"]:
            assert line["mean coverage"] + 2 * line["standard error"] >= 1 - results["alpha"], line
        else:
            assert line["violations"] <= line["most"], line


@pytest.mark.parametrize("case", ["over-confident", "tied", "tiny"])
def test_promises_hold_over_splits_and_those_of_the_plug_in_do_not(study, case):
    """60 splits, of which 5 % and three standard errors are 7.6 at most."""
    lines = {line["kind"]: line for line in (*study.labels_of(case, 60), *study.numbers_of(case, 60))}
    most = 0.05 + 3 * np.sqrt(0.05 * 0.95 / 60)
    for kind in ("all labels", "each label", "absolute, in 95 % of splits", "normalised, in 95 % of splits"):
        assert lines[kind]["violations"] <= most, lines[kind]
    for score in ("absolute", "normalised"):
        line = lines[f"{score}, on average"]
        assert line["mean coverage"] + 3 * line["standard error"] >= 0.9, line
        assert lines[f"{score}, plug-in"]["violations"] > 0.2
    assert lines["plug-in, all labels"]["violations"] > (0.1 if case == "tied" else 0.6)
