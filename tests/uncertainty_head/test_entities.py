"""Entities as the field reads tags, and one uncertainty and one error for each."""

import json
import math

import entity_peers
import pytest
import torch

from peft_calib.calibration.entities import spans_of
from peft_calib.uncertainty_head.entities import entities, sentences
from peft_calib.uncertainty_head.features import FeatureSet

NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def of_tags(predicted: list[list[str]], labels: list[list[str]] | None = None) -> FeatureSet:
    """Features whose predictions are these tags."""
    ids = torch.tensor([NAMES.index(tag) for tags in predicted for tag in tags])
    items = torch.tensor([[row, token] for row, tags in enumerate(predicted) for token in range(len(tags))])
    known = None if labels is None else torch.tensor([NAMES.index(tag) for tags in labels for tag in tags])
    logits = torch.nn.functional.one_hot(ids, len(NAMES)).float()[None]
    return FeatureSet(torch.zeros(1, len(ids), 2), logits, known, items=items)


def test_spans_are_those_that_seqeval_finds():
    expected = json.loads(entity_peers.FILE.read_text())["seqeval 1.2.2"]
    for tags, theirs in zip(entity_peers.sentences(), expected, strict=True):
        assert spans_of(tags) == [tuple(entity) for entity in theirs], tags


def test_tags_without_a_mark_are_types_and_bilou_is_known():
    assert spans_of(["PER", "PER", "O", "LOC", "PER"]) == [("PER", 0, 2), ("LOC", 3, 4), ("PER", 4, 5)]
    assert spans_of(["B-PER", "L-PER", "U-PER", "U-PER"]) == [("PER", 0, 2), ("PER", 2, 3), ("PER", 3, 4)]
    assert spans_of([]) == []


def test_a_mark_alone_is_one_of_a_nameless_type_as_in_seqeval():
    expected = [("_", 0, 2), ("_", 3, 4), ("_", 4, 5)]
    for names in (None, ["O", "B", "I"]):
        assert spans_of(["B", "I", "O", "B", "B"], names) == expected
    assert spans_of(["I", "E", "S", "O", "I"], list("OBIES")) == [("_", 0, 2), ("_", 2, 3), ("_", 4, 5)]


@pytest.mark.parametrize(
    ("names", "tags", "expected"),
    [
        (["O", "E-mail", "S-Bahn"], ["E-mail", "E-mail", "S-Bahn"], [("E-mail", 0, 2), ("S-Bahn", 2, 3)]),
        (["O", "B-X", "I-X", "S-Bahn", "E"], ["S-Bahn", "B-X", "E"], [("S-Bahn", 0, 1), ("X", 1, 2), ("E", 2, 3)]),
        (["O", "B-X", "I-X", "E-X", "S-X", "S-Y", "E-mail"], ["S-Y", "S-Y", "E-mail"],
         [("Y", 0, 1), ("Y", 1, 2), ("E-mail", 2, 3)]),
        (["O", "I-X"], ["I-X", "I-X"], [("X", 0, 2)]),
    ],
)  # fmt: skip
def test_all_tags_tell_a_mark_from_a_type_that_looks_marked(names, tags, expected):
    assert spans_of(tags, names) == expected
    ids = torch.tensor([names.index(tag) for tag in tags])
    logits = torch.nn.functional.one_hot(ids, len(names)).float()[None]
    items = torch.tensor([[0, token] for token in range(len(tags))])
    features = FeatureSet(torch.zeros(1, len(ids), 2), logits, None, items=items)
    found = entities(features, torch.zeros(len(ids)), names)
    assert [(kind, *span) for kind, span in zip(found.types, found.spans.tolist(), strict=True)] == expected
    with pytest.raises(ValueError, match="'I-Z' is none of the tags"):
        spans_of(["I-Z"], names)


PREDICTED = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC", "I-LOC", "O"]]
LABELS = [["B-PER", "I-PER", "O", "B-PER"], ["B-PER", "B-LOC", "O", "O"]]
U = torch.tensor([0.1, 0.4, 0.9, 0.2, 0.3, 0.5, 0.5, 0.0])


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("max", [0.4, 0.2, 0.5]),
        ("mean", [0.25, 0.2, 0.5]),
        ("any", [1 - 0.9 * 0.6, 0.2, 0.75]),
    ],
)
def test_an_entity_has_the_uncertainty_of_its_tokens(how, expected):
    found = entities(of_tags(PREDICTED, LABELS), U, NAMES, how)
    assert found.types == ("PER", "LOC", "LOC")
    assert found.rows.tolist() == [0, 0, 1] and found.spans.tolist() == [[0, 2], [3, 4], [5, 7]]
    torch.testing.assert_close(found.uncertainty, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


def test_an_entity_is_wrong_by_its_type_or_its_span_and_what_is_not_found_is_counted():
    found = entities(of_tags(PREDICTED, LABELS), U, NAMES)
    assert found.errors.tolist() == [False, True, True]
    assert found.missed == 3  # the PER at the end of the first sentence, and both of the second


def test_an_entity_ends_where_its_sentence_does():
    found = entities(of_tags([["B-PER"], ["I-PER"]]), torch.tensor([0.1, 0.2]), NAMES)
    assert found.spans.tolist() == [[0, 1], [1, 2]] and found.errors is None


def test_a_certain_error_of_one_token_makes_one_of_the_whole():
    found = entities(of_tags([["B-PER", "I-PER"]]), torch.tensor([1.0, 0.3]), NAMES, "any")
    assert found.uncertainty.tolist() == [1.0]
    tiny = entities(of_tags([["B-PER", "I-PER"]]), torch.tensor([1e-12, 1e-12]).double(), NAMES, "any")
    assert math.isclose(float(tiny.uncertainty[0]), 2e-12, rel_tol=1e-6)


def test_a_sentence_is_wrong_if_any_of_its_tokens_is():
    right = [["O", "O"], *PREDICTED]
    found = sentences(of_tags(right, [["O", "O"], *LABELS]), torch.cat([torch.tensor([0.2, 0.1]), U]))
    assert found.errors.tolist() == [False, True, True]
    torch.testing.assert_close(found.uncertainty, torch.tensor([0.2, 0.9, 0.5]).double())


def test_a_data_set_without_a_predicted_entity_has_none():
    found = entities(of_tags([["O", "O"]], [["B-PER", "O"]]), torch.zeros(2), NAMES)
    assert len(found) == 0 and found.errors.tolist() == [] and found.missed == 1 and found.spans.shape == (0, 2)


def test_what_cannot_be_grouped_is_refused():
    features = of_tags(PREDICTED, LABELS)
    with pytest.raises(ValueError, match="how must be one of 'max', 'mean', 'any', got 'median'"):
        entities(features, U, NAMES, "median")
    with pytest.raises(ValueError, match="the tags of 5 classes, in order; got 4"):
        entities(features, U, NAMES[:4])
    with pytest.raises(ValueError, match=r"one uncertainty an item, \(8,\); got \(3,\)"):
        entities(features, U[:3], NAMES)
    with pytest.raises(ValueError, match="one item a row"):
        entities(FeatureSet(features.features, features.logits), U, NAMES)
