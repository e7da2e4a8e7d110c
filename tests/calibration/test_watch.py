"""Watching without labels: bets at fair odds, p-values that are uniform, estimates by their formulas, one state."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import expit, logit
from scipy.stats import kstest

from peft_calib.calibration import Watch, prometheus
from peft_calib.calibration.watch.signals import CELLS, cells_of, class_p_values, odds_of, place_p_values
from peft_calib.calibration.watch.wealth import BLOCK, Wealth

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def drawn(seed, size, factor=1.0):
    """Probabilities of class 1 and labels drawn by them, before their logits are multiplied."""
    generator = np.random.default_rng(seed)
    p = expit(generator.normal(0.0, 2.0, size))
    return expit(factor * logit(p)), (generator.random(size) < p).astype(int)


def three(seed, size, shares=(0.5, 0.3, 0.2)):
    """Softmax-like probabilities of three classes whose labels have the shares that are asked for."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(3, size, p=shares)
    logits = 2.0 * np.eye(3)[labels] + generator.normal(size=(size, 3))
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), labels


# ------------------------------------------------------------------------------------------------- p-values and bets


def test_p_values_are_places_among_all_earlier_rows_by_their_definition():
    generator = np.random.default_rng(0)
    cells, u = generator.integers(0, 12, 700), generator.random(700)
    reference = generator.integers(0, 12, 40)
    counts = np.bincount(reference, minlength=CELLS)
    found = place_p_values(counts, cells, u)[:, 0]
    seen = list(reference)
    for row, (cell, chance) in enumerate(zip(cells, u, strict=True)):
        seen.append(cell)
        bag = np.array(seen)
        assert found[row] == pytest.approx(((bag > cell).sum() + chance * (bag == cell).sum()) / len(bag), abs=1e-12)
    assert counts.sum() == 740 and (counts == np.bincount(seen, minlength=CELLS)).all()


@pytest.mark.parametrize("num_classes", [2, 4])
def test_p_values_of_a_class_are_places_of_its_indicator(num_classes):
    generator = np.random.default_rng(1)
    classes, u = generator.integers(0, num_classes, 50), generator.random(50)
    found = class_p_values(np.bincount([0, 1, 1], minlength=num_classes), classes, u)
    assert found.shape == (50, 1 if num_classes == 2 else num_classes)
    for column, k in enumerate([1] if num_classes == 2 else range(num_classes)):
        is_class = classes == k
        bag = np.array([0, 1, 1]) == k
        for row in range(50):
            bag = np.append(bag, is_class[row])
            above, equal = (bag > is_class[row]).sum(), (bag == is_class[row]).sum()
            assert found[row, column] == pytest.approx((above + u[row] * equal) / len(bag), abs=1e-12)


def test_p_values_of_exchangeable_rows_are_uniform_and_independent_with_ties_and_few_reference_rows():
    generator = np.random.default_rng(2)
    found = np.concatenate(
        [
            place_p_values(np.bincount(generator.integers(0, 5, 10), minlength=CELLS), rows, generator.random(20))
            for rows in generator.integers(0, 5, (1000, 20))
        ]
    )[:, 0]
    assert kstest(found, "uniform").pvalue > 0.01
    pairs = found.reshape(1000, 20)
    assert abs(np.corrcoef(pairs[:, 0], pairs[:, 1])[0, 1]) < 0.1  # three standard errors


def test_every_bet_is_fair_and_cannot_be_ruined():
    points = (np.arange(2000) + 0.5) / 2000
    for previous in (0, 1, BLOCK - 1, 5 * BLOCK + 3):
        wealth = Wealth(2000, 9.0)
        wealth.bet(np.repeat(np.random.default_rng(previous).random((previous, 1)), 2000, axis=1))
        before = np.exp(wealth.log_wealth[0])
        wealth.bet(points[None])
        grown = np.exp(wealth.log_wealth)
        assert grown.mean() == pytest.approx(before, rel=1e-5)  # a midpoint rule
        assert (grown > 0.1 * before).all()


