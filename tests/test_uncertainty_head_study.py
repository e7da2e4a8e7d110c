"""The study of the uncertainty head: from features to a page, on rows whose best score is known; what is stored."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from peft_calib.calibration import confidence_report
from peft_calib.uncertainty_head import FeatureSet
from peft_calib.uncertainty_head.baselines.sequences import with_tokens

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks"
PROTOCOL = {
    "cells": ["a", "b"],
    "runs": 2,
    "members": 2,
    "seeds": 1,
    "fit_rows": 200,
    "validation_rows": 120,
    "few_rows": 100,
    "reference": "softmax_response",
    "num_resamples": 8,
    "num_bins": 15,
}
SIZES = {"pool": 320, "own": 60, "test": 150, "elsewhere": 80}


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(FOLDER))
    try:
        import uncertainty_head as found
        import uncertainty_head_page
        import uncertainty_head_rows
        import uncertainty_head_table

        found.rows, found.tables, found.pages = uncertainty_head_rows, uncertainty_head_table, uncertainty_head_page
        yield found
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def place(study, tmp_path_factory):
    """Runs whose predictions are wrong where the last feature is large, which their heads do not read."""
    folder = tmp_path_factory.mktemp("features")
    for number, (cell, run) in enumerate((cell, run) for cell in PROTOCOL["cells"] for run in range(2)):
        base = torch.randn(3, 5, generator=torch.Generator().manual_seed(hash_of(cell, "")))
        base[:, -1] = 0.0
        weight = base + 0.02 * torch.randn(3, 5, generator=torch.Generator().manual_seed(number))
        bias = torch.zeros(3)
        inside = folder / f"{cell}-{run}"
        inside.mkdir()
        for name, size in SIZES.items():
            rows = torch.Generator().manual_seed(hash_of(cell, name))  # all runs of a cell have the same rows
            h, odd = torch.randn(1, size, 5, generator=rows), torch.rand(size, generator=rows)
            logits = h @ weight.T + bias
            wrong = odd < torch.sigmoid(3 * h[0, :, -1] - 1.5)
            best = (h[0] @ base.T).argmax(-1)
            labels = torch.where(wrong, (best + 1) % 3, best)
            features = FeatureSet(h, logits, labels, adapter=f"{cell}{run}")
            features = with_tokens(features, h[0].half(), torch.arange(1, size + 1))
            study.rows.save(inside / f"{name}.safetensors", features)
            if name in study.rows.OF_FUNCTIONS:
                passes = FeatureSet(h[:, :, :0].repeat(2, 1, 1), torch.cat([logits, 0.9 * logits]), labels)
                study.rows.save(inside / f"{study.rows.passes_of(name)}.safetensors", passes)
        save_file({"weight": weight, "bias": bias}, inside / "head.safetensors")
    return folder


def hash_of(cell: str, name: str) -> int:
    return sum(map(ord, cell + name))


@pytest.fixture(scope="module")
def results(study, place, tmp_path_factory):
    """Every method, with one short trial a head and cheap baselines; a second call does nothing."""
    brief = {"lr": 1e-2, "epochs": 6}
    gentle = {"alpha": 0.01, "beta": 0.001}
    heads = {name: (rows, {**gentle, **options, **brief}) for name, (rows, options) in study.HEADS.items()}
    quick = study.ProbeTraining(learning_rates=(0.02,), epochs=8)
    baselines = {name: (kind, dict(options)) for name, (kind, options) in study.BASELINES.items()}
    for name in ("linear probe", "attention probe"):
        baselines[name][1]["training"] = quick
    baselines["RDE, normalised"][1]["num_components"] = 3
    folder = tmp_path_factory.mktemp("study")
    protocol, output = folder / "protocol.json", folder / "results.json"
    protocol.write_text(json.dumps(PROTOCOL))

    def call(*arguments: str) -> None:
        patch.setattr(sys, "argv", ["study", *arguments, "--protocol", str(protocol), "--place", str(place)])
        study.main()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "HEADS", heads)
        patch.setattr(study, "BASELINES", baselines)
        call("fit")
        files = {file: file.stat().st_mtime_ns for file in sorted((place / "fits").iterdir())}
        call("fit")
        assert {file: file.stat().st_mtime_ns for file in sorted((place / "fits").iterdir())} == files
        assert len(files) == 4
        call("table", "--output", str(output))
    return json.loads(output.read_text())


def test_what_reads_the_feature_that_tells_the_errors_is_found_to_be_better(results):
    pooled, key = results["in distribution"], "auroc against softmax response"
    for name in ("linear probe", "attention probe"):
        assert pooled[name][key]["difference"] > 0.02, name
    assert pooled["linear probe"][key]["low"] > 0
    assert pooled["softmax response"]["rank by auroc"] > pooled["linear probe"]["rank by auroc"]
    assert results["claims"]["2 AdUE is better calibrated than the softmax response"]["held"] in (True, False)
    assert set(results["cells"]) == {"a", "b", "a elsewhere", "b elsewhere"} and "shifted" in results
    assert results["base score stayed"]["head v2, own rows"] <= 1
    assert "dropout, bald" in pooled and "dropout, bald" not in results["shifted"]
    assert all("ece" in found for found in pooled.values())  # every method prices its errors


def test_the_error_of_calibration_is_that_of_the_toolkit(study):
    generator = np.random.default_rng(0)
    p = generator.random(300)
    wrong = generator.random(300) < p**2
    expected = confidence_report(1 - p, ~wrong, confidence_level=None)["ece"]
    assert study.tables.ece_of_errors(p, wrong) == pytest.approx(expected, abs=1e-9)


def test_an_interval_covers_rows_and_runs_and_a_difference_of_nothing_is_nothing(study):
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(3, 2, 41, 5))
    apart = study.tables.difference([(noise, noise + 1.0)] * 2, 0)
    assert apart == {"difference": -1.0, "low": -1.0, "high": -1.0}
    runs = np.broadcast_to(np.array([1.0, 2.0, 3.0])[:, None, None, None], noise.shape)
    found = study.tables.difference([(noise * 0 + runs, noise * 0)], 0)
    # three runs with standard deviation 1: 2 +- 4.303 / sqrt(3)
    assert found["difference"] == 2.0 and found["high"] - 2.0 == pytest.approx(4.3027 / 3**0.5, abs=1e-3)


def test_a_page_is_written_between_its_marks_and_nowhere_else(study, results):
    pages = study.pages
    text = f"before\n{pages.BEGIN}\nearlier figures\n{pages.END}\nafter\n"
    found = pages.with_results(text, results)
    assert found.startswith("before\n") and found.endswith("after\n") and "earlier figures" not in found
    assert pages.with_results(found, results) == found
    gain = results["in distribution"]["linear probe"]["auroc against softmax response"]["difference"]
    assert f"{100 * gain:+.1f} [" in found


def test_the_page_is_what_the_results_say(study):
    stored = study.stored(FOLDER / "results" / "uncertainty_head.json")
    text = study.PAGE.read_text(encoding="utf-8")
    assert text == study.pages.with_results(text, stored)
