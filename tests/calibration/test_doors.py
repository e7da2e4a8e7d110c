"""What does not belong is kept out wherever rows enter, and what is only odd is drawn, added or told as it is."""

import csv
import io

import evaluate
import numpy as np
import pytest
import torch

from peft_calib import metric_path
from peft_calib.calibration import (
    CalibrationAccumulator,
    before_after_diagram,
    calibration_report,
    classwise_diagram,
    compare,
    draw_uncertainty,
    reliability_diagram,
    risk_coverage_diagram,
)
from peft_calib.calibration.scores.selective import selective_scores
from peft_calib.metrics.page import parse_rows, safely

LABELS = np.array([0, 1, 1, 0, 1, 0, 0, 1])
IDS = np.array([0, 1, 0, 0, 1, 1, 0, 1])
CLASS_IDS = {
    "numpy": IDS,
    "int8": IDS.astype(np.int8),
    "unsigned": IDS.astype(np.uint8),
    "list": IDS.tolist(),
    "torch": torch.tensor(IDS),
    "column": IDS[:, None],
    "one-hot": np.eye(2, dtype=int)[IDS],
    "one-hot list": np.eye(2, dtype=int)[IDS].tolist(),
    "three classes": np.where(np.arange(8) == 2, 2, IDS),
}


@pytest.mark.parametrize("ids", CLASS_IDS.values(), ids=list(CLASS_IDS))
@pytest.mark.parametrize("kind", ["probabilities", "logits"])
def test_class_ids_are_no_predictions(ids, kind):
    for call in (
        lambda: calibration_report(ids, LABELS, input=kind),
        lambda: CalibrationAccumulator(input=kind).update(ids, LABELS),
        lambda: compare(ids, ids, LABELS, input=kind),
        lambda: selective_scores(ids, LABELS, input=kind),
        lambda: reliability_diagram(ids, LABELS, input=kind),
        lambda: evaluate.load(metric_path("calibration")).compute(predictions=ids, references=LABELS, input=kind),
    ):
        with pytest.raises(ValueError, match=r"class ids .* needs the probabilities \(or logits\) of every class"):
            call()


def test_text_is_no_prediction():
    with pytest.raises(TypeError, match="class names or text"):
        calibration_report(["0", "1"], [0, 1])


@pytest.mark.parametrize("name", ["calibration", "selective_prediction"])
def test_class_ids_are_noticed_behind_the_cast_of_arrow(name):
    for fill in (
        lambda metric: metric.add_batch(predictions=IDS, references=LABELS),
        lambda metric: [metric.add(prediction=int(p), reference=int(y)) for p, y in zip(IDS, LABELS, strict=True)],
    ):
        metric = evaluate.load(metric_path(name))
        fill(metric)
        with pytest.raises(ValueError, match="class ids"):
            metric.compute()


def test_numbers_that_happen_to_be_whole_stay_valid():
    certain = IDS.astype(float)
    with pytest.warns(UserWarning, match="probability of .nearly. 0"):
        report = calibration_report(certain, LABELS, confidence_level=None)
    assert report["mean_confidence"] == 1.0
    with pytest.warns(UserWarning, match="probability of .nearly. 0"):
        assert calibration_report(IDS.astype(bool), LABELS, confidence_level=None).scores == report.scores
    whole = np.stack([3 * IDS, np.full(8, 2)], axis=1)
    assert np.isfinite(calibration_report(whole, LABELS, input="logits", confidence_level=None)["nll"])
    votes = selective_scores(np.array([0, 1, 2, 3, 0, 1, 2, 3]), LABELS, input="uncertainty")
    assert votes["num_distinct_scores"] == 4
    metric = evaluate.load(metric_path("selective_prediction"))
    metric.add_batch(predictions=[0, 1, 2, 3], references=[0, 1, 0, 1])
    assert metric.compute(input="uncertainty")["num_distinct_scores"] == 4


def test_rows_that_are_not_numbers_are_refused():
    p = np.full((8, 2), 0.5)
    p[3] = np.nan
    for call in (
        lambda: calibration_report(p, LABELS),
        lambda: CalibrationAccumulator().update(p, LABELS),
        lambda: CalibrationAccumulator().update(torch.tensor(p).half(), LABELS),
        lambda: compare(p, p, LABELS),
        lambda: selective_scores(p, LABELS),
        lambda: draw_uncertainty(p[None]),
        lambda: calibration_report(p[:, 1], LABELS),
    ):
        with pytest.raises(ValueError, match="NaN"):
            call()