def test_wealth_is_that_of_its_definition():
    from peft_calib.calibration.watch.wealth import _BETS, _START

    p = np.random.default_rng(3).beta(0.7, 1.0, 100)
    weights, peak, needed = _START.copy(), 0.0, np.log(3.0)
    first = 0
    for row, value in enumerate(p):
        if row % BLOCK == 0:
            rate = 1.0 / (row // BLOCK + 1)
            weights = (1.0 - rate) * weights + rate * weights.sum() * _START
        weights = weights * (1.0 + _BETS[:, 0] * (2 * value - 1) + _BETS[:, 1] * (6 * value**2 - 6 * value + 1))
        peak = max(peak, np.log(weights.sum()))
        first = first or (row + 1) * (np.log(weights.sum()) >= needed)
    wealth = Wealth(1, needed)
    wealth.bet(p[:, None])
    assert wealth.log_wealth[0] == pytest.approx(np.log(weights.sum()), abs=1e-10)
    assert wealth.peak[0] == pytest.approx(peak, abs=1e-10) and wealth.alarmed[0] == first > 0


def test_the_grid_holds_every_probability_in_its_order():
    odds = odds_of(np.array([0.0, 1e-12, 0.3, 0.5, 0.9, 1 - 1e-12, 1.0]))
    cells = cells_of(odds)
    assert (np.diff(cells) >= 0).all() and cells[0] == 0 and cells[-1] == CELLS - 1 and cells[3] == CELLS // 2


# ------------------------------------------------------------------------------------------------------- false alarms


def test_a_sample_of_the_benchmark_keeps_its_level_where_the_usual_ways_do_not(monkeypatch):
    """The whole has 2,000 streams a case; here 60 of the hardest, 50 reference rows."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from watch import NULLS, false_alarms

    found = false_alarms(9, *NULLS["tiny, 50 rows"], 60)
    assert found["watch"] <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 60)
    assert found["fixed reference"] > 0.4


def test_a_change_is_seen_and_the_alarm_stays():
    watch = Watch(seed=1).start(*drawn(0, 500))
    assert not watch.update(drawn(1, 1000)[0]).alarmed
    report = watch.update(drawn(2, 400, factor=0.4)[0])
    raised = {one.signal: one.raised_at for one in report.alarms}
    assert 1000 < raised["confidence"] < 1200 and raised["class 1"] is None
    assert "ALARM: the distribution of confidence" in str(report)
    assert watch.update(drawn(3, 5000)[0]).alarmed


def test_each_signal_sees_its_own_change_and_the_level_is_divided():
    generator = np.random.default_rng(4)
    p, labels = three(0, 600)
    further = {"mutual_information": generator.gamma(2.0, 0.05, 600), "error_probability": 1.0 - p.max(axis=1)}
    new = three(1, 600)[0]
    cases = {
        "mutual_information": (new, generator.gamma(2.0, 0.15, 600), 1.0 - new.max(axis=1)),
        "error_probability": (new, generator.gamma(2.0, 0.05, 600), np.minimum(1.0, 3.0 * (1.0 - new.max(axis=1)))),
        "class 2": (three(2, 600, (0.1, 0.1, 0.8))[0], generator.gamma(2.0, 0.05, 600), 1.0 - new.max(axis=1)),
    }
    for signal, (predictions, information, error) in cases.items():
        watch = Watch().start(p, labels, **further)
        report = watch.update(predictions, mutual_information=information, error_probability=error)
        raised = {one.signal for one in report.alarms if one.raised_at is not None}
        assert signal in raised and ("class 2" in raised) == (signal == "class 2"), (signal, raised)
        needed = {one.signal: one.needed for one in report.alarms}
        assert needed["confidence"] == pytest.approx(np.log(4 / 0.01))
        assert needed["class 0"] == pytest.approx(np.log(4 * 3 / 0.01))


# ---------------------------------------------------------------------------------------------------------- estimates


def test_estimates_are_those_of_their_formulas():
    (p, labels), (new, _) = three(5, 400), three(6, 300, (0.2, 0.3, 0.5))
    report = Watch(window=1000).start(p, labels).update(new)
    found = {one.name: one for one in report.expected}
    confidence, right = p.max(axis=1), p.argmax(axis=1) == labels
    difference = new.max(axis=1).mean() + right.mean() - confidence.mean()
    assert found["confidence"].accuracy == pytest.approx(difference, abs=1e-8)
    assert found["confidence"].overconfidence == pytest.approx(confidence.mean() - right.mean(), abs=1e-12)
    cut = np.sort(confidence)[(~right).sum()]
    assert (confidence < cut).mean() == pytest.approx((~right).mean(), abs=1e-12)
    assert found["threshold"].accuracy == pytest.approx((new.max(axis=1) >= cut).mean(), abs=1e-8)
    table = np.array([[((labels == k) & (p.argmax(axis=1) == j)).sum() for k in range(3)] for j in range(3)])
    given = table / table.sum(axis=0)
    shares = np.linalg.solve(given, np.bincount(new.argmax(axis=1), minlength=3) / 300)
    assert found["class_shares"].accuracy == pytest.approx(shares @ np.diag(given), abs=1e-9)
    brier = (confidence - right) ** 2 - confidence * (1 - confidence)
    expected = (new.max(axis=1) * (1 - new.max(axis=1))).mean() + brier.mean()
    assert report.brier[0] == pytest.approx(expected, abs=1e-8)
    for one in found.values():
        assert one.interval[0] <= one.accuracy <= one.interval[1] and len(one.holds_if) > 20


def test_intervals_become_those_of_a_mean_with_many_rows():
    (p, labels), (new, _) = drawn(7, 40_000), drawn(8, 40_000)
    one = Watch(window=40_000).start(p, labels).update(new).expected[0]
    confidence = np.maximum(p, 1 - p)
    right = (p > 0.5) == labels
    variance = (right - confidence).var() / 40_000 + np.maximum(new, 1 - new).var() / 40_000
    assert one.interval[1] - one.interval[0] == pytest.approx(2 * 1.959964 * np.sqrt(variance), rel=0.01)


def test_a_reference_that_is_always_right_is_no_certainty():
    p = np.full((20, 2), [0.0, 1.0])
    report = Watch().start(p, np.ones(20, int)).update(p)
    for one in report.expected[:2]:
        assert one.accuracy == 1.0 and one.interval[0] < 0.95
    assert "class 0 has no reference row" in report.expected[2].why_not


@pytest.mark.parametrize("rows", [30, 300])
def test_the_brier_score_to_be_expected_has_an_interval_that_holds(rows):
    """Of 30 calibrated rows 97 % right a third have no error: without caution it held in 58 of 100."""

    def sure(rng, size):
        c, predicted = rng.beta(30, 1, size), rng.integers(0, 2, size)
        c = np.maximum(c, 1 - c)
        return c, predicted, np.where(rng.random(size) < c, predicted, 1 - predicted)

    c, _, _ = sure(np.random.default_rng(0), 10**6)
    truth, held = (c * (1 - c)).mean(), 0
    for seed in range(1, 101):
        rng = np.random.default_rng(seed)
        c, predicted, labels = sure(rng, rows)
        watch = Watch().start(c, labels, input="confidence", predicted=predicted, num_classes=2)
        c, predicted, _ = sure(rng, 1000)
        low, high = watch.update(c, input="confidence", predicted=predicted).brier[1]
        held += low <= truth <= high
    assert held >= 88, held  # of 100 at 95 %: below 88 once in 250


def test_a_sample_of_the_coverage(monkeypatch):
    """The whole has 1,000 sets a case: the interval holds under its assumption, and fails without it."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import watch as benchmark

    monkeypatch.setattr(benchmark, "POPULATION", 200_000)
    held = benchmark.coverage(0, benchmark.COVERED["label shift"], 60)["estimates"]
    assert held["class_shares"]["coverage"] > 0.85 > held["confidence"]["coverage"]
    unseen = benchmark.coverage(1, benchmark.COVERED["labels changed unseen"], 20)
    assert unseen["estimates"]["confidence"]["coverage"] < 0.2 and unseen["alarmed"] <= 0.1


# -------------------------------------------------------------------------------------------------------------- state


def test_the_state_is_the_same_whatever_the_batches_and_goes_on_after_a_file(tmp_path):
    p, labels = three(9, 300)
    new = three(10, 2500, (0.4, 0.3, 0.3))[0]
    information = np.random.default_rng(0).gamma(2.0, 0.1, 2500)
    start = {"mutual_information": information[:300]}
    whole = Watch(window=700, seed=3).start(p, labels, **start)
    whole.update(new, mutual_information=information)
    parts = Watch(window=700, seed=3).start(p, labels, **start)
    for begin, end in ((0, 1), (1, 2), (2, 19), (19, 19), (19, 700), (700, 701), (701, 2400), (2400, 2500)):
        parts.save(tmp_path / "watch.json")
        parts = Watch.load(tmp_path / "watch.json")
        parts.update(torch.tensor(new[begin:end]), mutual_information=information[begin:end])
    assert parts.state() == whole.state()
    assert parts.report().to_dict() == whole.report().to_dict()


def test_the_state_does_not_grow():
    watch = Watch(window=100).start(*drawn(11, 100))
    watch.update(drawn(12, 300)[0])
    before = len(json.dumps(watch.state()))
    watch.update(drawn(13, 20_000)[0])
    assert len(json.dumps(watch.state())) < before + 1000 < 10_000


def test_confidences_with_classes_say_the_same_as_probabilities():
    (p, labels), (new, _) = three(14, 200), three(15, 100)
    of_rows = Watch().start(p, labels)
    of_rows.update(new)
    short = Watch().start(p.max(axis=1), labels, input="confidence", predicted=p.argmax(axis=1))
    short.update(new.max(axis=1), input="confidence", predicted=new.argmax(axis=1))
    assert short.state() == of_rows.state()


def _global():
    return np.random.get_state()[1].tolist()  # noqa: NPY002


def test_a_seed_decides_over_ties_and_nothing_global_moves():
    p, labels = drawn(16, 100)
    before = _global(), torch.get_rng_state().tolist()
    first, same, other = (Watch(seed=seed).start(p, labels).update(p).to_dict() for seed in (0, 0, 2**70))
    assert first == same != other
    assert before == (_global(), torch.get_rng_state().tolist())


def _set(state, path, value):
    *outer, last = path.split(".")
    for name in outer:
        state = state[name]
    state[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format_version", 2),
        ("false_alarm", 1.5),
        ("window", 10.0),
        ("rows", 51),
        ("seed", -1),
        ("reference.correct", 10**6),
        ("reference.table", [[1, 2], [3, 4]]),
        ("reference.confidence_error.variance", float("nan")),
        ("open.classes", [1, 2]),
        ("signals", {"confidence": {}}),
        ("signals.confidence.counts", [1, 2, 3]),
        ("signals.classes.counts", [1, 2]),
        ("signals.classes.wealth.weights", [[0.0] * 11]),
        ("signals.confidence.wealth.alarmed", [10**6]),
    ],
)
def test_a_damaged_state_is_refused_with_its_field(path, value, tmp_path):
    watch = Watch().start(*drawn(17, 60))
    watch.update(drawn(18, 50)[0])
    state = json.loads(json.dumps(watch.state()))
    _set(state, path, value)
    file = tmp_path / "watch.json"
    file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=re.escape(str(file))):
        Watch.load(file)


