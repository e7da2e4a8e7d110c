"""Whatever is fitted knows its own rows again, and takes no new ones for them, however few levels they come in."""

import json

import numpy as np
import pytest
from drawn_rows import drawn_rows

from peft_calib.calibration import (
    AnswerCalibration,
    BetaCalibration,
    ConformalInterval,
    ConformalSets,
    GaussianNoise,
    HistogramCalibration,
    IsotonicCalibration,
    LabelScaling,
    LabelThresholds,
    MatrixScaling,
    SampleSets,
    SelectiveThreshold,
    TemperatureScaling,
    VectorScaling,
)
from peft_calib.calibration.fingerprint import SplitFingerprint

SIZE = 300


def _classes(seed: int, levels: int | None):
    return drawn_rows(seed, SIZE, 3, 3.0, levels)


def _labels(seed: int, levels: int | None):
    p = np.random.default_rng(seed).random((SIZE, 2))
    y = (np.random.default_rng(seed + 1000).random((SIZE, 2)) < p).astype(int)
    return (p if levels is None else np.round(levels * p) / levels), y


def _numbers(seed: int, levels: int | None):
    generator = np.random.default_rng(seed)
    mean, values = generator.normal(size=SIZE), generator.normal(size=SIZE)
    if levels is not None:  # a rating from few to few
        mean, values = np.round(levels * mean), np.round(levels * values)
    return mean, values


def _answers(seed: int, levels: int | None):
    score = np.random.default_rng(seed).random(SIZE)
    right = np.random.default_rng(seed + 1000).random(SIZE) < score
    return {"match_share": score if levels is None else np.round(levels * score) / levels}, right


def _samples(seed: int, levels: int | None):
    generator = np.random.default_rng(seed)
    right, score = generator.random((SIZE, 3)) < 0.6, generator.random((SIZE, 3))
    return right, score if levels is None else np.round(levels * score) / levels


def _of_probabilities(method):
    return lambda p, y: method().fit(p, y, input="probabilities"), lambda one, p, y: one.evaluate(
        p, y, input="probabilities", confidence_level=None
    )


def _plain(make, **options):
    return lambda *rows: make().fit(*rows), lambda one, *rows: one.evaluate(*rows, **options)


#: Rows, and how they are fitted and reported on.
FITTED = {
    **{
        method.__name__: (_classes, *_of_probabilities(method))
        for method in (
            TemperatureScaling,
            VectorScaling,
            MatrixScaling,
            IsotonicCalibration,
            HistogramCalibration,
            BetaCalibration,
        )
    },
    "SelectiveThreshold": (_classes, *_plain(lambda: SelectiveThreshold(risk=0.4))),
    "ConformalSets": (_classes, *_plain(ConformalSets)),
    "LabelScaling": (_labels, *_plain(LabelScaling, confidence_level=None)),
    "LabelThresholds": (_labels, *_plain(lambda: LabelThresholds(0.4))),
    "GaussianNoise": (
        _numbers,
        lambda mean, y: GaussianNoise().fit(mean, None, y),
        lambda one, mean, y: one.evaluate(mean, None, y, confidence_level=None),
    ),
    "ConformalInterval": (
        _numbers,
        lambda mean, y: ConformalInterval(0.2).fit(mean, 1.0, y),
        lambda one, mean, y: one.evaluate(mean, 1.0, y),
    ),
    "AnswerCalibration": (_answers, *_plain(AnswerCalibration, confidence_level=None)),
    "SampleSets": (_samples, *_plain(lambda: SampleSets(0.3, by="score"))),
}


@pytest.mark.parametrize("name", FITTED)
def test_new_rows_of_few_levels_are_reported_on_and_own_ones_are_not(name):
    drawn, fit, report = FITTED[name]
    for seed, levels in ((0, None), (10, 2), (20, 4), (30, 9)):
        own = drawn(seed, levels)
        fitted = fit(*own)
        report(fitted, *drawn(seed + 5, levels))
        with pytest.raises(ValueError, match=r"100% of these .* was fitted on"):
            report(fitted, *own)
    own, new = drawn(0, None), drawn(5, None)
    fitted = fit(*own)
    with pytest.raises(ValueError, match=r"^(10|[6-9])% of these .* was fitted on"):  # 30 of 300
        report(fitted, *(_mixed(a, b) for a, b in zip(own, new, strict=True)))


def _mixed(own, new):
    if isinstance(own, dict):
        return {key: _mixed(own[key], new[key]) for key in own}
    return np.concatenate([own[:30], new[30:]])


@pytest.mark.parametrize("cells", [4, 40, 150, 1000])
@pytest.mark.parametrize("size", [100, 1000, 20_000])
def test_what_looks_alike_by_chance_is_not_counted(cells, size):
    """Rows of some kinds, frequent and rare ones: of many cuts hardly any share is said to be seen."""
    generator = np.random.default_rng(cells)
    taken = 0
    for _ in range(40):
        share = generator.dirichlet(np.full(cells, 0.5))
        kinds = generator.integers(0, 2**63, cells, dtype=np.uint64)
        first, second = (kinds[generator.choice(cells, size, p=share)] for _ in range(2))
        known = SplitFingerprint.of_hashes(first)
        taken += known.seen(second) > 0.05
        assert known.seen(first[::-1]) == 1.0
    assert taken <= 2


