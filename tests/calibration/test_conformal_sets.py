"""Prediction sets: definitions, coverage laws, groups, randomisation, files, and what is refused."""

import json

import numpy as np
import pytest
import torch
from drawn_rows import drawn_rows
from scipy.stats import beta, betabinom

from peft_calib.calibration import (
    ConformalSets,
    NoGuaranteeError,
    TemperatureScaling,
    load_decision,
    set_size_diagram,
)
from peft_calib.calibration.decide.bounds import conformal_rank
from peft_calib.calibration.decide.set_report import CoverageLaw
from peft_calib.calibration.decide.set_scores import Cut, class_scores, rank_for, smoothed_cut, uniforms

SCORES = ("lac", "aps", "raps")


def _rows(seed: int, size: int, classes: int = 4, spread: float = 2.0, levels: int | None = None):
    return drawn_rows(seed, size, classes, spread, levels)


def _score_of(row, label, kind, u, penalty, free_ranks):
    """Row by row, as the papers say it."""
    if kind == "lac":
        return 1 - row[label]
    order = sorted(range(len(row)), key=lambda c: (-row[c], c))
    rank = order.index(label) + 1
    total = sum(row[c] for c in order[: rank - 1]) + (1 - u) * row[label]
    return total + (penalty * max(0, rank - free_ranks) if kind == "raps" else 0)


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("randomized", [False, True])
@pytest.mark.parametrize("levels", [None, 4])
def test_scores_are_those_of_the_papers(kind, randomized, levels):
    p, _ = _rows(0, 40, levels=levels)
    u = np.random.default_rng(1).random(40) if randomized else None
    ours = class_scores(p, kind, u, 0.1, 2)
    theirs = [[_score_of(p[i], c, kind, u[i] if randomized else 0, 0.1, 2) for c in range(4)] for i in range(40)]
    assert ours == pytest.approx(np.array(theirs), abs=1e-12)


@pytest.mark.parametrize("kind", SCORES)
def test_a_class_is_in_where_its_score_is_among_the_smallest(kind):
    p, y = _rows(2, 250)
    new, _ = _rows(3, 100)
    sets = ConformalSets(0.1, kind, penalty=0.05, free_ranks=1).fit(p, y)
    own = class_scores(p, kind, None, 0.05, 1)[np.arange(250), y]
    # by p-values: at least alpha (n + 1) - 1 scores of the fit are no smaller
    greater_or_equal = (own[:, None, None] >= class_scores(new, kind, None, 0.05, 1)).sum(axis=0)
    assert (sets.predict(new) == ((greater_or_equal + 1) / 251 > 0.1)).all()
    assert sets.threshold == np.sort(own)[int(np.ceil(251 * 0.9)) - 1]


@pytest.mark.parametrize("n", [9, 10, 19, 99, 100, 199, 1000, 12345])
@pytest.mark.parametrize("alpha", ["0.1", "0.05", "0.01", "0.3"])
def test_the_rank_does_not_suffer_from_rounding(n, alpha):
    from fractions import Fraction
    from math import ceil

    assert conformal_rank(n, float(alpha)) == ceil((n + 1) * (1 - Fraction(alpha)))


def test_coverage_laws_are_scipys():
    law = CoverageLaw(91, 10)
    assert law.mean == pytest.approx(91 / 101)
    assert law.interval(0.9) == pytest.approx(beta.interval(0.9, 91, 10))
    for m in (1, 30, 1000):
        low, high = betabinom.ppf([0.025, 0.975], m, 91, 10) / m
        assert law.band(m, 0.95) == pytest.approx((low, high))


@pytest.mark.parametrize("n", [29, 60, 500])
def test_a_confidence_is_a_tolerance_region(n):
    rank = rank_for(n, 0.1, 0.95)
    assert beta.cdf(0.9, rank, n + 1 - rank) <= 0.05 < beta.cdf(0.9, rank - 1, n + 2 - rank)
    with pytest.raises(NoGuaranteeError, match="95 % of the splits: that takes 29 rows"):
        ConformalSets(0.1, confidence=0.95).fit(*_rows(0, 28))
    assert "with 95 % confidence" in str(ConformalSets(0.1, confidence=0.95).fit(*_rows(0, 60)))


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("randomized", [False, True])
def test_coverage_is_what_was_asked_for(kind, randomized):
    """Over 150 splits of 80 rows, with four standard errors; exact where randomized, at least that elsewhere."""
    p, y = _rows(4, 20_000)
    generator, coverages = np.random.default_rng(5), []
    for split in range(150):
        chosen = generator.integers(0, len(y), 280)
        sets = ConformalSets(0.1, kind, randomized=randomized, seed=split).fit(p[chosen[:80]], y[chosen[:80]])
        held = sets.predict(p[chosen[80:]])
        coverages.append(held[np.arange(200), y[chosen[80:]]].mean())
    error = 4 * np.std(coverages) / np.sqrt(150)
    assert np.mean(coverages) >= 0.9 - error
    if randomized:
        law = 0.9 if kind == "lac" else 73 / 81
        assert abs(np.mean(coverages) - law) <= error