# ---------------------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_one_clear_line_and_counts_nothing():
    p, labels = drawn(19, 50)
    for wrong in ({"false_alarm": 0}, {"window": 5}, {"confidence_level": 2}, {"seed": -1}):
        with pytest.raises(ValueError, match="must"):
            Watch(**wrong)
    with pytest.raises(ValueError, match="not started"):
        Watch().update(p)
    with pytest.raises(ValueError, match="at least 10 labelled rows, got 5"):
        Watch().start(p[:5], labels[:5])
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 1\]"):
        Watch().start(p, labels + 1)
    with pytest.raises(ValueError, match="one class number for each of the 50 rows"):
        Watch().start(p, labels[:7])
    watch = Watch().start(p, labels)
    before = watch.state()
    wrong_rows = [
        ({"predictions": np.full((4, 3), 1 / 3)}, "3 classes, but the reference had 2"),
        ({"predictions": np.array([0.5, np.nan])}, "NaN"),
        ({"predictions": [0.5], "input": "confidence"}, "pass predicted="),
        ({"predictions": [0.5], "input": "confidence", "predicted": [2]}, "below 2"),
        ({"predictions": [1.5], "input": "confidence", "predicted": [1]}, "row 0 has 1.5"),
        ({"predictions": [0.5], "predicted": [1]}, "goes with input"),
        ({"predictions": [0.5], "mutual_information": [0.1]}, "started without `mutual_information`"),
        ({"predictions": np.zeros((2, 2, 2))}, "are no rows"),
        ({"predictions": [0.5], "input": "scores"}, "input"),
    ]
    for given, told in wrong_rows:
        with pytest.raises(ValueError, match=told):
            watch.update(**given)
    assert watch.state() == before
    watched = Watch().start(p, labels, error_probability=1 - np.maximum(p, 1 - p))
    with pytest.raises(ValueError, match="started with `error_probability`"):
        watched.update(p)
    with pytest.raises(ValueError, match="must be one number a row"):
        watched.update(p, error_probability=[0.1])


