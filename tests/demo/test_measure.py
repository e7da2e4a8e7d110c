import io

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import entropy
from sklearn.metrics import roc_auc_score

from peft_calib.demo.measure import Logits, draws_report, measure, reliability_grid, result_table
from peft_calib.prediction import Prediction


def draw(rng, rows, sharpness):
    """Logits that are right about the label's distribution, times a sharpness: 1 is calibrated."""
    logits = rng.normal(size=(rows, 4)) * 1.5
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (probabilities.cumsum(axis=1) > rng.random((rows, 1))).argmax(axis=1)
    return sharpness * logits, labels


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    (calibration, calibration_labels), (test, test_labels) = draw(rng, 4000, 2.5), draw(rng, 3000, 2.5)
    outside = rng.normal(size=(500, 4))
    logits = Logits(calibration.astype(np.float32), test.astype(np.float32), outside.astype(np.float32))
    return logits, calibration_labels, test_labels, measure("LoRA", logits, calibration_labels, test_labels)


def test_temperature_recovers_the_sharpness_and_mends_the_calibration(case):
    *_, result = case
    assert result.temperature == pytest.approx(2.5, rel=0.05)
    assert result.before["ece"] > 0.1
    assert result.after["ece"] < 0.03
    assert result.after["nll"] < result.before["nll"]
    assert result.after["accuracy"] == result.before["accuracy"]


def test_outside_numbers_match_scikit_learn(case):
    logits, *_, result = case
    for outside, temperature in ((result.outside_before, 1.0), (result.outside_after, result.temperature)):
        scaled = [rows.astype(np.float64) / temperature for rows in (logits.test, logits.outside)]
        test, other = (np.exp(rows) / np.exp(rows).sum(axis=1, keepdims=True) for rows in scaled)
        truth = np.repeat([0, 1], [len(test), len(other)])
        score = -np.concatenate([test.max(axis=1), other.max(axis=1)])
        assert outside.auroc == pytest.approx(roc_auc_score(truth, score), abs=1e-9)
        assert outside.mean_confidence == pytest.approx(other.max(axis=1).mean())
        assert outside.mean_entropy == pytest.approx(-(other * np.log(other)).sum(axis=1).mean())


def test_draws_report_against_its_definition():
    generator = torch.Generator().manual_seed(0)
    splits = [
        torch.randn(4, rows, 3, generator=generator, dtype=torch.float64) * scale
        for rows, scale in ((5, 1.0), (40, 0.5), (30, 2.0))
    ]
    predictions = [Prediction(sample_probabilities=z.softmax(-1), num_forwards=4.0) for z in splits]
    report = draws_report(predictions)
    assert (report["num_samples"], report["num_forwards"]) == (4, 4.0)
    information = [
        entropy(p.mean(0), axis=-1) - entropy(p, axis=-1).mean(0) for p in (z.softmax(-1).numpy() for z in splits)
    ]
    assert report["mutual_information"]["test"] == pytest.approx(information[1].mean())
    assert report["mutual_information"]["outside"] == pytest.approx(information[2].mean())
    auroc = roc_auc_score(np.repeat([0, 1], [40, 30]), np.concatenate(information[1:]))
    assert report["outside_auroc_of_mutual_information"] == pytest.approx(auroc)
    assert set(draws_report(predictions[:2])["mutual_information"]) == {"test"}


def test_a_temperature_is_never_reported_on_its_own_rows(case):
    logits, calibration_labels, *_ = case
    with pytest.raises(ValueError, match="calibration split"):
        measure("LoRA", Logits(logits.calibration, logits.calibration), calibration_labels, calibration_labels)


def test_the_table_fits_a_terminal_and_shows_the_numbers(case):
    *_, result = case
    stream = io.StringIO()
    Console(file=stream, width=80).print(result_table([result, result], "title"))
    text = stream.getvalue()
    assert text.count("+ temperature") == 2
    assert "…" not in text
    for report in (result.before, result.after):
        for key in ("accuracy", "nll", "brier", "ece"):
            assert f"{report[key]:.3f}" in text
    assert f"{result.outside_after.auroc:.3f}" in text


def test_the_table_without_outside_texts(case):
    logits, calibration_labels, test_labels, _ = case
    result = measure("LoRA", Logits(logits.calibration, logits.test), calibration_labels, test_labels)
    stream = io.StringIO()
    Console(file=stream, width=80).print(result_table([result]))
    assert "OOD" not in stream.getvalue()
    assert result.to_dict()["before"]["outside"] is None


def test_picture_has_two_diagrams_for_each_method(case, tmp_path):
    *_, result = case
    figure = reliability_grid([result, result])
    assert len(figure.axes) == 8
    figure.savefig(tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