def test_smoothing_covers_exactly_where_everything_is_tied():
    """Two confidences for all rows: plain sets cover far too often, smoothed ones as asked for."""
    generator, plain, smoothed = np.random.default_rng(6), [], []
    for split in range(300):
        easy = generator.random(400) < 0.5
        p = np.where(easy[:, None], [[0.8, 0.2]], [[0.6, 0.4]])
        y = (generator.random(400) > p[:, 0]).astype(int)
        for randomized, found in ((False, plain), (True, smoothed)):
            sets = ConformalSets(0.3, randomized=randomized, seed=split).fit(p[:200], y[:200])
            found.append(sets.predict(p[200:])[np.arange(200), y[200:]].mean())
    assert np.mean(plain) > 0.75
    assert abs(np.mean(smoothed) - 0.7) < 4 * np.std(smoothed) / np.sqrt(300)


@pytest.mark.parametrize("tied", [False, True])
def test_the_smoothed_cut_is_the_smoothed_p_value(tied):
    generator = np.random.default_rng(7)
    own = generator.random(57)
    own = np.round(own, 1) if tied else own
    grid = np.concatenate([own, np.linspace(-0.1, 1.1, 300)])
    u = generator.random((2000, 1))
    for alpha in (0.01, 0.1, 0.31, 0.9):
        greater, equal = (own[:, None] > grid).sum(axis=0), (own[:, None] == grid).sum(axis=0)
        share = ((greater + u * (1 + equal)) / 58 > alpha).mean(axis=0)
        assert smoothed_cut(own, alpha).chance(grid) == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize("kind", ["aps", "raps"])
def test_rounding_does_not_decide_which_sets_have_all_classes(kind):
    """Of labels that have nothing to do with the rows many are last: at the level of all classes everyone has them."""
    p, _ = _rows(31, 3000)
    y = np.random.default_rng(0).integers(0, 4, 3000)
    for rows in (p, p.astype(np.float32), 0.9995 * p):
        sets = ConformalSets(0.05, kind, penalty=0.0).fit(rows[:1500], y[:1500])
        assert sets.threshold == 1.0 and sets.predict(rows[1500:]).all()


def test_random_numbers_belong_to_rows_and_not_to_places():
    p, _ = _rows(8, 3000)
    u = uniforms(p, 3)
    assert np.abs(np.histogram(u, 10, (0, 1))[0] - 300).max() < 90
    order = np.random.default_rng(0).permutation(3000)
    assert (uniforms(p[order], 3) == u[order]).all() and (uniforms(p[:7], 3) == u[:7]).all()
    assert (uniforms(p, 4) != u).mean() > 0.99
    alike = uniforms(np.repeat(p[:1], 500, axis=0), 3)
    assert len(np.unique(alike)) == 500 and alike[0] == u[0]
    sets = ConformalSets(0.2, "aps", randomized=True).fit(*_rows(9, 200))
    assert (sets.predict(p[order]) == sets.predict(p)[order]).all()
    assert (np.concatenate([sets.predict(part) for part in np.array_split(p, 9)]) == sets.predict(p)).all()