def test_saturated_rows_and_rows_all_alike_hide_no_others():
    generator = np.random.default_rng(0)
    own, new = generator.integers(0, 2**63, (2, 1000), dtype=np.uint64)
    own[:400] = new[:400] = 7  # 40 % are exactly 1
    known = SplitFingerprint.of_hashes(own)
    assert known.seen(new) == 0.0
    assert known.seen(own[200:]) == pytest.approx(1.0, abs=0.01)
    half = np.concatenate([own[:700], new[700:]])  # 300 own ones of 600 that are told
    assert known.seen(half) == pytest.approx(0.5, abs=0.01)
    assert known.seen(np.full(50, own[-1])) == 0.0  # one row fifty times says nothing of more


def _kinds(seed: int, cells: int, size: int) -> np.ndarray:
    generator = np.random.default_rng([seed, cells])
    kinds = generator.integers(0, 2**63, cells, dtype=np.uint64)
    return kinds[generator.integers(0, cells, size)]


@pytest.mark.parametrize("cells", [100, 400, 2**40])
def test_parts_of_the_own_rows_are_known_whatever_their_levels(cells):
    """Not only the identical set, which has the digest: all but one, halves, with new rows, and each many times."""
    rows = _kinds(0, min(cells, 10**6), 1000)
    own, new = rows[:400], rows[400:]
    known = SplitFingerprint.of_hashes(own)
    assert known.seen(new) <= 0.05
    for part in (own[:-1], own[:200], own[1::2]):
        assert known.seen(part) > 0.8
        assert known.seen(np.repeat(part, 25)) > 0.8
    if cells > 100:
        assert known.seen(np.concatenate([own[:200], new[:200]])) == pytest.approx(0.5, abs=0.2)


@pytest.mark.parametrize("twice", [120, 300, 399, 400])
def test_rows_that_came_twice_in_the_fit_are_known(twice):
    rows = np.random.default_rng(twice).integers(0, 2**63, 1000, dtype=np.uint64)
    own, new = rows[:400], rows[400:]
    known = SplitFingerprint.of_hashes(np.concatenate([own, own[:twice]]))
    assert known.seen(new) == 0.0
    for part in (own, own[:-1], own[:200], own[200:], own[:twice], np.repeat(own[:200], 25)):
        assert known.seen(part) == pytest.approx(1.0, abs=0.01)
    for count in (40, 80, 200):
        leaked = np.concatenate([own[-count:], new[: 400 - count]])
        assert known.seen(leaked) == pytest.approx(count / 400, abs=0.01)


@pytest.mark.parametrize("size", [50, 400, 20_000])
def test_other_shares_of_the_same_levels_are_no_own_rows(size):
    """Rows of a test set may be surer than those of the fit: more are saturated, and the levels otherwise spread."""
    generator = np.random.default_rng(size)
    taken = 0
    for _ in range(40):
        kinds = generator.integers(0, 2**63, 300, dtype=np.uint64)
        share = generator.dirichlet(np.full(300, 0.5))
        share[0] = share.sum() / 2
        other = share * np.exp(generator.normal(size=300))
        other[0] = 3 * other.sum()
        first, second = (kinds[generator.choice(300, size, p=p / p.sum())] for p in (share, other))
        taken += SplitFingerprint.of_hashes(first).seen(second) > 0.05
    assert taken <= 2


def test_two_decimals_are_told_through_the_methods():
    generator = np.random.default_rng(0)
    p = np.round(generator.random(800), 2)
    rows, y = np.stack([p, 1 - p], 1), (generator.random(800) < 1 - p).astype(int)
    fitted = TemperatureScaling().fit(rows[:400], y[:400], input="probabilities")
    report = {"input": "probabilities", "confidence_level": None}
    fitted.evaluate(rows[400:], y[400:], **report)
    for part in (slice(0, 399), slice(0, 200), slice(0, 400, 2)):
        with pytest.raises(ValueError, match=r"^\d+% of these rows"):
            fitted.evaluate(rows[part], y[part], **report)


@pytest.mark.parametrize("name", FITTED)
def test_a_file_whose_rows_were_changed_is_refused(name, tmp_path):
    drawn, fit, report = FITTED[name]
    own = drawn(0, None)
    fitted = fit(*own)
    file = tmp_path / "fitted.json"
    fitted.save(file)
    content = json.loads(file.read_text())
    none = SplitFingerprint.of_hashes(np.zeros(content["fitted_on"]["num_rows"], np.uint64)).to_dict()
    changes = (
        (none, "changed (by hand|after)"),
        ({"num_rows": 5000, "hashes": none["hashes"][:1] * 4096}, "changed (by hand|after)"),
        ({"hashes": none["hashes"]}, "fitted_on.digest"),
        ({"digest": none["digest"]}, "fitted_on.digest"),
        ({"hashes": content["fitted_on"]["hashes"][::-1]}, "in order"),
    )
    for change, told in changes:
        file.write_text(json.dumps({**content, "fitted_on": {**content["fitted_on"], **change}}))
        with pytest.raises(ValueError, match=f"fitted.json.*{told}") as error:
            type(fitted).load(file)
        assert "\n" not in str(error.value)
    file.write_text(json.dumps({key: value for key, value in content.items() if key not in ("seal", "digest")}))
    with pytest.raises(ValueError, match="100% of these"):  # of before the seal
        report(type(fitted).load(file), *own)
