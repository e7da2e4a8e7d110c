"""Predicted Gaussians: CRPS against integrals, noise against likelihoods, conformal intervals in simulation."""

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import kstest, norm

from peft_calib.calibration import (
    ConformalInterval,
    GaussianNoise,
    NoGuaranteeError,
    crps,
    load_decision,
    numbers_report,
)
from peft_calib.calibration.numbers.gaussian import as_number_rows, pit


def drawn(size: int, seed: int = 0, noise: float = 0.5):
    """Means, variances between draws that differ from row to row, and values with noise on top."""
    rng = np.random.default_rng(seed)
    mean, variance = rng.normal(0, 2, size), rng.gamma(1.0, 1.0, size)
    return mean, variance, rng.normal(mean, np.sqrt(noise + variance))


@pytest.mark.parametrize(
    ("mean", "sd", "value"), [(0.0, 1.0, 0.3), (2.0, 0.5, -1.0), (1.0, 3.0, 9.0), (0.0, 2.0, 0.0)]
)
def test_crps_is_the_integral_of_squared_differences_of_distributions(mean, sd, value):
    def squared(x):
        return (norm.cdf(x, mean, sd) - (x >= value)) ** 2

    below, above = (quad(squared, *ends, epsabs=1e-12)[0] for ends in ((-60.0, value), (value, 80.0)))
    assert crps([mean], sd, [value])[0] == pytest.approx(below + above, abs=1e-9)


def test_crps_is_proper_and_the_absolute_error_without_spread():
    np.testing.assert_array_equal(crps([1.0, 2.0], 0.0, [1.5, -1.0]), [0.5, 3.0])
    y = np.random.default_rng(0).normal(1.0, 2.0, 20_000)
    scores = {sd: crps(np.ones_like(y), sd, y).mean() for sd in (1.0, 1.7, 2.0, 2.4, 4.0)}
    assert min(scores, key=scores.get) == 2.0
    # E|X - y| - E|X - X'| / 2, of samples
    samples = np.random.default_rng(1).normal(0.0, 1.0, (2, 400_000))
    expected = np.abs(samples[0] - 0.7).mean() - 0.5 * np.abs(samples[0] - samples[1]).mean()
    assert crps([0.0], 1.0, [0.7])[0] == pytest.approx(expected, abs=4e-3)


