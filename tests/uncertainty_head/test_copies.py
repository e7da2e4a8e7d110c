"""Rows that occur more than once are one: a head must not be judged by copies of what it was fitted on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from classifiers import classifier, rows

from peft_calib.calibration.fingerprint import SplitFingerprint
from peft_calib.uncertainty_head import CopiedHead, FeatureSet, HeadSettings, UncertaintyHead, extract_features
from peft_calib.uncertainty_head.copies import row_groups, share_of_copies
from peft_calib.uncertainty_head.selection import folds_of, held_part
from peft_calib.uncertainty_head.verdict import Resamples

STRONG = {"lr": (1e-2, 4e-3), "epochs": 40, "alpha": 0.01, "beta": 0.001}


def noise(count=150, width=64):
    """Features that say nothing of errors, and their head."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(1, count, width, generator=generator)
    head = torch.nn.Linear(width, 3).requires_grad_(False)
    head.weight.copy_(0.1 * torch.randn(3, width, generator=generator))
    head.bias.zero_()
    logits = head(features)
    wrong = torch.rand(count, generator=generator) < 0.35
    labels = (logits[0].argmax(-1) + wrong.long()) % 3
    return FeatureSet(features, logits, labels), CopiedHead(head, [dict(head.named_parameters())])


@pytest.mark.parametrize(
    "options", [{}, {"split": "validation", "held_out": 0.4}, {"keep_base": False}], ids=["cross", "validation", "any"]
)
def test_copies_of_noise_are_not_learned(options):
    """A head learns them by heart, which looks like help wherever a copy judges."""
    features, head = noise()
    several = features.select(torch.arange(150).repeat(3))
    report = UncertaintyHead.fit_features(None, several, head, **STRONG, **options).report
    assert not report.helps
    assert report.verdict is None or report.verdict.difference < 0.06


def test_copies_lie_on_one_side_whatever_their_labels():
    features, _ = noise(60)
    again = replace(features, labels=(features.labels + 1) % 3)
    both = FeatureSet(*(torch.cat([a, b], 1) for a, b in ((features.features,) * 2, (features.logits,) * 2)))
    both = replace(both, labels=torch.cat([features.labels, again.labels]))
    groups = row_groups(both)
    assert groups.tolist() == [*range(60), *range(60)]
    folds, held = folds_of(both, HeadSettings()), held_part(both, HeadSettings(held_out=0.3))
    assert (folds[:60] == folds[60:]).all() and torch.equal(held[:60], held[60:])
    drawn = Resamples.of(both.errors.numpy(), groups, 0).weights
    assert (drawn[:, :60] == drawn[:, 60:]).all()
    assert row_groups(features).tolist() == list(range(60))


def test_rounding_does_not_tell_copies_apart_and_near_rows_are_others():
    features, _ = noise(300)
    rounded = features.features * (1 + 1e-6 * torch.randn(features.features.shape, generator=torch.manual_seed(0)))
    near = features.features + 0.02 * torch.randn(features.features.shape, generator=torch.manual_seed(1))
    values = torch.cat([features.features, rounded, near], 1)
    groups = row_groups(FeatureSet(values, torch.zeros(1, 900, 3)))
    assert groups.tolist() == [*range(300), *range(300), *range(300, 600)]


def test_rows_padded_to_other_widths_are_copies():
    data = rows(40)
    bare = [{k: [v for v, m in zip(row[k], row["attention_mask"], strict=True) if m] for k in
             ("input_ids", "attention_mask")} | {"labels": row["labels"]} for row in data]  # fmt: skip
    model = classifier("bert")
    padded, alone = extract_features(model, data), extract_features(model, bare, batch_size=1)
    whole = FeatureSet(torch.cat([padded.features, alone.features], 1), torch.cat([padded.logits, alone.logits], 1))
    assert row_groups(whole).tolist() == [*range(40), *range(40)]


def test_tokens_of_copied_rows_stay_together():
    features, _ = noise(40)
    items = torch.stack([torch.arange(40) // 4, torch.arange(40) % 4], 1)
    twice = features.select(torch.arange(40).repeat(2))
    twice = replace(twice, items=torch.cat([items, items + torch.tensor([10, 0])]))
    assert row_groups(twice).tolist() == [i // 4 for i in range(40)] * 2


def test_copies_count_once_among_the_errors_that_a_head_needs():
    features, head = noise(40)
    several = features.select(torch.arange(40).repeat(10))
    report = UncertaintyHead.fit_features(None, several, head, **STRONG).report
    wrong = int(features.errors.sum())
    assert wrong < 20
    assert f"{wrong} errors among the 400 items" in report.why_base and "copies counted once" in report.why_base
    one = features.select(torch.arange(2).repeat(100))
    one = replace(one, labels=torch.arange(200) % 3)
    report = UncertaintyHead.fit_features(None, one, head, **{**STRONG, "fewest": 1}).report
    assert "2 different rows cannot be dealt to 5 folds" in report.why_base


def test_the_same_rows_in_two_sets_are_known_by_their_features():
    features, head = noise()
    features = replace(features, hashes=np.arange(150, dtype=np.uint64))
    other = features.select(torch.arange(100).repeat_interleave(torch.arange(100) % 2 + 2))
    assert share_of_copies(features, other) == 1
    features = features.select(torch.arange(100))
    assert SplitFingerprint.of_hashes(other.hashes).seen(features.hashes) == 1  # two or three times
    with pytest.raises(ValueError, match="100% of the calibration items are among the validation items"):
        UncertaintyHead.fit_features(None, other, head, calibration=features, **STRONG)
    assert share_of_copies(features, replace(features, features=features.features[..., :8])) == 0
    assert np.isclose(share_of_copies(features.select(torch.arange(75)), features), 0.75)