@pytest.mark.parametrize("score", ["lac", "aps"])
def test_equal_rows_share_their_chances_in_one_call_and_the_first_alone(score):
    """A predictor that says one thing: 90 % of the sets of a call hold the label, while a call a row has one set."""
    generator = np.random.default_rng(50)
    p = np.tile([0.5, 0.3, 0.2], (4000, 1))
    y = generator.choice(3, 4000, p=p[0])
    sets = ConformalSets(0.1, score, randomized=True, seed=1).fit(p[:2000], y[:2000])
    held = sets.predict(p[2000:])
    assert abs(held[np.arange(2000), y[2000:]].mean() - 0.9) < 0.03 and 1 < len(np.unique(held, axis=0)) <= 3
    alone = np.concatenate([sets.predict(p[:1]) for _ in range(5)])
    assert (alone == held[0]).all()
    seeds = [ConformalSets(0.1, score, randomized=True, seed=seed).fit(p[:300], y[:300]) for seed in range(300)]
    coverage = [p[0][fitted.predict(p[:1])[0]].sum() for fitted in seeds]
    assert abs(np.mean(coverage) - 0.9) < 0.05 and np.std(coverage) > 0.05


def test_each_class_has_its_own_cut():
    p, y = _rows(10, 2000)
    sets = ConformalSets(0.1, "aps", groups="label").fit(p, y)
    new, _ = _rows(11, 300)
    for k in range(4):
        alone = ConformalSets(0.1, "aps").fit(p[y == k], y[y == k])
        assert sets.parts[k].cut == alone.parts[0].cut
        assert (sets.predict(new)[:, k] == alone.predict(new)[:, k]).all()
    report = sets.evaluate(*_rows(12, 2000))
    assert [group.group for group in report.groups] == [0, 1, 2, 3] and report.band is None
    for group, part in zip(report.groups, sets.parts, strict=True):
        assert group.band == part.law.band(group.num_rows, 1 - 0.05 / 4)


@pytest.mark.parametrize("names", [["a", "b"], [7, 9]])
def test_each_group_has_its_own_cut(names):
    p, y = _rows(13, 900)
    groups = np.array(names)[(np.arange(900) % 3 == 0).astype(int)]
    sets = ConformalSets(0.1, groups=groups).fit(p, y)
    later = ConformalSets(0.1, groups="given").fit(p, y, groups=groups.tolist())
    assert later.state() == sets.state()
    new, _ = _rows(14, 200)
    for name in names:
        alone = ConformalSets(0.1).fit(p[groups == name], y[groups == name])
        assert (sets.predict(new, groups=[name] * 200) == alone.predict(new)).all()
    with pytest.raises(ValueError, match="pass `groups`"):
        sets.predict(new)
    with pytest.raises(ValueError, match="no cut for group"):
        sets.predict(new, groups=[names[0]] * 199 + [names[0] * 2])
    with pytest.raises(ValueError, match="one value a row"):
        sets.predict(new, groups=groups)
    kept = np.arange(900) % 7 != 0
    masked = ConformalSets(0.1, groups=groups).fit(p, np.where(kept, y, -100), mask=np.arange(900) % 5 != 0)
    chosen = kept & (np.arange(900) % 5 != 0)
    assert masked.state() == ConformalSets(0.1, groups=groups[chosen]).fit(p[chosen], y[chosen]).state()


