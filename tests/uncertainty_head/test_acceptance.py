"""The acceptance tests that a head of AdUE or ALIEN has to pass, whatever it is fitted to."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from classifiers import classifier, rows
from drawn import copied, drawn, frozen
from scipy.special import expit

from peft_calib.uncertainty_head import HeadSettings, UncertaintyHead
from peft_calib.uncertainty_head.grid import Trial
from peft_calib.uncertainty_head.mapping import with_prior
from peft_calib.uncertainty_head.objective import cross_entropy
from peft_calib.uncertainty_head.scores import SCORES, base_score, uncertainty
from peft_calib.uncertainty_head.selection import aurocs
from peft_calib.uncertainty_head.training import Scorer, training

SMALL = {"lr": (1e-2, 1e-3), "epochs": 4, "alpha": (0.1,), "beta": (0.01,)}


def trained(trials, settings=None, features=None):
    """The stacked distances of trials after their last epoch."""
    *_, deltas = training(copied(), drawn(300) if features is None else features, trials, settings or HeadSettings())
    return deltas


def distances(deltas):
    return torch.stack([delta.flatten(1).square().sum(1) for delta in deltas]).sum(0)


def test_1_a_head_starts_at_the_base_score():
    features, head = drawn(), copied()
    start = [torch.zeros(1, *delta.shape) for delta in head.delta]
    for score in SCORES:
        found = Scorer(head, features, HeadSettings(score=score)).all(start, torch.float64)[0]
        base = base_score(features.logits.double(), score)
        apart, factor = base - found, 1 / (1 - 1 / 4) if score == "sr_norm" else 1.0
        bound = 0.0 if score == "entropy" else factor * math.log(4) / 100
        assert apart.min() > -1e-6 and apart.max() < bound + 1e-6


def test_2_nothing_is_learnt_at_rate_zero_and_a_larger_beta_keeps_nearer():
    features = drawn()
    head = UncertaintyHead.fit_features(
        features, drawn(seed=1), copied(), split="train", lr=0.0, keep_base=False, calibrate="none"
    )
    found = head.predict_features(features)
    torch.testing.assert_close(found.uncertainty, found.base_uncertainty, rtol=0, atol=1e-6)
    moved = distances(trained([Trial(1e-2, 10, 0.1, beta) for beta in (0.0, 0.01, 0.1, 1.0)]))
    assert (moved.diff() < 0).all()


def test_3_gradients_are_the_formulas():
    """Of the raw score and the entropy, in float64; `test_scores` has them apart."""
    z = drawn().logits.double().requires_grad_()
    p = z.detach().softmax(-1)
    for score in ("sr_raw", "entropy"):
        (found,) = torch.autograd.grad(uncertainty(z, score).sum(), z)
        weights = (100 * p).softmax(-1)
        wanted = {
            "sr_raw": -p * (weights - (weights * p).sum(-1, keepdim=True)),
            "entropy": -(p / math.log(4)) * (p.log() + torch.special.entr(p).sum(-1, keepdim=True)),
        }[score]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_4_two_classes_have_one_ranking_before_training():
    """In float64, where the smooth maximum and the entropy round no two rows to one value."""
    features = drawn(classes=2)
    logits, errors = features.logits.double(), features.errors.numpy()
    scores = [base_score(logits, score) for score in SCORES] + [-(logits[0, :, 0] - logits[0, :, 1]).abs()]
    found = aurocs(torch.stack(scores).numpy(), errors)
    np.testing.assert_allclose(found, found[0], rtol=0, atol=1e-12)


def test_5_the_model_and_its_predictions_stay_as_they_are():
    model, data = classifier("roberta"), rows(150, seed=1)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asked = {"requires_grad": [p.requires_grad for p in model.parameters()], "random": torch.random.get_rng_state()}
    head = UncertaintyHead.fit(model, None, data, folds=2, **SMALL)
    found = head.predict(model, data)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == asked["requires_grad"]
    assert torch.equal(torch.random.get_rng_state(), asked["random"])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.classifier.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        ids, mask = (torch.tensor([row[name] for row in data]) for name in ("input_ids", "attention_mask"))
        logits = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(found.predicted, logits.argmax(-1))


def test_6_a_confident_error_has_a_gradient():
    for score in SCORES:
        z = torch.tensor([[[25.0, 0.0]]], requires_grad=True)
        cross_entropy(uncertainty(z, score), torch.ones(1)).sum().backward()
        assert z.grad.abs().max() > 0.5


@pytest.mark.parametrize("family", ["roberta", "electra", "llama", "qwen"])
def test_7_saved_and_loaded_it_answers_the_same_bits_and_for_its_adapter_only(family, tmp_path):
    model, data = classifier(family), rows(150, seed=1, left=family in ("llama", "qwen"))
    head = UncertaintyHead.fit(model, None, data, keep_base=False, folds=2, **SMALL)
    head.save_pretrained(tmp_path)
    assert head.stored.deltas is not None
    loaded = UncertaintyHead.from_pretrained(tmp_path, model)
    for name in ("uncertainty", "error_probability", "base_uncertainty"):
        assert torch.equal(getattr(loaded.predict(model, data), name), getattr(head.predict(model, data), name))
    assert loaded.report == head.report and loaded.settings == head.settings
    other = classifier(family, seed=1)
    with pytest.raises(ValueError, match="not fitted for this model, which has another adapter"):
        UncertaintyHead.from_pretrained(tmp_path, other)
    with pytest.raises(ValueError, match="not fitted for this model, which has another adapter"):
        loaded.predict(other, data)
    with pytest.warns(UserWarning, match="another adapter.*used all the same"):
        forced = UncertaintyHead.from_pretrained(tmp_path, other, allow_other=True)
    with pytest.warns(UserWarning, match="another adapter.*used all the same"):
        assert len(forced.predict(other, data)) == 150


def test_8_a_trial_does_not_depend_on_the_others():
    trials = [Trial(lr, 4, alpha, beta) for lr in (1e-2, 1e-3) for alpha in (0.01, 1.0) for beta in (0.01, 1.0)]
    settings = HeadSettings(head_dropout=True)
    whole = trained(trials, settings)
    for order in (trials[::-1], trials[3:] + trials[:3]):
        for one, other in zip(whole, trained(order, settings), strict=True):
            again = torch.stack([other[order.index(trial)] for trial in trials])
            torch.testing.assert_close(again, one, rtol=1e-4, atol=1e-6)
    for place, trial in enumerate(trials):
        for one, alone in zip(whole, trained([trial], settings), strict=True):
            torch.testing.assert_close(alone[0], one[place], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("split", ["cross", "train", "validation"])
@pytest.mark.parametrize("errors", ["none", "all", "few"])
def test_9_without_errors_or_without_anything_else_the_base_score_stays(split, errors):
    features = drawn(300)
    labels = features.predicted.clone() if errors != "all" else (features.predicted + 1) % 4
    if errors == "few":
        labels[:19] = (labels[:19] + 1) % 4
    features = replace(features, labels=labels)
    head = UncertaintyHead.fit_features(features, features, copied(), split=split)
    count = {"none": "0 errors", "all": "0 correct items", "few": "errors"}[errors]
    assert head.stored.deltas is None and not head.report.helps
    assert count in head.report.why_base and "fewer than the 20" in head.report.why_base
    found = head.predict_features(drawn(100, seed=3))
    assert torch.equal(found.uncertainty, found.base_uncertainty)
    assert found.error_probability.isfinite().all()
    order = found.base_uncertainty.argsort()
    assert (found.error_probability[order].diff() >= 0).all()  # the order of the base score stays


def test_10_the_prior_of_balanced_batches_is_corrected():
    """Errors with logit-normal scores: what is calibrated for half errors is, shifted, calibrated for the share."""
    generator, share = np.random.default_rng(0), 0.08
    errors = generator.random(200_000) < share
    odds = generator.normal(np.where(errors, 1.0, -1.0), np.sqrt(2.0))  # log-odds for half errors, exactly
    assert with_prior(expit(odds), share).mean() == pytest.approx(errors.mean(), abs=0.002)
    assert expit(odds).mean() > 3 * share


def test_10_a_balanced_head_says_the_share_of_errors():
    features = drawn(4000, seed=4)
    keep = ~features.errors | (torch.arange(4000) % 4 == 0)  # an error in about ten items
    features, other = features.select(keep), drawn(4000, seed=5)
    other = other.select(~other.errors | (torch.arange(4000) % 4 == 0))
    free = {"lr": 0.1, "epochs": 20, "alpha": 0.0, "beta": 0.0, "patience": None}
    how = {"split": "train", "balance": True, "calibrate": "none", "keep_base": False, **free}
    head = UncertaintyHead.fit_features(features, other, copied(), score="sr_norm", **how)
    assert head.stored.prior == pytest.approx(float(features.errors.double().mean()))
    share = float(other.errors.double().mean())
    found = head.predict_features(other).error_probability.mean()
    balanced = UncertaintyHead(replace(head.stored, prior=None), copied())
    uncorrected = balanced.predict_features(other).error_probability.mean()
    assert uncorrected > 2 * share
    assert abs(found - share) < abs(uncorrected - share) / 4


def test_frozen_heads_are_never_changed():
    head = copied()
    before = frozen().weight.clone()
    UncertaintyHead.fit_features(None, drawn(), head, **SMALL)
    assert torch.equal(head.module.weight, before) and all(not delta.any() for delta in head.delta)
