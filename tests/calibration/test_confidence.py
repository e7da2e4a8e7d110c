"""A confidence that is no class probability is measured by the scores, intervals and bands of a report."""

import json

import numpy as np
import pytest

from peft_calib.calibration import calibration_report, confidence_report
from peft_calib.calibration.scores.selective import selective_scores
from peft_calib.json_files import without_nan


def drawn(size: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Calibrated probabilities of an error, and the errors."""
    generator = np.random.default_rng(seed)
    chance = generator.beta(1, 4, size)
    return chance, generator.random(size) < chance


def test_the_confidence_of_two_classes_has_the_numbers_of_their_report():
    generator = np.random.default_rng(1)
    sure = 0.5 + 0.5 * generator.random(300)
    right = (generator.random(300) < sure).astype(int)
    whole = calibration_report(np.stack([1 - sure, sure], axis=1), right, num_resamples=200)
    found = confidence_report(sure, right, num_resamples=200)
    for key in set(found) - {"brier"}:
        assert found[key] == pytest.approx(whole[key], abs=1e-12)
    for key in set(found.intervals) - {"brier"}:
        assert found.intervals[key] == pytest.approx(whole.intervals[key], abs=1e-12)
    assert found.floor["ece"] == pytest.approx(whole.floor["ece"], abs=1e-12)
    assert found["brier"] == pytest.approx(whole["brier"] / 2)
    assert found.intervals["brier"] == pytest.approx(tuple(end / 2 for end in whole.intervals["brier"]))


def test_a_confidence_below_one_half_is_no_other_class():
    chance, wrong = drawn()
    found = confidence_report(1 - chance, ~wrong, confidence_level=None)
    expected = selective_scores(chance, wrong, input="uncertainty")
    for key in ("error_auroc", "error_aupr", "aurc", "e_aurc", "augrc"):
        assert found[key] == pytest.approx(expected[key], abs=1e-12)
    bins = np.minimum((15 * (1 - chance)).astype(int), 14)
    gaps = [abs(chance[bins == b].sum() - wrong[bins == b].sum()) for b in range(15)]
    assert found["ece"] == pytest.approx(sum(gaps) / len(wrong), abs=1e-9)


@pytest.mark.parametrize("key", ["error_auroc", "aurc", "brier"])
def test_intervals_are_those_of_resampled_rows(key):
    chance, wrong = drawn()
    low, high = confidence_report(1 - chance, ~wrong, num_resamples=500).intervals[key]
    generator, again = np.random.default_rng(2), []
    for _ in range(500):
        rows = generator.integers(0, len(wrong), len(wrong))
        scores = selective_scores(chance[rows], wrong[rows], input="uncertainty")
        again.append(((chance - wrong)[rows] ** 2).mean() if key == "brier" else scores[key])
    plain = np.quantile(again, (0.025, 0.975))
    assert np.abs(np.array([low, high]) - plain).max() < 0.2 * (plain[1] - plain[0])


def test_a_calibrated_confidence_lies_in_the_band_and_a_shifted_one_above():
    chance, wrong = drawn(2000)
    found = confidence_report(1 - chance, ~wrong, num_resamples=200)
    assert found.intervals["ece"][0] == 0.0 and found["ece"] <= found.floor["ece"].high
    shifted = confidence_report(1 - 0.3 * chance, ~wrong, num_resamples=200)
    assert shifted["ece"] > shifted.floor["ece"].high


def test_rows_without_an_error_have_no_ranking_but_a_report():
    found = confidence_report([0.9, 0.8], [True, True], num_resamples=50)
    assert np.isnan(found["error_auroc"]) and found["aurc"] == 0.0
    content = json.loads(json.dumps(without_nan(found.to_dict()), allow_nan=False))
    assert content["settings"]["num_errors"] == 0 and content["error_auroc"] is None


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        ([0.5, 1.2], [1, 0], r"in \[0, 1\], got 0.5 to 1.2"),
        ([0.5, np.nan], [1, 0], r"in \[0, 1\]"),
        ([0.5], [1, 0], "paired"),
        ([0.5, 0.5], [1, 2], "zeros and ones"),
        ([], [], "not empty"),
    ],
)
def test_what_is_no_confidence_is_refused(confidence, correct, message):
    with pytest.raises(ValueError, match=message):
        confidence_report(confidence, correct)