def _names_of(kind: str, numbers: np.ndarray):
    """Groups 0, 1, ... as values of a kind."""
    plain = numbers.tolist()
    return {
        "int": numbers,
        "int in a list": plain,
        "str": numbers.astype(str),
        "float": numbers.astype(float),
        "bool": numbers % 2 == 0,
        "tuple": [(n // 3, "x" * (n % 3)) for n in plain],
    }[kind]


@pytest.mark.parametrize("score", SCORES)
def test_groups_are_told_apart_by_value_and_type(score):
    """Of another type than in the fit they are unknown, in `predict` and in `evaluate`, however many there are."""
    p, y = _rows(30, 2000)
    numbers = np.random.default_rng(31).integers(0, 20, 2000)
    for fitted, given in (("int", "str"), ("str", "int"), ("int", "float"), ("float", "int"), ("int", "bool")):
        sets = ConformalSets(0.1, score).fit(p, y, groups=_names_of(fitted, numbers))
        new, new_y = _rows(32, 400)
        right, wrong = (_names_of(kind, numbers[:400]) for kind in (fitted, given))
        held = sets.predict(new, groups=right)
        for name in range(20):
            own = _names_of(fitted, np.array([name]))[0]
            alone = ConformalSets(0.1, score).fit(p[numbers == name], y[numbers == name])
            mine = numbers[:400] == name
            assert (held[mine] == alone.predict(new[mine])).all(), own
        assert [group.num_rows for group in sets.evaluate(new, new_y, groups=right).groups] == [
            (_names_of(fitted, numbers[:400]) == part.group).sum() for part in sets.parts
        ]
        for call in (lambda: sets.predict(new, groups=wrong), lambda: sets.evaluate(new, new_y, groups=wrong)):  # noqa: B023
            with pytest.raises(ValueError, match=r"no cut for group .* in the type they had in the fit"):
                call()


@pytest.mark.parametrize("kind", ["int in a list", "str", "float", "bool", "tuple"])
def test_any_value_that_a_file_can_hold_is_a_group(tmp_path, kind):
    p, y = _rows(33, 900)
    numbers = np.arange(900) % 5
    sets = ConformalSets(0.1, groups=_names_of(kind, numbers)).fit(p, y)
    sets.save(tmp_path / "sets.json")
    again = load_decision(tmp_path / "sets.json")
    assert [type(part.group) for part in again.parts] == [type(part.group) for part in sets.parts]
    assert again.state() == sets.state()
    new, new_y = _rows(34, 300)
    names = _names_of(kind, numbers[:300])
    assert (again.predict(new, groups=names) == sets.predict(new, groups=names)).all()
    assert sum(group.num_rows for group in again.evaluate(new, new_y, groups=names).groups) == 300


def test_values_that_print_alike_are_told_apart():
    p, y = _rows(37, 600)
    groups = [1, "1", 2] * 200
    sets = ConformalSets(0.1, groups=groups).fit(p, y)
    report = sets.evaluate(*_rows(38, 600), groups=groups)
    for text in (str(sets), str(report)):
        assert all(f"| {name} | 200 |" in text for name in ("1", "'1'", "2"))


def test_a_missing_group_is_told_by_count_and_row():
    p, y = _rows(35, 300)
    names = ["a", None, "b"] * 100
    for groups in (names, np.array(names, object)):
        with pytest.raises(ValueError, match=r"no value \(None or NaN\) in 100 of 300 rows, first in row 1"):
            ConformalSets(0.1).fit(p, y, groups=groups)
    sets = ConformalSets(0.1).fit(p, y, groups=names, mask=np.arange(300) % 3 != 1)
    assert [part.group for part in sets.parts] == ["a", "b"] and sets.num_rows == 200
    with pytest.raises(TypeError, match="finite numbers"):
        sets.fit(p, y, groups=[float("inf")] * 300)


def test_no_rows_are_answered_with_no_sets():
    p, y = _rows(36, 300)
    for settings in ({}, {"groups": "label"}, {"groups": "predicted"}, {"randomized": True, "allow_empty": False}):
        sets = ConformalSets(0.1, **settings)
        assert "not fitted yet" in str(sets)
        for rows in (p[:0], torch.tensor(p[:0])):
            found = sets.fit(p, y).predict(rows)
            assert found.shape == (0, 4) and type(found) is type(rows)
    with pytest.raises(ValueError, match="fitted for 4 classes, got 3"):
        sets.predict(np.empty((0, 3)))
    named = ConformalSets(0.1).fit(p, y, groups=["a"] * 300)
    assert named.predict(p[:0], groups=[]).shape == (0, 4)


def test_predicted_classes_are_groups():
    p, y = _rows(15, 1500)
    sets = ConformalSets(0.1, groups="predicted").fit(p, y)
    by_name = ConformalSets(0.1, groups=p.argmax(axis=1)).fit(p, y)
    new, _ = _rows(16, 300)
    assert (sets.predict(new) == by_name.predict(new, groups=new.argmax(axis=1))).all()
    assert len(sets.evaluate(*_rows(17, 300)).groups) == 4


@pytest.mark.parametrize(
    ("settings", "size", "message", "needed"),
    [
        ({"alpha": 0.1}, 8, "^8 rows cannot", 9),
        ({"alpha": 0.05}, 18, "that takes 19 rows", 19),
        ({"alpha": 0.01, "groups": "label"}, 200, "rows of class 0 cannot", 99),
        ({"alpha": 0.1, "groups": ["big"] * 99 + ["small"]}, 100, "^1 rows of group 'small' cannot", 9),
    ],
)
def test_too_few_rows_say_how_many_it_takes(settings, size, message, needed):
    with pytest.raises(NoGuaranteeError, match=message) as refusal:
        ConformalSets(**settings).fit(*_rows(18, size))
    assert refusal.value.rows_needed == needed
    if "groups" not in settings:
        ConformalSets(**settings).fit(*_rows(18, needed))


def test_a_class_without_a_row_is_too_few():
    p, y = _rows(19, 500)
    with pytest.raises(NoGuaranteeError, match="0 rows of class 2"):
        ConformalSets(0.1, groups="label").fit(p[y != 2], y[y != 2])


def test_empty_sets_can_be_filled():
    p, y = _rows(20, 400, spread=8.0)
    sets = ConformalSets(0.3).fit(p, y)
    new, new_y = _rows(21, 400, spread=8.0)
    empty = ~sets.predict(new).any(axis=1)
    filled = ConformalSets(0.3, allow_empty=False).fit(p, y).predict(new)
    assert empty.any() and filled.any(axis=1).all()
    assert (filled[~empty] == sets.predict(new)[~empty]).all()
    assert (filled[empty].argmax(axis=1) == new[empty].argmax(axis=1)).all()
    assert sets.evaluate(new, new_y).empty == empty.mean()


def test_raps_has_smaller_large_sets_and_is_aps_below_its_free_ranks():
    p, y = _rows(22, 2000, classes=12, spread=1.0)
    new, new_y = _rows(23, 2000, classes=12, spread=1.0)
    aps, raps = (ConformalSets(0.1, s, penalty=0.2, free_ranks=2).fit(p, y).evaluate(new, new_y) for s in SCORES[1:])
    assert np.flatnonzero(raps.sizes).max() < np.flatnonzero(aps.sizes).max()
    few = [ConformalSets(0.1, s).fit(*_rows(2, 300)).predict(_rows(3, 100)[0]) for s in SCORES[1:]]
    assert (few[0] == few[1]).all()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"score": "aps", "randomized": True, "seed": 3},
        {"randomized": True},
        {"groups": "label"},
        {"groups": ["x", "y"] * 200},
        {"score": "raps", "temperature": 0.7, "allow_empty": False, "confidence": 0.9},
    ],
)
def test_saved_and_loaded(tmp_path, settings):
    p, y = _rows(24, 400)
    sets = ConformalSets(0.1, **settings).fit(p, y)
    sets.save(tmp_path / "sets.json")
    new, new_y = _rows(25, 100)
    groups = ["x", "y"] * 50 if isinstance(settings.get("groups"), list) else None
    for again in (ConformalSets.load(tmp_path / "sets.json"), load_decision(tmp_path / "sets.json")):
        assert again.state() == sets.state() and str(again) == str(sets)
        assert (again.predict(new, groups=groups) == sets.predict(new, groups=groups)).all()
        assert again.evaluate(new, new_y, groups=groups) == sets.evaluate(new, new_y, groups=groups)
        with pytest.raises(ValueError, match="it has not seen"):
            again.evaluate(p, y, groups=None if groups is None else settings["groups"])


