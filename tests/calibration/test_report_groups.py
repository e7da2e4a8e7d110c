"""A report's groups: each as its rows alone, gaps that hold at once, names as they are, nothing dropped in silence."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm

from peft_calib.calibration import TemperatureScaling, calibration_report, group_diagram
from peft_calib.calibration.grouping import as_groups
from peft_calib.calibration.inputs import Rows, softmax
from peft_calib.calibration.report.groups import FEWEST_ROWS, measured_groups
from peft_calib.calibration.report.measured import ReportSettings, measured
from peft_calib.calibration.resampling.gaps import Draws, largest_deviation, simultaneous_gaps
from peft_calib.calibration.scores.table import HEADLINES, KEYS

NAMES = ("<script>alert(1)</script>", "a|b\n[c](d)", "$x_1$", "_k_")


def _drawn(generator, size, factor=1.0, spread=1.5):
    z = spread * generator.normal(size=(size, 3))
    y = (generator.random((size, 1)) > softmax(z).cumsum(axis=1)).sum(axis=1).clip(max=2)
    return softmax(factor * z), y


@pytest.fixture(scope="module")
def data():
    generator = np.random.default_rng(0)
    parts = [_drawn(generator, size, factor) for size, factor in ((150, 1.0), (100, 8.0), (80, 1.0), (3, 1.0))]
    groups = np.repeat(NAMES, [150, 100, 80, 3])
    order = generator.permutation(len(groups))
    return *(np.concatenate(column)[order] for column in zip(*parts, strict=True)), groups[order]


@pytest.fixture(scope="module")
def report(data):
    return calibration_report(*data[:2], groups=data[2], num_resamples=100)


def test_a_group_is_what_a_report_of_its_rows_alone_says(data, report):
    p, y, groups = data
    assert list(report.groups) == sorted(NAMES)
    for name in NAMES[:3]:
        alone = calibration_report(p[groups == name], y[groups == name], num_resamples=100)
        panel = report.groups[name]
        assert panel.scores == alone.scores and panel.floor == alone.floor
        assert str(panel.intervals) == str(alone.intervals)  # NaN is NaN
        for key in KEYS:
            assert report.groups.gaps[key][name].gap == pytest.approx(alone[key] - report[key], abs=1e-12, nan_ok=True)


def test_the_rest_of_the_report_does_not_change(data, report):
    plain = calibration_report(*data[:2], num_resamples=100)
    found = report.to_dict()
    groups = found.pop("groups")
    assert json.dumps(found) == json.dumps(plain.to_dict())
    assert set(groups["panels"]) == set(NAMES) and groups["too_few_rows"] == ["_k_"]


def test_a_small_group_is_named_and_has_no_interval(report):
    small = report.groups["_k_"]
    assert small.num_rows == 3 < FEWEST_ROWS and small.intervals is None and small.floor is None
    assert np.isfinite(small["nll"]) and np.isnan(report.groups.gaps["nll"]["_k_"].low)
    assert report.groups.too_small == ("_k_",) and "_k_" not in report.groups.worse
    assert all(report.groups.worst(key)[0] != "_k_" for key in KEYS if report.groups.worst(key))
    assert "1 group of fewer than 20 rows cannot be judged" in report.verdict()


def test_groups_of_one_row_each():
    generator = np.random.default_rng(1)
    p, y = _drawn(generator, 30)
    report = calibration_report(p, y, groups=np.arange(30), num_resamples=50)
    assert len(report.groups) == 30 and len(report.groups.too_small) == 30 and report.groups.worse == {}
    assert "30 groups of fewer than 20 rows cannot be judged" in report.verdict()
    assert report.groups.worst("nll") is not None
    json.loads(report.to_json())


def test_the_over_confident_group_is_found_and_told(report):
    name = NAMES[1]
    assert {"ece", "nll"} <= set(report.groups.worse[name])
    assert not report.groups.worse[NAMES[0]] and not report.groups.worse[NAMES[2]]
    assert report.groups.worst("ece")[0] == name and report.groups.gaps["ece"][name].low > 0
    assert "Worse than all rows beyond chance: a|b [c](d) (100 rows) in" in report.verdict()


def test_a_group_of_all_rows_lies_nowhere_else(data):
    p, y, _ = data
    report = calibration_report(p, y, groups=["all"] * len(y), num_resamples=50)
    assert all(gap["all"] == (0.0, 0.0, 0.0) for key, gap in report.groups.gaps.items() if np.isfinite(report[key]))
    assert "orse" not in report.verdict()


def test_the_only_group_that_is_large_enough_has_an_interval_around_its_gap():
    """The rows of a group too small to be judged are rows all the same: the other is not all of them."""
    p, y = _drawn(np.random.default_rng(21), 300)
    y[290:] = (p[290:].argmax(axis=1) + 1) % 3  # all wrong
    report = calibration_report(p, y, groups=["a"] * 290 + ["b"] * 10, num_resamples=100)
    gap = report.groups.gaps["accuracy"]["a"]
    assert gap.gap == pytest.approx((p.argmax(axis=1) == y)[:290].mean() - report["accuracy"]) and gap.gap > 0.01
    for column in report.groups.gaps.values():
        value, low, high = column["a"]
        assert not np.isfinite([value, low, high]).all() or (low <= value <= high and low < high)
    assert gap.low < gap.high and report.groups.gaps["nll"]["a"].low < report.groups.gaps["nll"]["a"].high


def test_without_intervals_groups_have_none(data):
    report = calibration_report(*data[:2], groups=data[2], confidence_level=None)
    assert report.groups.worse is None and np.isnan(report.groups.gaps["ece"][NAMES[0]].low)
    assert "so groups are not judged" in report.verdict()
    assert "## Groups" in report.to_markdown() and "at once" not in report.to_markdown()
    report.to_html()


@pytest.mark.parametrize(
    "given",
    [
        lambda g: [str(v) for v in g],
        lambda g: torch.tensor(g),
        lambda g: [torch.tensor(v) for v in g],
        lambda g: pd.Series(g, index=range(100, 100 + len(g))),
        lambda g: pd.Series(g.astype(str)).astype("category"),
        lambda g: pd.Series(g.astype(str)).astype("string"),
        lambda g: [(int(v), "x") for v in g],
        lambda g: g.astype(bool),
        lambda g: g.astype("datetime64[D]"),
        lambda g: g.astype(float),
    ],
)
def test_every_kind_of_array_makes_the_same_groups(given):
    g = np.array([1, 0, 0, 1, 0])
    found = as_groups(given(g), np.zeros(5, int))
    assert (found.member == g).all() and len(found.names) == 2


@pytest.mark.parametrize(
    "missing",
    [
        ["a", None, "b"],
        [1.0, float("nan"), 2.0],
        np.array([1.0, np.nan, 2.0], np.float32),
        pd.Series(["a", pd.NA, "b"], dtype="string"),
        pd.Series([1, None, 2], dtype="Int64"),
        pd.to_datetime(pd.Series(["2020-01-01", None, "2020-01-02"])),
        pd.Categorical(["a", None, "b"]),
        [("a", 1), ("a", None), ("b", 1)],
    ],
)
def test_a_missing_value_is_an_error_unless_its_row_is_left_out(missing):
    with pytest.raises(ValueError, match=r"no value \(None or NaN\) in 1 of 3 rows, first in row 1"):
        as_groups(missing, np.zeros(3, int))
    assert len(as_groups(missing, np.zeros(3, int), np.array([True, False, True])).names) == 2


def test_bad_groups_are_refused():
    labels = np.zeros(3, int)
    with pytest.raises(TypeError, match="row 1 has"):
        as_groups(["a", {"b": 1}, "c"], labels)
    with pytest.raises(ValueError, match=r"shape \(2,\).*\(3,\)"):
        as_groups(["a", "b"], labels)
    with pytest.raises(ValueError, match="tuples"):
        as_groups(pd.DataFrame({"a": [1, 2, 3], "b": [1, 2, 3]}), labels)
    with pytest.raises(ValueError, match="groups has shape"):
        as_groups("gender", labels)
    with pytest.raises(ValueError, match="Cut a number into ranges"):
        as_groups(np.arange(2000) / 7, np.zeros(2000, int))


def test_values_that_print_alike_are_told_apart():
    assert as_groups([True, 1, 1.0], np.zeros(3, int)).names == ("1", "1.0", "True")
    assert as_groups([1, "1", " ", 2], np.zeros(4, int)).names == ("' '", "'1'", "1", "2")


def test_tokens_take_the_group_of_their_sequence_and_rows_left_out_take_theirs_along():
    generator = np.random.default_rng(2)
    p, y = _drawn(generator, 40)
    p, y = p.reshape(10, 4, 3), y.reshape(10, 4).copy()
    y[:, 0], y[3] = -100, -100
    groups = np.array(["a", "b"] * 5, object)
    groups[3] = None  # none of its tokens has a label
    report = calibration_report(p, y, groups=groups, confidence_level=None)
    assert {name: panel.num_rows for name, panel in report.groups.items()} == {"a": 15, "b": 12}
    kept = y[::2][y[::2] != -100]
    assert report.groups["a"]["accuracy"] == (p[::2][y[::2] != -100].argmax(axis=-1) == kept).mean()
    by_token = np.repeat(groups[:, None], 4, axis=1)
    again = calibration_report(p, y, groups=by_token, confidence_level=None)
    assert again.to_json() == report.to_json()


def test_recalibration_passes_groups_on():
    generator = np.random.default_rng(3)
    z, y = generator.normal(size=(60, 3)), generator.integers(0, 3, 60)
    scaling = TemperatureScaling().fit(z, y)
    new, labels = generator.normal(size=(30, 3)), generator.integers(0, 3, 30)
    labels[4] = -100
    groups = ["a"] * 4 + [None] + ["b"] * 25
    report = scaling.evaluate(new, labels, groups=groups, confidence_level=None)
    assert [panel.num_rows for panel in report.groups.values()] == [4, 25]


def test_names_are_text_in_every_form(report):
    page, text = report.to_html(), report.to_markdown()
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count("data:image/png") == 6
    section = text.split("## Groups")[1]
    tables = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert len(tables) == 2
    for table in tables:
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(bars) == 1
    assert r"\<script\>alert(1)\</script\>" in section and r"a\|b \[c\](d)" in section and r"\_k\_" in section
    assert json.loads(report.to_json())["groups"]["panels"].keys() == set(NAMES)


def test_the_forest_plot_shows_every_group_and_only_forty_of_many(report):
    figure = group_diagram(report, scores=("ece", "nll"))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == 4 and r"\$x_1\$ (80)" in labels
    figure.canvas.draw()
    generator = np.random.default_rng(4)
    p, y = _drawn(generator, 200)
    many = calibration_report(p, y, groups=np.arange(200) // 4, confidence_level=None)
    assert len(group_diagram(many).axes[0].get_yticks()) == 40
    with pytest.raises(ValueError, match="groups="):
        group_diagram(calibration_report(p, y, confidence_level=None))
    with pytest.raises(ValueError, match="Unknown scores"):
        group_diagram(many, scores=("eec",))


def test_the_interval_of_a_gap_between_means_is_that_of_the_closed_form():
    """For normal scores with intervals of z standard errors the arms together are those of the difference."""
    generator = np.random.default_rng(5)
    sizes, draws = [4000, 2000, 2000], 40_000
    errors = 1.0 / np.sqrt(sizes)
    parts = errors[:, None] * generator.normal(size=(3, draws))
    whole = np.array(sizes) @ parts / sum(sizes)
    z = norm.ppf(0.975)
    given = [(0.0, (-z * e, z * e)) for e in errors]
    e_whole = 1.0 / np.sqrt(sum(sizes))
    found = simultaneous_gaps(given, (0.0, (-z * e_whole, z * e_whole)), sizes, Draws(parts, whole), 0.95, 0.95, 8000)
    reach = largest_deviation(Draws(parts, whole), 0.95)
    for size, gap in zip(sizes, found, strict=True):
        error = np.sqrt(1.0 / size - 1.0 / sum(sizes))
        assert gap.high == pytest.approx(reach * error, rel=0.02) and gap.low == pytest.approx(-gap.high)
    assert z < reach < norm.ppf(1.0 - 0.05 / 6)


def test_no_arm_is_shorter_than_the_gap_itself_scatters():
    """Two halves of a skewed score: the gap is as likely above as below, whatever the arms of the scores are."""
    draws = np.random.default_rng(7).exponential(size=(2, 20_000))
    whole = draws.mean(axis=0)
    found = simultaneous_gaps(
        [(1.0, (0.9, 3.5))] * 2, (1.0, (0.9, 2.8)), [500, 500], Draws(draws, whole), 0.95, 0.95, 1000
    )
    least = largest_deviation(Draws(draws, whole), 0.95) * (draws[0] - whole).std()
    for gap in found:
        assert gap.low <= -0.98 * least and gap.high >= 0.98 * least


def test_independent_gaps_reach_as_far_as_sidak_says():
    draws = Draws(np.random.default_rng(6).normal(size=(10, 200_000)), np.zeros(200_000))
    assert largest_deviation(draws, 0.95) == pytest.approx(norm.ppf(0.5 + 0.5 * 0.95 ** (1 / 10)), rel=0.01)


def test_gaps_hold_at_once_and_calibrated_groups_are_not_called_worse():
    """A small sample of `benchmarks/group_intervals.py`: of accuracy, whose truth is the mean confidence."""
    member, spreads = np.repeat([0, 1, 2], [30, 60, 110]), (1.0, 2.0, 3.0)
    confidence = [_drawn(np.random.default_rng([8, i]), 100_000, 1.0, s)[0].max(axis=1).mean() for i, s in
                  enumerate(spreads)]  # fmt: skip
    true = np.array(confidence) - np.array([0.15, 0.3, 0.55]) @ confidence
    held, called, repeats = 0, 0, 30
    for repeat in range(repeats):
        generator = np.random.default_rng([9, repeat])
        parts = [_drawn(generator, size, 1.0, s) for size, s in zip((30, 60, 110), spreads, strict=True)]
        rows = Rows(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        asked = ReportSettings(15, "peft_calib", 0.95, 100, "bca", repeat, HEADLINES)
        found = measured_groups(rows, as_groups(member, rows.labels), measured(rows, asked), asked)
        gaps = [found.gaps["accuracy"][name] for name in "012"]
        held += all(gap.low <= t <= gap.high for gap, t in zip(gaps, true, strict=True))
        called += any("ece" in keys for keys in found.worse.values())
    assert held >= 24  # of a binomial of 30 and .95, four deviates below
    assert called <= 1