# ------------------------------------------------------------------------------------------------------------ the page


def test_the_benchmarks_have_been_run_to_the_end_and_the_page_shows_them(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import watch as benchmark
    import watch_text

    page = (BENCHMARKS.parent / "docs" / "watch.md").read_text()
    results = json.loads((BENCHMARKS / "results" / "watch.json").read_text())
    assert all(table in page for table in benchmark.markdown(results))
    assert watch_text.markdown(json.loads((BENCHMARKS / "results" / "watch_text.json").read_text())) in page
    for name, found in results["false_alarms"].items():
        assert found["streams"] == 2000 and found["level"] == 0.05
        assert found["watch"] <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 2000), name
        assert max(found["every 200 rows: KS"], found["fixed reference"]) > 0.1, name
    assert list(results["delays"]) == list(benchmark.CHANGES) and list(results["coverage"]) == list(benchmark.COVERED)
    for name, found in results["coverage"].items():
        of = {estimate: one["coverage"] for estimate, one in found["estimates"].items()}
        if name.startswith("no change"):
            assert min(of.values()) > 0.92 and of["confidence"] > 0.935, name
        if name.startswith("label shift"):
            assert of["class_shares"] > 0.93 > of["confidence"], name
        if name == "labels changed unseen":
            assert max(of.values()) < 0.05 and found["alarmed"] <= 0.01 + 2 * np.sqrt(0.01 * 0.99 / 1000)