def test_a_damaged_file_is_refused_by_name(tmp_path):
    sets = ConformalSets(0.1).fit(*_rows(0, 300))
    path = tmp_path / "sets.json"
    for change, message in (
        (lambda s: s["settings"].update(alpha=0), "alpha"),
        (lambda s: s["settings"].update(score="hps"), "score"),
        (lambda s: s["settings"].update(seed=1.5), "seed"),
        (lambda s: s["fitted"]["parts"][0].update(cut=[0.5, 1, 0]), r"parts\[0\].cut"),
        (lambda s: s["fitted"]["parts"][0].update(cut=[0.5, 1, 0, 0.2, 0]), r"parts\[0\].cut"),
        (lambda s: s["fitted"]["parts"][0].update(group=3), r"parts\[0\].group"),
        (lambda s: s["fitted"]["parts"][0].update(law=[1, -1]), r"parts\[0\].law"),
        (lambda s: s["fitted"].update(parts=[]), "parts"),
        (lambda s: s.update(num_classes=0), "num_classes"),
        (lambda s: s.pop("fitted_on"), "fitted_on"),
    ):
        state = json.loads(json.dumps(sets.state()))
        change(state)
        path.write_text(json.dumps(state))
        with pytest.raises(ValueError, match=message):
            load_decision(path)


def test_a_file_with_a_class_twice_is_refused(tmp_path):
    for groups in ("label", "predicted"):
        state = ConformalSets(0.1, groups=groups).fit(*_rows(0, 600)).state()
        state["fitted"]["parts"][1]["group"] = 0
        (tmp_path / "sets.json").write_text(json.dumps(state))
        with pytest.raises(ValueError, match="parts"):
            load_decision(tmp_path / "sets.json")


