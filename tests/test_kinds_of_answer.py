"""How fields of labels are read, and numbers brought into their unit: what a user's file can hold."""

import numpy as np
import pytest
import torch

from peft_calib.calibration import AnswerCalibration
from peft_calib.calibration.labels.decided import labels_decided
from peft_calib.predictor.kinds.labels import labels_in
from peft_calib.predictor.kinds.numbers import in_units


@pytest.mark.parametrize(
    ("field", "labels"),
    [
        ('["a", "b"]', ["a", "b"]),
        ("['a', 'it\\'s']", ["a", "it's"]),
        ('["bill \\ud83d\\ude00"]', ["bill \N{GRINNING FACE}"]),  # as json.dumps writes it
        ('["a\\/b"]', ["a/b"]),
        ("[1, 2.0]", ["1", "2"]),
        ("[]", []),
        ("a; b;", ["a", "b"]),
        (np.array(["a", "b"]), ["a", "b"]),
        (None, []),
    ],
)
def test_fields_of_labels(field, labels):
    assert labels_in(field, ";") == labels


@pytest.mark.parametrize("field", ["['a' 'b']", '["a" "b"]', "[bill, ship]", '["a", null]', "[true]", "[[1]]"])
def test_a_text_in_brackets_that_is_no_list_is_refused(field):
    with pytest.raises(ValueError, match="stands in brackets and is no list of labels"):
        labels_in(field, None)


def test_a_small_spread_far_from_zero_is_kept():
    values = in_units(torch.tensor([[[-1.0], [0.5]]]), (1.7e9, 10.0))
    assert values.flatten().tolist() == [1.7e9 - 10, 1.7e9 + 5]


def test_a_rule_on_rows_without_any_label_says_so():
    none = np.zeros((5, 2), bool)
    found = labels_decided(~none, none, none, 0.95, "", {"risk": 0.1, "miss": None})
    assert found.verdict().startswith("On 5 rows 10 labels are given, 10 of them wrongly; no label holds.")


def test_falling_scores_must_be_scores():
    rng = np.random.default_rng(0)
    scores, right = {"own": rng.normal(size=60)}, rng.random(60) < 0.5
    with pytest.raises(ValueError, match=r"falling names \['zzz'\], which are none of the scores: \['own'\]"):
        AnswerCalibration(falling=["zzz"]).fit(scores, right)
    with pytest.raises(ValueError, match=r"falling is a list of names: falling=\['own'\]"):
        AnswerCalibration(falling="own")
