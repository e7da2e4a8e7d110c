"""Entities: a probability is that of all tags that hold one, scores are seqeval's, rules keep their promise."""

import itertools
import json

import entity_peers
import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import norm

from peft_calib.calibration import (
    LabelScaling,
    SelectiveThreshold,
    calibration_report,
    confidence_report,
    entities_report,
    find_entities,
    labels_report,
)
from peft_calib.calibration.entities import Entities, spans_of
from peft_calib.calibration.entities.spans import TagSet

IOB = ["O", "B-X", "I-X", "B-Y", "I-Y"]


@pytest.mark.parametrize(
    "names", [IOB, ["O", "X", "Y"], ["O", "B-X", "I-X", "E-X", "S-X"], ["O", "B-X", "I-X", "L-X", "U-X"],
     ["O", "B", "I"], ["O", "B-X", "I-X", "E-mail"]],
)  # fmt: skip
def test_a_probability_is_that_of_all_tags_that_hold_the_entity(names):
    generator = np.random.default_rng(0)
    p = generator.dirichlet(np.ones(len(names)), size=(2, 4))
    reader = TagSet(names)
    expected: dict[tuple, np.ndarray] = {}
    for tags in itertools.product(range(len(names)), repeat=4):
        weight = np.prod([p[:, place, tag] for place, tag in enumerate(tags)], axis=0)
        for entity in spans_of([names[tag] for tag in tags], names):
            expected[entity] = expected.get(entity, 0.0) + weight
    for entity, chance in expected.items():
        np.testing.assert_allclose(reader.chance(p, *entity), chance, atol=1e-12)


@pytest.mark.parametrize("names", [{0: "O", 1: "B-X", 2: "I-X"}, {"2": "I-X", "0": "O", "1": "B-X"}])
def test_a_models_id2label_names_the_tags(names):
    assert find_entities(np.eye(3)[[1, 2]], names, [0, 0]).types == ("X",)


@pytest.mark.parametrize("names", [None, "OBI", [0, 1, 2], ["O", None, "B-X"], {1: "O", 2: "B-X", 3: "I-X"}, 3])
def test_what_names_no_tags_is_refused(names):
    with pytest.raises(ValueError, match=r"^tag_names must be the tags of the classes as texts, in order[^\n]*$"):
        find_entities(np.eye(3), names, [0, 0, 0])


