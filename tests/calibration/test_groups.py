"""Several runs a method: intervals over rows and runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import special, stats

from peft_calib.calibration import compare_groups, pool_comparisons
from peft_calib.calibration.resampling.groups import GroupComparison, _with_error

SCORES = ("nll", "brier", "accuracy")


def method(seed: int, labels: np.ndarray, runs: int = 4, gain: float = 1.0, run_sd: float = 0.3) -> list[np.ndarray]:
    """Runs of a method on rows that are equally hard for all: each has a luck of its own and noise on every row."""
    rows = np.random.default_rng([seed, 0])
    hardness = np.random.default_rng([len(labels), int(labels.sum())]).normal(size=len(labels))
    found = []
    for _ in range(runs):
        margin = gain + hardness + run_sd * rows.normal() + 0.3 * rows.normal(size=len(labels))
        of_label = special.expit(2 * margin)
        found.append(np.where(labels[:, None] == [0, 1], of_label[:, None], 1 - of_label[:, None]))
    return found


def labels_of(seed: int, count: int = 120) -> np.ndarray:
    return np.random.default_rng([seed, 1]).integers(0, 2, count)


def test_the_error_is_that_of_the_closed_form_for_a_mean():
    labels = labels_of(0)
    a, b = method(1, labels), method(2, labels, runs=3)
    (found,) = compare_groups({"a": a, "b": b}, labels, baseline="b", scores=["nll"], num_resamples=4000)
    d = found["nll"]
    nll = {name: np.array([-np.log(p[np.arange(len(labels)), labels]) for p in runs]) for name, runs in
           (("a", a), ("b", b))}  # fmt: skip
    by_row = nll["a"].mean(0) - nll["b"].mean(0)
    means = {name: table.mean(1) for name, table in nll.items()}
    parts = [by_row.var(ddof=1) / len(labels), *(m.var(ddof=1) / len(m) for m in means.values())]
    assert d.difference == pytest.approx(by_row.mean(), rel=1e-9)
    assert d.run_sd_a == pytest.approx(means["a"].std(ddof=1), rel=1e-9)
    assert d.standard_error == pytest.approx(np.sqrt(sum(parts)), rel=0.03)  # 4,000 resamples
    freedom = sum(parts) ** 2 / sum(p**2 / f for p, f in zip(parts, (119, 3, 2), strict=True))
    assert d.degrees_of_freedom == pytest.approx(freedom, rel=0.05)
    half = d.standard_error * stats.t.ppf(0.975, d.degrees_of_freedom)
    assert (d.low, d.high) == pytest.approx((d.difference - half, d.difference + half), rel=1e-9)


def test_pairs_take_off_what_a_training_has_in_common():
    labels = labels_of(3)
    a = method(4, labels, runs=5, run_sd=1.0)
    b = [np.clip(p * 0.97 + 0.015, 0, 1) for p in a]
    alone = compare_groups({"a": a, "b": b}, labels, baseline="a", scores=["nll"], num_resamples=200)[0]["nll"]
    paired = compare_groups({"a": a, "b": b}, labels, baseline="a", scores=["nll"], num_resamples=200, paired=True)
    assert paired[0]["nll"].standard_error < 0.6 * alone.standard_error
    assert paired[0]["nll"].difference == alone.difference


@pytest.mark.parametrize("pairs", [2, 3])
@pytest.mark.parametrize("of_runs", [0.1, 3.0, 10.0])
def test_two_or_three_pairs_of_runs_keep_the_level(pairs, of_runs):
    """`of_runs` is the variance over runs by that over rows; by Welch and Satterthwaite alone 87 to 93 are held."""
    generator, sets, held = np.random.default_rng(pairs), 1500, 0
    for _ in range(sets):
        runs = generator.normal(size=pairs) * np.sqrt(of_runs * pairs)
        mean = generator.normal() + runs.mean()
        over_rows, over_runs = (generator.chisquare(499) / 499, 499), [(runs.var(ddof=1) / pairs, pairs - 1)]
        found = _with_error("nll", (mean, 0.0), (0.0, 0.0), over_rows, over_runs, 0.95, is_bound=True)
        assert (found.low <= 0.0 <= found.high) == (found.p_value >= 0.05)
        held += found.low <= 0.0 <= found.high
    assert 0.94 * sets < held, held / sets


def test_pairs_are_compared_by_the_bound_where_there_are_two_and_alone_in_a_pool_too():
    labels = labels_of(12)
    a, b = method(13, labels, runs=2), method(14, labels, runs=2)
    cell = compare_groups({"a": a, "b": b}, labels, baseline="b", scores=["nll"], num_resamples=200, paired=True)
    d, nll = cell[0]["nll"], np.array([[-np.log(p[np.arange(120), labels]).mean() for p in runs] for runs in (a, b)])
    of_runs = (nll[0] - nll[1]).var(ddof=1) / 2
    quantiles = stats.t.ppf(0.975, [119, 1])
    half = np.sqrt(quantiles**2 @ [d.standard_error**2 - of_runs, of_runs])
    assert (d.low, d.high) == pytest.approx((d.difference - half, d.difference + half), rel=1e-9)
    assert pool_comparisons([cell])[0]["nll"] == d


def test_more_pairs_go_by_welch_and_satterthwaite():
    found = _with_error("nll", (2.0, 0.0), (0.0, 0.0), (0.5, 499), [(1.5, 3)], 0.95)
    freedom = 4.0 / (0.25 / 499 + 2.25 / 3)
    assert found.degrees_of_freedom == pytest.approx(freedom)
    assert found.high - 2.0 == pytest.approx(np.sqrt(2.0) * stats.t.ppf(0.975, freedom))
    assert found.p_value == pytest.approx(2 * stats.t.sf(np.sqrt(2.0), freedom))


@pytest.mark.slow
def test_intervals_cover_and_equal_methods_have_no_winner():
    """Two equal methods, runs apart by more than rows: 95 % intervals hold zero as often as they say, within 3 sd."""
    sets, held = 120, dict.fromkeys(SCORES, 0)
    for s in range(sets):
        labels = labels_of(1000 + s, 150)
        groups = {"a": method(5000 + s, labels), "b": method(9000 + s, labels)}
        (found,) = compare_groups(groups, labels, baseline="b", scores=SCORES, num_resamples=60, seed=s)
        for key in SCORES:
            held[key] += found[key].low <= 0 <= found[key].high
    least = sets * 0.95 - 3 * np.sqrt(sets * 0.95 * 0.05)
    assert min(held.values()) >= least, held


def test_a_method_that_is_better_is_found_and_rows_alone_would_have_lied():
    labels = labels_of(7, 400)
    groups = {"good": method(8, labels, gain=2.0), "bad": method(9, labels, gain=0.5)}
    (found,) = compare_groups(groups, labels, baseline="bad", num_resamples=200)
    assert {found[key].better for key in SCORES} == {"a"}
    assert "good is better than bad in" in found.verdict
    (level,) = compare_groups(
        {"one": method(10, labels, run_sd=1.0), "two": method(11, labels, run_sd=1.0)},
        labels, baseline="two", num_resamples=200,
    )  # fmt: skip
    assert level["nll"].better is None
    assert "400 rows and 4 + 4 runs cannot tell them apart in" in level.verdict


def test_cells_are_averaged_and_their_errors_add_up():
    cells = []
    for seed in (20, 30):
        labels = labels_of(seed)
        groups = {"a": method(seed + 1, labels, gain=1.4), "b": method(seed + 2, labels)}
        cells.append(compare_groups(groups, labels, baseline="b", scores=SCORES, num_resamples=200))
    (pooled,) = pool_comparisons(cells)
    for key in SCORES:
        one, two = (cell[key] for (cell,) in cells)
        assert pooled[key].difference == pytest.approx((one.difference + two.difference) / 2, rel=1e-9)
        both = np.hypot(one.standard_error, two.standard_error) / 2
        assert pooled[key].standard_error == pytest.approx(both, rel=1e-9)
    assert isinstance(pooled, GroupComparison)
    assert pooled.settings["num_runs"] == {"a": 8, "b": 8}
    assert "240 rows and 8 + 8 runs" in pooled.basis
    text = pooled.to_markdown()
    assert "standard deviation between runs" in text
    json.dumps(pooled.to_dict(), allow_nan=False)


def test_cells_that_share_rows_do_not_take_them_for_new_ones():
    """Of many studies of two cells on the same rows, and on other rows, 95 % intervals hold the truth."""
    studies, held = 60, {"named": 0, "unnamed": 0}
    generator = np.random.default_rng(0)
    labels, rows = np.tile([0, 1], 100), ["same", "same"]

    def runs(of_label: np.ndarray) -> list[np.ndarray]:
        noisy = [np.clip(of_label + 0.001 * generator.normal(size=200), 0.01, 0.99)[:, None] for _ in range(4)]
        return [np.where(labels[:, None] == [0, 1], p, 1 - p) for p in noisy]

    for s in range(studies):
        change = 0.2 * generator.normal(size=200)  # a row is as much better or worse in both cells
        groups = {"a": runs(0.5 + change), "b": runs(0.5 - change)}
        cell = compare_groups(groups, labels, baseline="b", scores=["brier"], num_resamples=60, seed=s)
        cells = [cell, cell]
        for name, pooled in (("named", pool_comparisons(cells, rows=rows)), ("unnamed", pool_comparisons(cells))):
            held[name] += pooled[0]["brier"].low <= 0 <= pooled[0]["brier"].high
    assert held["named"] >= studies * 0.95 - 3 * np.sqrt(studies * 0.95 * 0.05)
    assert held["unnamed"] < 0.9 * studies  # as if there were twice as many rows


def test_errors_over_rows_add_up_and_those_over_runs_are_independent():
    cells = []
    for seed in (20, 30, 40):
        labels = labels_of(seed)
        groups = {"a": method(seed + 1, labels, gain=1.4), "b": method(seed + 2, labels)}
        cells.append(compare_groups(groups, labels, baseline="b", scores=SCORES, num_resamples=200))
    (pooled,), (apart,) = pool_comparisons(cells, rows=["x", "y", "x"]), pool_comparisons(cells, rows="xyz")
    for key in SCORES:
        rows = [cell[key].over_rows[0] for (cell,) in cells]
        runs = sum(part for (cell,) in cells for part, _ in cell[key].over_runs)
        squared = (rows[0] ** 0.5 + rows[2] ** 0.5) ** 2 + rows[1]
        assert pooled[key].standard_error == pytest.approx(np.sqrt(squared + runs) / 3, rel=1e-9)
        assert apart[key] == pool_comparisons(cells)[0][key]
        assert apart[key].standard_error < pooled[key].standard_error
    with pytest.raises(ValueError, match="3 cells, 2 names"):
        pool_comparisons(cells, rows=["x", "y"])


def test_three_methods_are_corrected_for_their_pairs():
    labels = labels_of(40)
    groups = {name: method(41 + i, labels, gain=1.0 + 0.2 * i) for i, name in enumerate("abc")}
    found = compare_groups(groups, labels, num_resamples=200)
    assert [pair.names for pair in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert all(d.adjusted_p_value >= d.p_value for pair in found for d in pair.differences)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": {"a": 2}}, "at least two to compare"),
        ({"baseline": "c"}, "the baseline 'c' among them"),
        ({"groups": {"a": 1, "b": 2}}, "at least two runs of every method.*'a': 1"),
        ({"groups": {"a": 2, "b": 3}, "paired": True}, "Paired runs are as many"),
        ({"rows": 9}, "9 rows are too few"),
        ({"scores": ["nil"]}, "Unknown scores"),
        ({"groups": {"a": 2, "b": 2}, "other": True}, "same rows and classes"),
    ],
)
def test_what_cannot_be_compared_is_refused(change: dict, message: str):
    labels = labels_of(50, change.get("rows", 40))
    counts = change.get("groups", {"a": 2, "b": 2})
    groups = {name: method(i, labels, runs=count) for i, (name, count) in enumerate(counts.items())}
    if "other" in change:
        groups["b"] = [np.full((len(labels), 3), 1 / 3)] * 2
    options = {key: change[key] for key in ("baseline", "paired", "scores") if key in change}
    with pytest.raises(ValueError, match=message):
        compare_groups(groups, labels, **options)


def test_runs_that_are_one_and_the_same_have_no_winner():
    labels = np.tile([0, 1], 10)
    same = [np.where(labels[:, None] == [0, 1], 0.9, 0.1)] * 3
    (found,) = compare_groups({"a": same, "b": same}, labels, baseline="b", num_resamples=50)
    assert all(d.better is None and d.adjusted_p_value == 1.0 for d in found.differences)


def test_cells_of_other_methods_are_refused():
    with pytest.raises(ValueError, match="same methods"):
        pool_comparisons([])