@pytest.mark.parametrize("score", ["absolute", "normalised"])
def test_values_whose_score_is_the_cut_lie_inside(score):
    """Of values in steps around equal means many have it; a rounded end must not leave them all out."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        mean, sd = (np.full(100, float(np.float32(rng.uniform(*ends)))) for ends in ((-1, 5), (0.3, 2)))
        steps = np.round(np.arange(10) * 0.1 * rng.integers(1, 9), 3)
        values = rng.choice(steps, 100)
        low, high = ConformalInterval(0.25, score).fit(mean, sd, values).predict(mean, sd)
        assert ((values >= low) & (values <= high)).sum() >= 76, seed  # the rank of the cut among 100 rows


def test_a_report_is_what_its_parts_are():
    mean, variance, y = drawn(600)
    sd = np.sqrt(0.5 + variance)
    report = numbers_report(mean, sd, y)
    assert report["rmse"] == pytest.approx(np.sqrt(((y - mean) ** 2).mean()))
    assert report["nll"] == pytest.approx(-norm.logpdf(y, mean, sd).mean())
    assert report["r2"] == pytest.approx(1 - ((y - mean) ** 2).sum() / ((y - y.mean()) ** 2).sum())
    expected = kstest(norm.cdf(y, mean, sd), "uniform")
    assert (report["pit_ks"], report.settings["pit_p"]) == pytest.approx((expected.statistic, expected.pvalue))
    inside = np.abs(y - mean) <= norm.ppf(0.95) * sd
    assert report["coverage_90"] == pytest.approx(inside.mean()) and sum(report.pit_counts) == 600
    assert "cannot tell" in report.verdict() and "CRPS" in report.to_html()
    narrow = numbers_report(mean, 0.4 * sd, y)
    assert "too narrow" in narrow.verdict() and narrow["crps"] > report["crps"]
    assert "too wide" in numbers_report(mean, 3 * sd, y).verdict()
    peaked = np.sign(y - mean) * np.abs(y - mean) ** 2  # as wide at 90 %, and more of them in the middle
    scaled = peaked / (np.quantile(np.abs(peaked) / sd, 0.9) / norm.ppf(0.95))
    assert "of another shape" in numbers_report(mean, sd, mean + scaled).verdict()
    assert narrow["coverage_90"] < narrow.floor["coverage_90"].low
    alone = numbers_report(mean, 0.0, y, confidence_level=None)
    assert alone["nll"] == np.inf and '"nll": null' in alone.to_json()


def test_intervals_of_scores_hold_the_truth():
    truth = numbers_report(*_right(drawn(200_000, 99)), confidence_level=None)
    inside = dict.fromkeys(("rmse", "mae", "r2", "nll", "crps", "coverage_90"), 0)
    rejected = 0
    for seed in range(60):
        report = numbers_report(*_right(drawn(250, seed)))
        rejected += report.settings["pit_p"] < 0.05
        for key in inside:
            low, high = report.intervals[key]
            inside[key] += low <= truth[key] <= high
    assert min(inside.values()) >= 51, inside  # of 60 at 95 %: below 51 once in 1,000
    assert rejected <= 8  # a test at 5 % rejects 3 of 60, 9 or more once in 250


def _right(rows):
    mean, variance, y = rows
    return mean, np.sqrt(0.5 + variance), y


def test_noise_is_that_of_greatest_likelihood():
    residuals = np.random.default_rng(0).normal(0, 3, 400)
    plain = GaussianNoise().fit(np.zeros(400), None, residuals)
    assert plain.noise_variance == pytest.approx((residuals**2).mean(), rel=1e-12)
    mean, variance, y = drawn(3000)
    noise = GaussianNoise().fit(mean, variance, y)
    grid = np.linspace(0.2, 0.9, 1401)
    losses = [-norm.logpdf(y, mean, np.sqrt(s + variance)).sum() for s in grid]
    assert noise.noise_variance == pytest.approx(grid[int(np.argmin(losses))], abs=6e-4)
    low, high = noise.interval
    assert low < 0.5 < high and f"{np.sqrt(noise.noise_variance):.4g}" in noise.reason
    for end in (low, high):  # likelihood ratio
        assert -norm.logpdf(y, mean, np.sqrt(end + variance)).sum() - min(losses) == pytest.approx(1.9207, abs=2e-2)
    np.testing.assert_allclose(noise.transform(mean, variance), np.sqrt(noise.noise_variance + variance))
    none = GaussianNoise().fit(mean, variance, np.random.default_rng(1).normal(mean, np.sqrt(variance)))
    assert none.noise_variance < 0.05  # the draws explain everything


def test_noise_comes_out_of_its_file_and_refuses_its_own_rows(tmp_path):
    rows = drawn(300)
    made = GaussianNoise().fit(*rows)
    made.save(tmp_path / "n.json")
    again = GaussianNoise.load(tmp_path / "n.json")
    assert (again.noise_variance, again.interval, again.reason) == (made.noise_variance, made.interval, made.reason)
    assert again.evaluate(*drawn(300, 5))["coverage_90"] > 0.8
    with pytest.raises(ValueError, match="100% of these rows"):
        again.evaluate(*rows)
    (tmp_path / "n.json").write_text(
        (tmp_path / "n.json").read_text().replace('"noise_variance": ', '"noise_variance": -')
    )
    with pytest.raises(ValueError, match="noise_variance"):
        GaussianNoise.load(tmp_path / "n.json")


def test_conformal_intervals_cover_as_promised_whatever_the_model():
    """Heavy tails, a biased mean and a wrong spread: coverage over splits and its law."""
    covered, width = {"absolute": [], "normalised": []}, {}
    rng = np.random.default_rng(0)
    for _ in range(400):
        x = rng.gamma(2.0, 1.0, 260)
        y = x * rng.standard_t(3, 260) + 1.0
        mean, sd = np.zeros(260), 0.3 * x  # both wrong; the spread has the right shape
        for score, found in covered.items():
            rule = ConformalInterval(0.1, score).fit(mean[:60], sd[:60], y[:60])
            low, high = rule.predict(mean[60:], sd[60:])
            found.append(((y[60:] >= low) & (y[60:] <= high)).mean())
            width[score] = float(np.mean(high - low))
    for found in covered.values():
        assert np.mean(found) == pytest.approx(55 / 61, abs=0.008)  # k / (n + 1), k = ceil(61 * 0.9)
        assert np.quantile(found, 0.02) > 0.75
    sure = [
        ConformalInterval(0.1, confidence=0.95).fit(np.zeros(200), 1.0, rng.normal(size=200)).reach for _ in range(200)
    ]
    below = np.mean([2 * norm.cdf(reach) - 1 < 0.9 for reach in sure])
    assert below <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 200)
    plug_in = [np.quantile(np.abs(rng.normal(size=50)), 0.9) for _ in range(200)]
    assert np.mean([2 * norm.cdf(reach) - 1 < 0.9 for reach in plug_in]) > 0.4


def test_intervals_are_kept_reported_and_refused(tmp_path):
    mean, sd, y = _right(drawn(200))
    rule = ConformalInterval(score="normalised").fit(mean, sd, y)
    rule.save(tmp_path / "rule.json")
    again = load_decision(tmp_path / "rule.json")
    other = _right(drawn(500, 7))
    reached = again.evaluate(*other)
    low, high = rule.predict(*other[:2])
    assert reached.coverage == pytest.approx(((other[2] >= low) & (other[2] <= high)).mean())
    assert reached.band[0] <= reached.coverage <= reached.band[1] and "inside" in reached.verdict()
    assert again.law.mean == pytest.approx(181 / 201) and rule.promise() in str(reached)
    assert again.evaluate(*other, mask=np.arange(500) < 100).num_rows == 100
    with pytest.raises(ValueError, match="was fitted on"):
        again.evaluate(mean, sd, y)
    with pytest.raises(NoGuaranteeError, match=r"8 rows are too few .* takes 9 rows"):
        ConformalInterval(0.1).fit(mean[:8], sd[:8], y[:8])
    with pytest.raises(ValueError, match="divides by the standard deviation"):
        ConformalInterval(score="normalised").fit(mean, 0.0, y)
    with pytest.raises(ValueError, match="score"):
        ConformalInterval(score="lac")


@pytest.mark.parametrize(
    ("mean", "sd", "values", "told"),
    [
        ([0.0, np.nan], 1.0, [0.0, 1.0], "mean holds NaN"),
        ([0.0], -1.0, [0.0], "at least 0"),
        ([0.0, 1.0], 1.0, [0.0], "paired one to one"),
        ([[0.0, 1.0]], 1.0, [0.0], "1-D"),
        ([], 1.0, [], "not empty"),
    ],
)
def test_bad_numbers_are_refused(mean, sd, values, told):
    with pytest.raises(ValueError, match=told):
        numbers_report(np.asarray(mean, float), sd, np.asarray(values, float))


def test_pit_of_certain_predictions():
    rows = as_number_rows([0.0, 0.0, 0.0], 0.0, [-1.0, 0.0, 1.0])
    assert pit(rows).tolist() == [0.0, 0.5, 1.0]
    with pytest.raises(TypeError, match="numbers"):
        as_number_rows(["a"], 1.0, [0.0])
    with pytest.raises(TypeError, match=r"one for each row or one for all, such as 1\.0; got None"):
        as_number_rows([0.0], None, [0.0])
    with pytest.raises(ValueError, match="at least 10"):
        GaussianNoise().fit(np.zeros(9), None, np.ones(9))
    with pytest.raises(ValueError, match="predicted exactly"):
        GaussianNoise().fit(np.zeros(20), None, np.zeros(20))


def test_pictures_show_where_values_fall_and_what_central_intervals_hold():
    mean, variance, y = drawn(400)
    sd = np.sqrt(0.5 + variance) / 2  # half as wide as the values lie
    report = numbers_report(mean, sd, y, confidence_level=None)
    inside = np.abs(2 * norm.cdf(y, mean, sd) - 1)
    shares = np.arange(1, 20) / 20
    np.testing.assert_allclose(report.coverages, (inside[:, None] <= shares).mean(axis=0), atol=1e-12)
    assert report.to_dict()["coverages"] == list(report.coverages) and report.coverages[9] == report["coverage_50"]
    pit_picture, coverage = report.figures().values()
    bars = [bar.get_height() for bar in pit_picture.axes[0].patches[:10]]
    np.testing.assert_allclose(bars, np.array(report.pit_counts) / 40)
    points = coverage.axes[0].containers[0][0].get_xydata()
    np.testing.assert_allclose(points, np.stack([shares, report.coverages], axis=1))
    page = report.to_html()
    assert 'alt="Values inside central intervals"' in page and page.count("data:image/png") == 2