EMPTY = {
    "numpy": (np.zeros((0, 2)), np.zeros(0, int)),
    "float labels": (np.zeros((0, 2)), np.zeros(0)),
    "lists": ([], []),
    "torch": (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)),
    "one axis": (torch.zeros(0), torch.zeros(0, dtype=torch.long)),
    "tokens": (np.zeros((0, 5, 2)), np.zeros((0, 5), int)),
    "no tokens": (np.zeros((3, 0, 2)), np.zeros((3, 0), int)),
}


@pytest.mark.parametrize("empty", EMPTY.values(), ids=list(EMPTY))
@pytest.mark.parametrize("options", [{}, {"ordered": False}, {"ignore_index": None}])
def test_an_empty_batch_changes_nothing(empty, options):
    p = np.random.default_rng(0).dirichlet([1, 1], 8)
    plain, stream = CalibrationAccumulator(**options), CalibrationAccumulator(**options)
    plain.update(p, LABELS)
    for batch in (empty, (p[:5], LABELS[:5]), empty, (p[5:], LABELS[5:]), empty):
        stream.update(*batch)
    assert stream.compute().scores == pytest.approx(plain.compute().scores, nan_ok=True)
    assert stream.num_rows == 8


def test_an_empty_batch_of_another_stream_is_refused():
    stream = CalibrationAccumulator(num_classes=2)
    with pytest.raises(ValueError, match="has seen 2 classes; the batch has 3"):
        stream.update(np.zeros((0, 3)), np.zeros(0, int))
    with pytest.raises(ValueError, match="4 rows but there are 0 labels"):
        stream.update(np.full((4, 2), 0.5), np.zeros(0, int))
    with pytest.raises(ValueError, match="no row to measure"):
        stream.compute()


@pytest.mark.parametrize(
    "name", ["$x^$", "a_{b}$$", "US$ and CA$", r"price $\frac$", r"\$", "_hidden", "<b>&</b>", "$"]
)
def test_names_are_drawn_as_they_are_written(name):
    p, labels = np.random.default_rng(1).dirichlet([1, 1, 1], 60), np.arange(60) % 3
    figures = [
        classwise_diagram(p, labels, class_names=[name, "b", "c"]),
        reliability_diagram(p, labels, title=name),
        risk_coverage_diagram({name: (p, labels)}),
        before_after_diagram(p, p, labels),
    ]
    for figure in figures:
        figure.savefig(io.BytesIO())
    assert figures[2].axes[0].get_legend().get_texts()[0].get_text().replace("\\$", "$").strip().startswith(name[:1])
    with pytest.raises(ValueError, match="3 classes, but 2"):
        classwise_diagram(p, labels, class_names=["a", "b"])


def test_a_name_does_not_end_its_cell():
    p = np.random.default_rng(2).dirichlet([1, 1], 30)
    text = compare(p, p, np.arange(30) % 2, names=("a|b", "c\nd"), num_resamples=20).to_markdown()
    assert "a\\|b" in text and "| c d |" in text


def test_bins_beyond_measure_are_refused():
    p = np.full((8, 2), 0.5)
    for call in (lambda: calibration_report(p, LABELS, num_bins=10**6), lambda: CalibrationAccumulator(10**6)):
        with pytest.raises(ValueError, match="at most 10,000"):
            call()


HOSTILE = {
    "nested list": "[" * 100_000,
    "nested object": '{"predictions":' * 50_000,
    "label inf": "0.5,0.5,inf",
    "label 1e400": "0.5,0.5,1e400",
    "label nan": "0.5,0.5,nan",
    "long cell": '"' + "x" * (csv.field_size_limit() + 1) + '",1',
    "long number": '{"predictions": [' + "9" * 5000 + '], "references": [0]}',
    "huge label": '{"predictions": [[0.5, 0.5]], "references": [' + "9" * 30 + "]}",
    "null": '{"predictions": null, "references": null}',
    "mapping": '{"predictions": {"a": 1}, "references": [0]}',
    "null byte": "0.5,0.5\x00,1",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_every_paste_gets_an_answer(text):
    def measure(predictions, references, settings):
        return calibration_report(predictions, references, confidence_level=None, **settings).verdict(), ""

    heading, body = safely(measure, text, None, {})
    assert heading.startswith("### This cannot be measured") and len(heading) > 40 and body == ""


def test_a_line_is_counted_as_the_reader_counts():
    with pytest.raises(ValueError, match="Line 4"):
        parse_rows("p,label\n0.5,1\n\n0.5,x")