def test_the_first_example_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (p, labels), (new, _) = drawn(30, 300), drawn(31, 300)
    code = (BENCHMARKS.parent / "docs" / "watch.md").read_text().partition("```python\n")[2].partition("```")[0]
    exec(code, {"probabilities": p, "labels": labels, "new_probabilities": new})
    shown = capsys.readouterr().out
    assert "No alarm" in shown and 'peft_calib_watch_rows_total{adapter="reviews"} 300' in shown


# --------------------------------------------------------------------------------------------------------- Prometheus


def test_prometheus_reads_it():
    p, labels = three(20, 100)
    report = Watch().start(p, labels).update(three(21, 50)[0])
    text = prometheus(report, labels={"adapter": 'a "b"\\\n'})
    sample = re.compile(r'peft_calib_watch_\w+\{(?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)+\} -?\d[\d.e+-]*')
    lines = [line for line in text.split("\n") if line and not line.startswith("# ")]
    assert all(sample.fullmatch(line) for line in lines) and text.endswith("\n")
    assert 'peft_calib_watch_rows_total{adapter="a \\"b\\"\\\\\\n"} 50' in lines
    expected = report.expected[2].interval[0]
    assert any(f'assumption="class_shares",bound="low"}} {expected!r}' in line for line in lines)
    names = [line.split()[2] for line in text.split("\n") if line.startswith("# TYPE")]
    assert len(names) == len(set(names)) == 9
    for wrong in ({"labels": {"signal": "x"}}, {"labels": {"a-b": "x"}}, {"prefix": "9a"}):
        with pytest.raises(ValueError, match=r"must be|cannot be"):
            prometheus(report, **wrong)


def test_prometheus_own_reader_agrees():
    parser = pytest.importorskip("prometheus_client.parser")
    report = Watch().start(*drawn(22, 50)).update(drawn(23, 50)[0])
    families = {one.name: one for one in parser.text_string_to_metric_families(prometheus(report))}
    assert families["peft_calib_watch_rows"].samples[0].value == 50


def test_whole_numbers_of_numpy_are_whole_numbers(tmp_path):
    watch = Watch(window=np.int64(500), seed=np.int32(3)).start(np.linspace(0.5, 1.0, 50), np.ones(50, int))
    assert type(watch.window) is int
    watch.save(tmp_path / "watch.json")
    assert Watch.load(tmp_path / "watch.json").window == 500
    for wrong in (True, 500.0, np.float64(500), "500", 9, 10**8):
        with pytest.raises(ValueError, match="`window` must be a whole number from 10 to 10,000,000"):
            Watch(window=wrong)


def test_confidences_without_classes_are_refused_at_the_start():
    with pytest.raises(ValueError, match="pass predicted="):
        Watch().start(np.linspace(0.5, 1.0, 50), np.ones(50, int), input="confidence")