def test_draws_and_a_temperature():
    """Averaged probabilities of draws are rows like any other, and a temperature is that of recalibrated rows."""
    generator = np.random.default_rng(26)
    draws = torch.softmax(torch.tensor(2 * generator.normal(size=(5, 600, 4))), dim=-1)
    p, y = draws.mean(dim=0), generator.integers(0, 4, 600)
    scaling = TemperatureScaling().fit(*_rows(27, 300), input="probabilities")
    scaling.temperature = 2.5
    sets = ConformalSets(0.2, "aps", temperature=scaling).fit(p[:300], y[:300])
    warm = scaling.transform(p, input="probabilities")
    plain = ConformalSets(0.2, "aps").fit(warm[:300], y[:300])
    held = sets.predict(p[300:])
    assert isinstance(held, torch.Tensor) and held.dtype == torch.bool
    assert (held == plain.predict(warm[300:])).all()
    assert sets.predict(torch.log(p[300:]), input="logits").equal(held)
    used = TemperatureScaling().fit(p[:300], y[:300], input="probabilities")
    with pytest.raises(ValueError, match="temperature was fitted on"):
        ConformalSets(0.2, temperature=used).fit(p[:300], y[:300])


def test_the_report_tells_a_shift_from_noise(tmp_path):
    sets = ConformalSets(0.1).fit(*_rows(28, 500))
    same, new = sets.evaluate(*_rows(29, 400)), _rows(30, 400)
    assert same.band[0] <= same.coverage <= same.band[1] and "too few" not in same.verdict()
    shifted = sets.evaluate(new[0], np.random.default_rng(0).integers(0, 4, 400))
    assert "not drawn like those of the fit" in shifted.verdict()
    assert sum(same.sizes) == 400 and same.mean_size == pytest.approx(np.arange(5) @ same.sizes / 400)
    assert same.singletons == same.sizes[1] / 400 and same.expected_coverage == pytest.approx(451 / 501)
    assert json.loads(json.dumps(same.to_dict()))["coverage"] == same.coverage
    figure = set_size_diagram(same)
    assert "hold the label" in figure.axes[0].get_title()
    figure.savefig(tmp_path / "sizes.png")
    assert "A single split of that size covers" in str(sets) and "not row by row" in str(sets)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": 1}, "alpha"),
        ({"score": "LAC"}, "score"),
        ({"groups": "class"}, "groups"),
        ({"seed": -1}, "seed"),
        ({"penalty": -0.1}, "penalty"),
        ({"free_ranks": 1.5}, "free_ranks"),
        ({"confidence": 95}, "confidence"),
        ({"confidence": 0.95, "randomized": True}, "randomized"),
        ({"temperature": 0}, "temperature"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ConformalSets(**settings)


def test_bad_rows():
    p, y = _rows(0, 100)
    sets = ConformalSets(0.1)
    with pytest.raises(ValueError, match="not fitted yet"):
        sets.predict(p)
    with pytest.raises(ValueError, match="`input` must be one of"):
        sets.fit(p, y, input="confidence")
    with pytest.raises(ValueError, match="leave `groups` out"):
        ConformalSets(0.1, groups="label").fit(p, y, groups=y)
    with pytest.raises(TypeError, match="which a file can hold"):
        sets.fit(p, y, groups=[frozenset("ab")] * 100)
    sets = ConformalSets(0.1).fit(p, y)
    with pytest.raises(ValueError, match="fitted without names"):
        sets.predict(p, groups=y)
    with pytest.raises(ValueError, match="fitted for 4 classes, got 3"):
        sets.predict(np.full((2, 3), 1 / 3))
    assert Cut(0.5).chance(np.array([0.4, 0.5, 0.6])).tolist() == [1, 1, 0]


def test_a_fit_that_fails_leaves_the_sets_as_they_were():
    p, y = _rows(0, 300)
    sets = ConformalSets(0.1).fit(p, y)
    before = sets.state()
    for rows, labels, groups in ((p[:5], y[:5], None), (p[:5], y[:5], ["a"] * 5), (p, y + 9, None)):
        with pytest.raises(ValueError):
            sets.fit(rows, labels, groups=groups)
        assert sets.state() == before
