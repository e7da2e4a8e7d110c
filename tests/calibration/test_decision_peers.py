"""Prediction sets against MAPIE 1.6 and crepes 0.9, whose answers `tests/support/decision_peers.py` has stored."""

import json

import decision_peers
import numpy as np
import pytest

from peft_calib.calibration import ConformalSets
from peft_calib.calibration.decide.bounds import conformal_rank
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
