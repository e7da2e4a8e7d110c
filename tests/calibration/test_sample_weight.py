"""Rows that count differently: scores as of repeated rows, closed forms, intervals, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.metrics import accuracy_score, average_precision_score, log_loss, roc_auc_score

from peft_calib.calibration import (
    ConformalSets,
    SelectiveThreshold,
    TemperatureScaling,
    calibration_report,
    load_decision,
)
from peft_calib.calibration.inputs import as_rows, effective_rows
from peft_calib.calibration.resampling.intervals import bootstrap_draws, bootstrap_intervals, weighted_draws
from peft_calib.calibration.scores.panel import compute_panel
from peft_calib.calibration.scores.table import KEYS, SCORES

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def rows(count: int, seed: int, classes: int = 3, *, sharp: float = 1.0, decimals: int | None = None):
    generator = np.random.default_rng(seed)
    truth = generator.dirichlet([0.6] * classes, count)
    labels = (generator.random((count, 1)) > truth.cumsum(axis=1)).sum(axis=1).clip(max=classes - 1)
    p = truth**sharp
    p /= p.sum(axis=1, keepdims=True)
    if decimals is not None:  # ties by the dozen
        p = np.maximum(p.round(decimals), 1e-3)
        p /= p.sum(axis=1, keepdims=True)
    return p, labels, generator


def panel(p, labels, weights=None) -> dict[str, float]:
    return compute_panel(as_rows(p, labels, sample_weight=weights), 15)


@pytest.mark.parametrize("decimals", [None, 1])
@pytest.mark.parametrize("classes", [2, 4])
def test_a_row_of_weight_two_is_there_twice_in_every_score(decimals, classes):
    p, labels, generator = rows(300, 0, classes, sharp=1.7, decimals=decimals)
    weights = generator.integers(0, 4, 300)
    repeated = np.repeat(np.arange(300), weights)
    found, expected = panel(p, labels, weights), panel(p[repeated], labels[repeated])
    assert list(found) == list(expected) == list(KEYS)
    for key in KEYS:
        assert found[key] == pytest.approx(expected[key], rel=1e-10, abs=1e-12), key


def test_equal_weights_are_none():
    p, labels, _ = rows(400, 1, sharp=2.0)
    found, plain = panel(p, labels, np.ones(400)), panel(p, labels)
    for key in KEYS:
        assert found[key] == pytest.approx(plain[key], rel=1e-10, abs=1e-12), key
    # and means, bins of a share and rankings by pairs do not change with the unit of the weights
    half = panel(p, labels, np.full(400, 0.25))
    for key in set(KEYS) - {"rmsce_debiased", "aurc", "e_aurc"}:
        assert half[key] == pytest.approx(plain[key], rel=1e-9, abs=1e-11), key


def test_peers_and_closed_forms_agree_with_fractional_weights():
    p, labels, generator = rows(500, 2, sharp=1.5)
    weights = generator.gamma(0.7, size=500)
    found = panel(p, labels, weights)
    share, predicted, confidence = weights / weights.sum(), p.argmax(1), p.max(1)
    wrong = predicted != labels
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted, sample_weight=weights), abs=1e-12)
    assert found["nll"] == pytest.approx(log_loss(labels, p, sample_weight=weights), rel=1e-9)
    assert found["brier"] == pytest.approx(share @ ((p - np.eye(3)[labels]) ** 2).sum(1), rel=1e-12)
    assert found["mean_confidence"] == pytest.approx(share @ confidence, rel=1e-12)
    assert found["mean_entropy"] == pytest.approx(share @ -(p * np.log(p)).sum(1), rel=1e-12)
    assert found["error_auroc"] == pytest.approx(roc_auc_score(wrong, -confidence, sample_weight=weights), rel=1e-9)
    aupr = average_precision_score(wrong, -confidence, sample_weight=weights)
    assert found["error_aupr"] == pytest.approx(aupr, rel=1e-9)
    bins = np.ceil(confidence * 15).astype(int)
    gaps = [share[bins == b] @ (confidence - ~wrong)[bins == b] for b in np.unique(bins)]
    assert found["ece"] == pytest.approx(np.abs(gaps).sum(), rel=1e-9)
    order = np.argsort(confidence)
    drift = np.cumsum((share * (confidence - ~wrong))[order])
    assert found["ks_error"] == pytest.approx(np.abs(drift).max(), rel=1e-9)
    total = found["brier_reliability"] - found["brier_resolution"] + found["brier_uncertainty"]
    assert total + found["brier_within_bin"] == pytest.approx(found["brier"], rel=1e-12)


def test_resamples_weigh_the_rows_by_the_arithmetic_of_the_scores():
    """The last replicate, which has each row once, is the panel; a resample is the panel of the rows it drew."""
    p, labels, generator = rows(250, 3, sharp=1.5, decimals=2)
    weights = generator.gamma(1.5, size=250)
    weights /= weights.mean()
    given = as_rows(p, labels, sample_weight=weights)
    counts = np.stack([np.ones(250, int), generator.multinomial(250, np.full(250, 1 / 250))], axis=1)
    draws = weighted_draws(given, counts, num_bins=15, scores=KEYS)
    whole = compute_panel(given, 15)
    # of equal-mass bins a resample keeps the edges of all rows, as it does without weights; the grid of smooth ECE
    # is coarser there
    for key in set(KEYS) - {"smooth_ece"}:
        assert draws[key][0] == pytest.approx(whole[key], rel=2e-5, abs=2e-6), key
    drawn = panel(p[counts[:, 1] > 0], labels[counts[:, 1] > 0], (weights * counts[:, 1])[counts[:, 1] > 0])
    own_edges = {"ace", "tace", "tace_classwise", "ace_classwise", "smooth_ece"}
    for key in set(KEYS) - own_edges:
        assert draws[key][1] == pytest.approx(drawn[key], rel=2e-5, abs=2e-6), key


def test_intervals_do_not_hang_on_the_unit_and_are_wider_where_few_rows_weigh_most():
    p, labels, generator = rows(600, 4, sharp=1.5)
    weights = generator.gamma(0.3, size=600)
    options = {"num_resamples": 200, "seed": 0}
    one = bootstrap_intervals(as_rows(p, labels, sample_weight=weights), **options)
    ten = bootstrap_intervals(as_rows(p, labels, sample_weight=10 * weights), **options)
    none = bootstrap_intervals(as_rows(p, labels), **options)
    for key in set(KEYS) - {"brier_within_bin"}:
        assert one[key] == pytest.approx(ten[key], rel=1e-6, abs=1e-9), key
    for key in ("accuracy", "nll", "brier", "ece", "aurc", "error_auroc", "smooth_ece", "classwise_ece"):
        assert np.diff(one[key])[0] > 1.2 * np.diff(none[key])[0], key
    assert effective_rows(weights) < 200


@pytest.mark.parametrize("key", ["accuracy", "nll", "brier", "aurc", "error_auroc", "ece", "brier_reliability"])
def test_intervals_hold_the_truth_of_a_population_that_is_weighed(key):
    """Rows drawn from one population and weighed by the density ratio to another: its scores are known by size."""
    generator = np.random.default_rng(5)

    def sample(count: int):
        x = generator.random(count)  # confidence rises with x; rows to come have density 2 x
        q = 0.5 + 0.5 * x
        labels = (generator.random(count) > q**1.5).astype(int)
        return np.stack([q, 1 - q], axis=1), labels, 2 * x

    p, labels, weights = sample(200_000)
    truth = panel(p, labels, weights)[key]
    held = 0
    for _ in range(60):
        p, labels, weights = sample(250)
        given = as_rows(p, labels, sample_weight=weights)
        low, high = bootstrap_intervals(given, num_resamples=200, seed=0, scores=[key])[key]
        held += low <= truth <= high
    assert held >= 51  # of 60 at 95 %: fewer than 51 have probability 3e-4


def test_a_report_with_weights():
    p, labels, generator = rows(300, 6, sharp=1.5)
    weights = generator.gamma(1.0, size=300)
    report = calibration_report(p, labels, sample_weight=weights, num_resamples=50)
    assert report.scores == panel(p, labels, weights)
    assert report.settings["sum_of_weights"] == pytest.approx(weights.sum())
    assert report.settings["effective_rows"] == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
    for key, (low, high) in report.intervals.items():
        if key != "brier_within_bin":
            assert low <= report[key] + 1e-9 and report[key] - 1e-9 <= high, key
    assert report.bins.counts.sum() == pytest.approx(report.settings["effective_rows"])
    np.testing.assert_allclose(report.bins.gaps @ report.bins.weights, report["confidence_gap"], atol=1e-12)
    page = report.to_html()
    assert page.count("<figure>") == 3 and "effective_rows" in page  # pictures of bins; others are of plain rows
    assert "effective_rows" in report.to_markdown()
    again = calibration_report(torch.tensor(p), labels, sample_weight=weights.tolist(), num_resamples=50)
    assert again.to_json() == report.to_json()


def test_a_weight_of_zero_leaves_a_row_out_and_tokens_take_that_of_their_text():
    p, labels, _ = rows(40, 7)
    weights = np.where(np.arange(40) < 10, 0.0, 1.5)
    mask = np.arange(40) % 3 > 0
    found, expected = panel(p, labels, weights), panel(p[10:], labels[10:], weights[10:])
    assert found == expected
    both = as_rows(p, labels, mask=mask, sample_weight=weights)
    assert both.weights.tolist() == [1.5] * int((mask & (weights > 0)).sum()) and len(both.labels) == len(both.weights)
    tokens = as_rows(p.reshape(8, 5, 3), labels.reshape(8, 5), sample_weight=np.arange(1, 9))
    assert tokens.weights.tolist() == np.repeat(np.arange(1.0, 9.0), 5).tolist()


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ([1.0] * 39, "sample_weight has shape"),
        ([-1.0] + [1.0] * 39, "finite numbers of at least 0"),
        ([float("nan")] + [1.0] * 39, "finite numbers of at least 0"),
        ([0.0] * 40, "finite numbers of at least 0"),
    ],
)
def test_weights_that_are_none_are_refused(weights, told):
    p, labels, _ = rows(40, 8)
    with pytest.raises(ValueError, match=told):
        calibration_report(p, labels, sample_weight=weights)
    with pytest.raises(ValueError, match=told):
        TemperatureScaling().fit(np.log(p), labels, sample_weight=weights)


def test_what_is_not_measured_with_weights_is_refused():
    p, labels, _ = rows(40, 8)
    w = np.ones(40)
    with pytest.raises(ValueError, match="measure each group, or class, by itself"):
        calibration_report(p, labels, sample_weight=w, groups=["a", "b"] * 20)
    with pytest.raises(ValueError, match="does not go with per_class"):
        calibration_report(p, labels, sample_weight=w, per_class=True)
    with pytest.raises(ValueError, match="own convention"):
        calibration_report(p, labels, sample_weight=w, convention="torchmetrics")


# ------------------------------------------------------------------------------------------------------- temperature


def test_a_temperature_is_that_of_the_weighted_loss():
    p, labels, generator = rows(400, 9, sharp=2.5)
    logits, weights = np.log(p), generator.integers(0, 4, 400)
    repeated = np.repeat(np.arange(400), weights)
    found = TemperatureScaling().fit(logits, labels, sample_weight=weights)
    twice = TemperatureScaling().fit(logits[repeated], labels[repeated])
    assert found.temperature == pytest.approx(twice.temperature, rel=1e-8)
    assert found.fit_result.num_rows == (weights > 0).sum()
    fractional = generator.gamma(0.8, size=400)
    fitted = TemperatureScaling().fit(logits, labels, sample_weight=fractional)

    def loss(log_t: float) -> float:
        q = p ** np.exp(-log_t)
        return -float(fractional @ np.log(q[np.arange(400), labels] / q.sum(1)))

    best = np.exp(minimize_scalar(loss, bounds=(-2, 3), method="bounded", options={"xatol": 1e-10}).x)
    assert fitted.temperature == pytest.approx(best, rel=1e-6)


def test_the_interval_of_a_temperature_counts_rows_and_not_weights():
    p, labels, generator = rows(300, 10, sharp=2.5)
    plain = TemperatureScaling().fit(np.log(p), labels).fit_result
    same = TemperatureScaling().fit(np.log(p), labels, sample_weight=np.full(300, 7.0)).fit_result
    assert (same.low, same.high) == pytest.approx((plain.low, plain.high), rel=1e-9)
    few = TemperatureScaling().fit(np.log(p), labels, sample_weight=generator.gamma(0.2, size=300)).fit_result
    assert np.log(few.high / few.low) > 1.5 * np.log(plain.high / plain.low)


def test_the_interval_of_a_weighted_temperature_holds_the_truth():
    """Sharpened in half of the rows; of the rows to come nine in ten are of that half, as their weights say."""
    generator = np.random.default_rng(11)

    def sample(count: int):
        p, labels, _ = rows(count, int(generator.integers(1 << 30)))
        sharp = generator.random(count) < 0.5
        logits = np.log(p) * np.where(sharp, 3.0, 1.5)[:, None]
        return logits, labels, np.where(sharp, 1.8, 0.2)

    logits, labels, weights = sample(200_000)
    truth = TemperatureScaling().fit(logits, labels, sample_weight=weights).fit_result.fitted
    fits = []
    for _ in range(100):
        logits, labels, weights = sample(200)
        fits.append(TemperatureScaling().fit(logits, labels, sample_weight=weights).fit_result)
    held = sum(fit.low <= truth <= fit.high for fit in fits)
    assert held >= 88  # of 100 at 95 %: fewer than 88 have probability 2e-3


# --------------------------------------------------------------------------------------------------------- decisions


def test_no_threshold_is_promised_with_weights_and_what_to_do_is_said():
    p, labels, generator = rows(400, 12)
    weights = 2 * p.max(1)
    rule = SelectiveThreshold(risk=0.4)
    with pytest.raises(ValueError, match=r"No guarantee can be given with `sample_weight`: .* weight / bound"):
        rule.fit(p, labels, sample_weight=weights)
    kept = generator.random(400) < weights / 2.0  # what the message says to do
    assert rule.fit(p[kept], labels[kept]).num_rows == kept.sum()


KINDS = [("lac", False), ("lac", True), ("aps", False), ("aps", True), ("raps", True)]


@pytest.mark.parametrize(("score", "randomized"), KINDS)
def test_sets_of_equal_weights_are_the_plain_ones(score, randomized):
    p, labels, _ = rows(199, 13, classes=4, decimals=2)  # 200 alpha is whole, and scores are tied
    new, _, _ = rows(300, 14, classes=4, decimals=2)
    settings = {"score": score, "randomized": randomized}
    plain = ConformalSets(alpha=0.1, **settings).fit(p, labels).predict(new)
    sets = ConformalSets(alpha=0.1, **settings).fit(p, labels, sample_weight=np.full(199, 0.3))
    np.testing.assert_array_equal(sets.predict(new, sample_weight=0.3), plain)


def test_a_class_is_in_a_set_by_the_weight_of_the_rows_that_fit_no_better(tmp_path):
    p, labels, generator = rows(80, 15)
    weights = generator.gamma(1.0, size=80)
    new, _, _ = rows(50, 16)
    own = generator.gamma(1.0, size=50).clip(max=weights.max())
    sets = ConformalSets(alpha=0.2).fit(p, labels, sample_weight=weights)
    scores, fitted = 1 - new, 1 - p[np.arange(80), labels]
    for row in range(50):
        for k in range(3):
            share = weights[fitted >= scores[row, k]].sum() + own[row]
            assert sets.predict(new[row : row + 1], sample_weight=own[row : row + 1])[0, k] == (
                share > 0.2 * (weights.sum() + own[row])
            )
    sets.save(tmp_path / "sets.json")
    again = ConformalSets.load(tmp_path / "sets.json")
    np.testing.assert_array_equal(again.predict(new, sample_weight=own), sets.predict(new, sample_weight=own))
    assert "rows drawn as their weights say" in str(again) and again.coverage_law is None
    with pytest.raises(ValueError, match="every weight of a new row has a cut of its own"):
        again.threshold  # noqa: B018


@pytest.mark.parametrize(("score", "randomized"), KINDS[1:4:2])
def test_sets_cover_the_rows_to_come_where_plain_ones_do_not(score, randomized):
    """Rows to come have density 3 x^2 of those of the fit, and the model is the surer of itself the larger x."""
    generator = np.random.default_rng(17)

    def sample(count: int, to_come: bool):
        x = generator.random(count)
        x = np.cbrt(x) if to_come else x
        truth = generator.dirichlet([0.6] * 3, count)
        labels = (generator.random((count, 1)) > truth.cumsum(axis=1)).sum(axis=1).clip(max=2)
        p = truth ** (0.5 + 3 * x[:, None])
        return p / p.sum(axis=1, keepdims=True), labels, 3 * x**2

    covered: dict[bool, list[float]] = {True: [], False: []}
    for split in range(60):
        p, labels, weights = sample(150, False)
        new, truth, own = sample(150, True)
        for weighted in covered:
            sets = ConformalSets(alpha=0.2, score=score, randomized=randomized, seed=split)
            sets.fit(p, labels, sample_weight=weights if weighted else None)
            found = sets.predict(new, sample_weight=own if weighted else None)
            covered[weighted].append(float(found[np.arange(150), truth].mean()))
    mean, error = np.mean(covered[True]), np.std(covered[True]) / np.sqrt(60)
    assert mean > 0.8 - 3 * error and (not randomized or mean < 0.8 + 4 * error)
    assert np.mean(covered[False]) < mean - 3 * error


def test_weights_of_new_rows_and_of_the_report():
    p, labels, generator = rows(200, 18)
    weights, new = generator.gamma(1.0, size=200), rows(300, 19)
    sets = ConformalSets(alpha=0.1).fit(p, labels, sample_weight=weights)
    with pytest.raises(ValueError, match="pass `sample_weight`"):
        sets.predict(new[0])
    with pytest.raises(ValueError, match="300 finite numbers of at least 0"):
        sets.predict(new[0], sample_weight=[-1.0] * 300)
    with pytest.raises(ValueError, match="fitted without weights"):
        ConformalSets(alpha=0.1).fit(p, labels).predict(new[0], sample_weight=1.0)
    report = sets.evaluate(new[0], new[1], sample_weight=np.ones(300), mask=np.arange(300) < 250)
    inside = sets.predict(new[0][:250], sample_weight=1.0)[np.arange(250), new[1][:250]]
    assert report.coverage == inside.mean() and report.band is None
    assert "90 % were asked for" in report.verdict() and "group" not in report.verdict()
    with pytest.raises(ValueError, match=r"must be reported on rows it has not"):
        sets.evaluate(p, labels, sample_weight=weights)
    for settings in ({"groups": "label"}, {"confidence": 0.95}):
        with pytest.raises(ValueError, match="With `sample_weight` the coverage is that of all rows"):
            ConformalSets(alpha=0.1, **settings).fit(p, labels, sample_weight=weights)
    heavy = np.append(np.ones(199), 60.0)
    with pytest.raises(ValueError, match=r"would be 18.8 % of all weight, .* takes some 417 rows"):
        ConformalSets(alpha=0.1).fit(p, labels, sample_weight=heavy)


def test_without_weights_nothing_has_changed():
    p, labels, _ = rows(300, 13, sharp=1.5)
    plain = as_rows(p, labels)
    draws = bootstrap_draws(plain, num_resamples=30, seed=1)
    weighed = bootstrap_draws(as_rows(p, labels, sample_weight=np.ones(300)), num_resamples=30, seed=1)
    for key in KEYS:
        np.testing.assert_allclose(weighed[key], draws[key], rtol=2e-5, atol=2e-6, err_msg=key)


def test_the_page_shows_how_often_intervals_held(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import weighted_intervals

    results = json.loads((BENCHMARKS / "results" / "weighted_intervals.json").read_text())
    page = (BENCHMARKS.parent / "docs" / "calibration.md").read_text()
    assert weighted_intervals.markdown(results) in page
    for case in results["cases"]:  # three standard errors; of a few effective rows ten points
        least = 0.85 if case["effective rows"] < 100 else 0.89
        assert min(case["held"].values()) >= least, case


def test_sets_with_a_weight_that_is_lost_in_the_sum_are_read_again(tmp_path):
    p, labels, _ = rows(300, 30)
    weights = np.r_[1e-17, np.ones(299)]
    sets = ConformalSets(alpha=0.1).fit(p, labels, sample_weight=weights)
    sets.save(tmp_path / "sets.json")
    again = load_decision(tmp_path / "sets.json")
    assert sorted(again.parts[0].cut.weights) == sorted(weights)
    np.testing.assert_array_equal(again.predict(p, sample_weight=1.0), sets.predict(p, sample_weight=1.0))
    # what an earlier release wrote: the same weight as 0, and no digest
    content = json.loads((tmp_path / "sets.json").read_text())
    content.pop("digest")
    text = json.dumps(content)
    assert text.count("1e-17") == 1
    (tmp_path / "sets.json").write_text(text.replace("1e-17", "0.0"))
    np.testing.assert_array_equal(
        load_decision(tmp_path / "sets.json").predict(p, sample_weight=1.0), again.predict(p, sample_weight=1.0)
    )
    (tmp_path / "sets.json").write_text(text.replace("1e-17", "-1e-17"))
    with pytest.raises(ValueError, match="as many weights of at least 0"):
        load_decision(tmp_path / "sets.json")
    with pytest.raises(ValueError, match="divide all weights"):
        ConformalSets(alpha=0.1).fit(p, labels, sample_weight=np.full(300, 1e308))


@pytest.mark.parametrize("unit", [5e-324, 1e-300, 1e-200, 1e160, 1e300])
def test_weights_of_any_size_are_measured(unit):
    p, labels, _ = rows(200, 31, sharp=2.5)
    plain = TemperatureScaling().fit(p, labels, input="probabilities").fit_result
    fit = TemperatureScaling().fit(p, labels, input="probabilities", sample_weight=np.full(200, unit)).fit_result
    assert plain.temperature > 1.0
    assert fit.to_dict() == plain.to_dict()
    options = {"num_resamples": 50, "num_bins": 10}
    found = calibration_report(p, labels, sample_weight=np.full(200, unit), **options)
    one = calibration_report(p, labels, sample_weight=np.ones(200), **options)
    counted = {"rmsce_debiased", "aurc", "e_aurc"}  # they count rows, and so hang on the unit
    for key in set(KEYS) - counted:
        assert found[key] == pytest.approx(one[key], rel=1e-9, abs=1e-11), key
        assert found.intervals[key] == pytest.approx(one.intervals[key], rel=1e-9, abs=1e-11, nan_ok=True), key
    assert all(np.isfinite(found[key]) for key in counted)
    assert found.settings["effective_rows"] == pytest.approx(200.0)


def test_the_largest_weight_may_be_any_number_of_times_the_smallest():
    p, labels, _ = rows(40, 32)
    weights = np.r_[1e-320, np.full(39, 1e300)]
    assert (as_rows(p, labels, sample_weight=weights).weights > 0).all()
    assert np.isfinite(TemperatureScaling().fit(p, labels, input="probabilities", sample_weight=weights).temperature)


def test_intervals_stay_in_the_range_of_their_score():
    generator = np.random.default_rng(33)
    for case in range(4):
        p, labels, _ = rows(60, 34 + case, sharp=0.2)
        # one row in five carries nearly all: about a dozen effective rows
        weights = np.where(np.arange(60) % 5 == 0, 1.0, 1e-4) * generator.uniform(0.9, 1.1, 60)
        assert 10 < effective_rows(weights) < 15
        for given in (weights, None):
            found = bootstrap_intervals(as_rows(p, labels, sample_weight=given), num_resamples=50)
            for score in SCORES:
                low, high = found[score.key]
                least, most = score.ends(3)
                assert np.isnan(low) == (score.key == "brier_within_bin")
                assert np.isnan(low) or least <= low <= high <= most, score.key


@pytest.mark.filterwarnings("ignore:.*give their true class a probability of")
def test_every_score_lies_in_its_range():
    generator = np.random.default_rng(40)
    for size, classes in ((1, 2), (3, 2), (30, 3), (30, 5)):
        for sharp in (0.01, 1.0, 100.0):
            p = generator.dirichlet(np.full(classes, sharp), size)
            for labels in (p.argmax(1), p.argmin(1), generator.integers(0, classes, size)):
                found = panel(p, labels)
                for score in SCORES:
                    least, most = score.ends(classes)
                    value = found[score.key]
                    assert np.isnan(value) or least - 1e-9 <= value <= most + 1e-9, score.key


def test_rows_that_few_of_them_carry_have_no_interval_and_the_report_says_why():
    p, labels, _ = rows(60, 41)
    report = calibration_report(p, labels, sample_weight=np.r_[1e9, np.ones(59)], num_resamples=50)
    assert set(report.intervals) == set(KEYS) and np.isnan(list(report.intervals.values())).all()
    told = "There is no interval: the 60 rows weigh so unequally that they say as much as 1.0 of equal weight"
    assert told in report.to_markdown() and told in report.to_html()
    assert report.floor is not None
    # as many rows of equal weight have the intervals of rows without
    few = calibration_report(p[:8], labels[:8], sample_weight=np.full(8, 0.3), num_resamples=50)
    assert np.isfinite(few.intervals["brier"]).all() and "There is no interval" not in str(few)
