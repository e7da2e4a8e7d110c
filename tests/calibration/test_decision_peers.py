"""Sets and labels against MAPIE 1.6 and crepes 0.9, whose answers `tests/support/decision_peers.py` has stored."""

import json

import decision_peers
import numpy as np
import pytest

from peft_calib.calibration import ConformalSets, LabelThresholds
from peft_calib.calibration.decide.bounds import chance_of_so_few, conformal_rank
from peft_calib.calibration.decide.set_scores import class_scores, cut_at, smoothed_cut

STORED = json.loads(decision_peers.FILE.read_text())
P, Y, NEW = (np.array(STORED[name]) for name in ("probabilities", "labels", "new"))
MAPIE, CREPES, ALPHA, TOLERANCE = STORED["mapie"], STORED["crepes"], 1 - decision_peers.CONFIDENCE, 1e-9


def _of_labels(scores):
    return scores[np.arange(len(Y)), Y]


def test_lac_is_mapies():
    sets = ConformalSets(alpha=0.1, score="lac").fit(P, Y)
    assert _of_labels(class_scores(P, "lac", None)) == pytest.approx(np.array(MAPIE["lac"]["scores"]), abs=TOLERANCE)
    assert sets.threshold == pytest.approx(MAPIE["lac"]["quantile"], abs=TOLERANCE)
    assert (sets.predict(NEW) == np.array(MAPIE["lac"]["sets"], bool)).all()


def test_randomized_aps_is_mapies_for_its_random_numbers():
    own = class_scores(P, "aps", np.array(MAPIE["u_fit"]))
    assert _of_labels(own) == pytest.approx(np.array(MAPIE["aps"]["scores"]), abs=TOLERANCE)
    cut = cut_at(_of_labels(own), conformal_rank(len(Y), 0.1))
    assert cut.low == pytest.approx(MAPIE["aps"]["quantile"], abs=TOLERANCE)
    sets = class_scores(NEW, "aps", np.array(MAPIE["u_new"])) <= cut.low
    assert (sets == np.array(MAPIE["aps"]["sets"], bool)).all()


def test_scores_of_aps_and_raps_are_mapies():
    plain, raps = class_scores(P, "aps", None), class_scores(P, "raps", None, 0.05, 1)
    assert _of_labels(plain) == pytest.approx(np.array(MAPIE["plain aps scores"]), abs=TOLERANCE)
    assert _of_labels(raps) == pytest.approx(np.array(MAPIE["raps scores"]), abs=TOLERANCE)


@pytest.mark.parametrize(("name", "groups"), [("all", None), ("class by class", "label")])
def test_lac_is_crepes_where_rounding_does_not_decide(name, groups):
    """Both take `p > alpha`, but that crepes takes `p >= alpha` too: seen where (n + 1) alpha is a whole number."""
    sets = ConformalSets(alpha=0.1, score="lac", groups=groups).fit(P, Y).predict(NEW)
    values = np.array(CREPES[name]["p-values"])
    assert (sets == (values > ALPHA + 1e-12)).all()
    whole = np.isclose(values, ALPHA, atol=1e-12)
    assert ((sets == np.array(CREPES[name]["sets"], bool)) | whole).all()
    if name == "all":
        assert not whole.any()


def test_smoothed_p_values_are_crepes():
    """`p = (g + U (1 + e)) / (n + 1)`: for crepes' p our cut decides as `p > alpha` does, whatever its U was."""
    own, others = _of_labels(class_scores(P, "lac", None)), class_scores(NEW, "lac", None)
    chance = smoothed_cut(own, ALPHA).chance(others)
    smoothed = np.array(CREPES["all"]["smoothed p-values"])
    greater = (own[:, None, None] > others).sum(axis=0)
    u = smoothed * (len(Y) + 1) - greater  # no ties here
    assert ((u >= -1e-9) & (u <= 1 + 1e-9)).all()
    assert ((1 - u < chance) == (smoothed > ALPHA)).all()
    assert ((chance > 0) & (chance < 1)).any()