def one_hot(sentences: list[list[str]], names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Certain words of sentences that have any, and where they belong."""
    ids = [names.index(tag) for tags in sentences for tag in tags]
    return np.eye(len(names))[ids], np.repeat(np.arange(len(sentences)), [len(tags) for tags in sentences])


def test_scores_are_those_of_seqeval():
    names = sorted(set(entity_peers.TAGS))
    p, owners = one_hot(entity_peers.sentences(), names)
    labels = one_hot(entity_peers.truth(), names)[0].argmax(1)
    report = entities_report(find_entities(p, names, owners, labels), confidence_level=None)
    for key, value in json.loads(entity_peers.FILE.read_text())["scores"].items():
        assert report[key] == pytest.approx(value, abs=1e-12), key


def drawn(seed: int, sentences: int, sharpness: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Words whose tags are drawn from the probabilities, which are then sharpened."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(6 * sentences, 5)) * 2.5
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (p.cumsum(1) < generator.random((len(p), 1))).sum(1).clip(max=4)
    sharp = p**sharpness
    return sharp / sharp.sum(1, keepdims=True), np.repeat(np.arange(sentences), 6), labels


def test_probabilities_of_a_right_model_hold_and_those_of_an_over_confident_one_are_mended():
    p, owners, labels = drawn(0, 1500)
    report = entities_report(find_entities(p, IOB, owners, labels), num_resamples=200)
    assert report["ece"] <= report.floor["ece"].high and "cannot tell" in report.verdict()
    low, high = report.intervals["precision"]
    assert low < report["precision"] < high and report["mean_confidence"] == pytest.approx(
        report["precision"], abs=0.03
    )
    over = find_entities(drawn(0, 1500, 3.0)[0], IOB, owners, labels)
    before = entities_report(over, num_resamples=200)
    assert "too high" in before.verdict() and before["ece"] > before.floor["ece"].high
    fit = over.sentences < 750
    scaling = LabelScaling("platt").fit(over.probability[fit, None], over.correct[fit, None].astype(int))
    after = scaling.evaluate(over.probability[~fit, None], over.correct[~fit, None].astype(int), confidence_level=None)
    assert after["ece_micro"] < 0.5 * before["ece"]


def alike(seed: int, shift: float = 0.0, sentences: int = 100):
    """Five entities a sentence, all right or all wrong, each as often as its probability says, less a shift."""
    generator = np.random.default_rng(seed)
    sure = np.repeat(generator.uniform(0.6, 0.95, sentences), 5)
    right = np.repeat(generator.random(sentences), 5) < sure - shift
    p = np.zeros((2 * len(sure), 3))
    p[1::2, 0], p[::2, 1], p[::2, 0] = 1.0, sure, 1.0 - sure
    labels = np.stack([right, np.zeros_like(right)], axis=1).ravel().astype(int)
    return find_entities(p, ["O", "B-X", "I-X"], np.repeat(np.arange(sentences), 10), labels)


def test_entities_of_one_sentence_are_no_independent_rows():
    """As if they were, the verdict was false in 73 of 100 such cuts, which are calibrated exactly."""
    u = np.linspace(0.6, 0.95, 1001)
    truth = {"precision": u.mean(), "mean_confidence": u.mean(), "brier": (u * (1.0 - u)).mean(), "ece": 0.0}
    told, held = 0, dict.fromkeys(truth, 0)
    for cut in range(30):
        report = entities_report(alike(cut), num_resamples=40)
        told += "too" in report.verdict()
        for key, value in truth.items():
            low, high = report.intervals[key]
            held[key] += low <= value <= high
    assert told <= 4 and min(held.values()) >= 25, (told, held)
    assert "too high" in entities_report(alike(0, 0.3), num_resamples=40).verdict()


def test_draws_keep_that_words_lean_the_same_way():
    draws = np.array([[[0.1, 0.9, 0.0], [0.1, 0.0, 0.9]], [[0.9, 0.1, 0.0], [0.9, 0.0, 0.1]]])
    draws[1, :, :] = [[0.45, 0.55, 0.0], [0.45, 0.0, 0.55]]
    found = find_entities(draws, ["O", "B-X", "I-X"], [3, 3], [1, 2])
    assert found.probability == pytest.approx([(0.9 * 0.9 + 0.55 * 0.55) / 2])
    assert find_entities(draws.mean(0), ["O", "B-X", "I-X"], [3, 3]).probability == pytest.approx([0.725**2])


def test_a_rule_counts_one_entity_of_a_sentence():
    """Sentences whose entities are all right or all wrong: five copies of one row are no five rows."""
    level, broken = 0.1, {"one": 0, "all": 0}
    for cut in range(200):
        generator = np.random.default_rng(cut)
        wrong = np.repeat(generator.random(60) < 0.12, 5)  # every entity has the risk 0.12, above what is asked for
        p = np.full((600, 3), 0.05)
        p[::2, 1], p[1::2, 0] = 0.9, 0.9
        p[::2, 0], p[1::2, 1] = 0.05, 0.05
        labels = np.where(np.arange(600) % 2 == 0, np.where(np.repeat(wrong, 2), 0, 1), 0)
        found = find_entities(p, ["O", "B-X", "I-X"], np.repeat(np.arange(60), 10), labels)
        assert len(found) == 300 and (found.correct == ~wrong).all()
        masks = {"one": found.one_a_sentence(cut), "all": np.ones(300, bool)}
        assert masks["one"].sum() == 60 and len(set(found.sentences[masks["one"]])) == 60
        for name, mask in masks.items():
            try:
                SelectiveThreshold(level).fit(
                    found.probability, found.correct.astype(int), input="confidence", mask=mask
                )
                broken[name] += 1  # it answers, and 12 % of that is wrong
            except ValueError:
                pass
    assert broken["one"] <= 200 * 0.05 + 2 * (200 * 0.05 * 0.95) ** 0.5 < broken["all"]
    assert (found.one_a_sentence(0) != found.one_a_sentence(1)).any()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (([[0.5, 0.5]], IOB, [0]), r"C = 5, one for each of tag_names, got shape \(1, 2\)"),
        (([[3.0, 1.0, 0, 0, 0]], IOB, [0]), "of logits take the softmax"),
        (([[float("nan"), 1.0, 0, 0, 0]], IOB, [0]), "must lie in"),
        ((np.eye(5)[:3], IOB, [0, 1]), "to each of 3 words|of each of 3 words where it belongs"),
        ((np.eye(5)[:3], IOB, [0, 1, 0]), "must stand together"),
        ((np.eye(5)[:2], IOB, [0, 0], [1, -100]), "leave out words without a label"),
    ],
)  # fmt: skip
def test_what_is_no_tagging_is_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        find_entities(*arguments)


def test_a_report_needs_a_truth_and_an_entity():
    with pytest.raises(ValueError, match="give labels="):
        entities_report(find_entities(np.eye(5)[1:2], IOB, [0]))
    with pytest.raises(ValueError, match="There is no entity in 1 sentences, neither found nor true"):
        entities_report(find_entities(np.eye(5)[:1], IOB, [0], [0]))
    p, owners, labels = drawn(1, 30)
    report = entities_report(find_entities(p, IOB, owners, labels), num_resamples=20)
    assert (
        "| X |" in str(report)
        and "<table" in report.to_html()
        and json.loads(report.to_json())["types"][1]["name"] == "Y"
    )
    (picture,) = report.figures(report).values()
    told = [text.get_text() for text in picture.axes[0].get_legend().get_texts()]
    assert told[1:] == [f"before: ECE {report['ece']:.3f}", f"after: ECE {report['ece']:.3f}"]
    assert 'alt="Reliability of the entities"' in report.part()


def test_a_tagger_that_finds_nothing_has_found_nothing_of_what_is_there():
    report = entities_report(find_entities(np.eye(5)[[0, 0, 0, 0]], IOB, [0, 0, 1, 2], [1, 2, 3, 0]), num_resamples=20)
    assert dict(report) == {"f1": 0.0, "f1_macro": 0.0, "precision": 0.0, "recall": 0.0}
    assert report.settings["num_true"] == 2 and [(row.name, row.true) for row in report.types] == [("X", 1), ("Y", 1)]
    assert report.verdict().startswith("F1 0.0000 of 0 entities found in 3 sentences, 2 are there. Of none there is")
    assert report.figures(report) == {} and "<img" not in report.part()
    assert "| f1 | 0.0" in str(report) and json.loads(report.to_json())["noise_floor"] is None


def test_a_ranking_of_few_wrong_entities_is_held_as_often_as_said():
    """Three wrong ones of sixty, two in a sentence: quantiles of resamples hold the truth in 7 of 10 data sets."""
    held, sets, sentences = 0, 0, np.arange(60) // 2
    for repeat in range(60):
        generator = np.random.default_rng([7, repeat])
        right = generator.random(60) < 0.95
        if right.all():
            continue
        odds = 1.0 + generator.normal(size=60) + right
        counts = np.stack([np.bincount(sentences, minlength=30)] * 2 + [np.bincount(sentences, right, 30)], axis=1)
        spans, types = np.stack([np.arange(60), np.arange(1, 61)], axis=1), ("X",) * 60
        found = Entities(expit(odds), right, sentences, spans, types, 30, {"X": counts.astype(np.int64)})
        low, high = entities_report(found, num_resamples=60, seed=repeat).intervals["error_auroc"]
        sets, held = sets + 1, held + (low <= norm.cdf(np.sqrt(0.5)) <= high)
    assert held >= 0.93 * sets, (held, sets)


def test_what_is_perfect_is_so_in_every_resample_however_rare_a_type_is():
    """A resample without the rare type has no F1 of it, and one without any entity has none at all.

    That two sentences are right is no certainty: the interval is the exact one of two trials.
    """
    labels = [1, 0, 0, 0, 0, 0, 0, 0, 3, 0]
    report = entities_report(find_entities(np.eye(5)[labels], IOB, range(10), labels), num_resamples=100)
    for key in ("f1", "f1_macro", "precision", "recall"):
        assert report.intervals[key] == (pytest.approx(0.025**0.5), 1.0), key
    for key in ("brier", "aurc"):  # one wrong entity in twelve, say, is possible
        assert report[key] == report.intervals[key][0] == 0.0 < report.intervals[key][1]


@pytest.mark.parametrize("seed", [-3, None, 0.5])
def test_a_seed_is_a_whole_number_in_every_report(seed):
    p = [0.9, 0.2, 0.6]
    found = find_entities(np.eye(5)[[1, 0]], IOB, [0, 1], [1, 0])
    for report in (
        lambda: entities_report(found, seed=seed),
        lambda: confidence_report(p, [1, 0, 1], seed=seed),
        lambda: calibration_report(p, [1, 0, 1], seed=seed),
        lambda: labels_report(p, [1, 0, 1], seed=seed),
    ):
        with pytest.raises(ValueError, match="`seed`"):
            report()