SEVERAL = STORED["several labels"]
OF_LABELS, HELD = np.array(SEVERAL["probabilities"]), np.array(SEVERAL["labels"])
RISK, GRID = decision_peers.RISK, decision_peers.GRID


def test_tests_of_a_label_are_mapies_but_that_it_rounds_errors_up():
    """MAPIE's p-values of a binary loss are the exact binomial tests that a label's threshold comes from.

    It counts errors as `ceil(n (1 - precision))`: where rounding lifts that above the whole number, its p-value is
    that of one error more, or Hoeffding's where that is smaller.
    """
    rounded = 0
    for k, found in enumerate(SEVERAL["mapie"]["labels"]):
        given, theirs = OF_LABELS[:, [k]] > GRID, np.array(found["p-values"])
        errors, size = (given & (HELD[:, [k]] == 0)).sum(axis=0), given.sum(axis=0)
        exact, more = (chance_of_so_few(errors + extra, size, RISK) for extra in (0, 1))
        same = np.ceil(size * (1.0 - (size - errors) / size)) == errors
        assert exact[same] == pytest.approx(theirs[same], abs=TOLERANCE)
        assert ((exact < theirs) & (theirs <= more + TOLERANCE))[~same].all()
        rounded += int((~same).sum())
    assert 0 < rounded < 3 * len(GRID) / 2


def test_chains_of_tests_give_a_label_to_no_fewer_rows_than_mapies_grid():
    """Every threshold of a grid at `1 - confidence` over its length (Bonferroni) against few chains at more each."""
    rule = LabelThresholds(risk=RISK, confidence=0.9, joint=False).fit(OF_LABELS, HELD)
    for k, (part, found) in enumerate(zip(rule.parts, SEVERAL["mapie"]["labels"], strict=True)):
        likely = [threshold for threshold in found["valid"] if threshold >= 0.5]  # ours gives none below
        if likely:
            assert part.given >= (OF_LABELS[:, k] > min(likely)).sum() > 0
    assert all(part.gives for part in rule.parts) and not SEVERAL["mapie"]["labels"][2]["valid"]


def test_mapies_controller_of_labels_promises_a_mean_over_rows_and_nothing_of_a_label():
    """One threshold for all labels, and the mean of each row's share of wrong labels, 1 where a row is given none."""
    found = SEVERAL["mapie"]["rows"]
    given = OF_LABELS[:, :, None] > GRID
    wrong, size = (given & (HELD[:, :, None] == 0)).sum(axis=1), given.sum(axis=1)
    of_rows = np.where(size > 0, wrong / np.maximum(size, 1), 1.0).mean(axis=0)
    assert of_rows == pytest.approx(np.array(found["risks"]), abs=TOLERANCE)
    at = given[:, :, int(np.flatnonzero(np.isclose(GRID, found["threshold"]))[0])]
    shares = (at & (HELD == 0)).sum(axis=0) / at.sum(axis=0)
    assert shares[2] > RISK > shares[0]  # the rare label is wrong in more of the rows that are given it
    rule = LabelThresholds(risk=RISK, confidence=0.9).fit(OF_LABELS, HELD)
    assert all(part.errors / part.given <= RISK for part in rule.parts if part.gives) and not rule.parts[2].gives


def test_mapies_conformal_recall_of_a_label_is_a_conformal_rank_and_ours_is_sure_of_it():
    """`(n r + 1) / (n + 1) < alpha` on average over fits; with 95 % confidence a lower threshold is needed."""
    held = np.sort(OF_LABELS[HELD[:, 0] == 1, 0])
    size, found = len(held), SEVERAL["mapie"]["recall"]
    assert (np.arange(1, size + 1) + 1) / (size + 1) == pytest.approx(np.array(found["bounds"]), abs=TOLERANCE)
    kept = held > found["threshold"]
    assert kept.sum() == conformal_rank(size, ALPHA) and held[kept][0] == held[size - conformal_rank(size, ALPHA)]
    own = LabelThresholds(risk=RISK, miss=ALPHA, confidence=0.95, joint=False).fit(OF_LABELS, HELD).parts[0]
    assert 0.0 < own.ruled_out_below < held[kept][0]
