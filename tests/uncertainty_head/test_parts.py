"""The parts of a fit against what they stand for: the optimiser, the choice of an epoch, the map and the verdict."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn import copied, drawn, frozen
from scipy.optimize import minimize
from scipy.special import expit, log_expit
from sklearn.metrics import roc_auc_score
from torch.nn.functional import binary_cross_entropy
from torch.optim.lr_scheduler import OneCycleLR

from peft_calib.uncertainty_head import HeadSettings, UncertaintyHead
from peft_calib.uncertainty_head.grid import Trial
from peft_calib.uncertainty_head.mapping import PlattScaling, fit_map, log_odds, probability_of_error, with_prior
from peft_calib.uncertainty_head.scores import base_score, uncertainty
from peft_calib.uncertainty_head.selection import _Best, aurocs
from peft_calib.uncertainty_head.training import KeyedDropout, Order, training
from peft_calib.uncertainty_head.verdict import Resamples, judge


def test_a_trial_is_adam_under_a_one_cycle_schedule():
    """By hand, one head alone, with torch's own optimiser, schedule and cross entropy."""
    features, settings, trial = drawn(300), HeadSettings(), Trial(3e-3, 5, 0.3, 0.05)
    head = frozen().requires_grad_(True)
    start = [p.detach().clone() for p in head.parameters()]
    optimiser = torch.optim.Adam(head.parameters(), lr=trial.lr)
    steps = 5 * 3  # of 128, 128 and 44 items
    schedule = OneCycleLR(optimiser, max_lr=trial.lr, total_steps=steps, pct_start=2 / steps)  # a tenth, at least two
    order, errors = Order(features.errors, settings, 0), features.errors.float()
    anchors = base_score(features.logits.double(), "entropy").float()
    for _ in range(5):
        for batch in order.next_epoch().split(128):
            scores = uncertainty(head(features.features[0, batch])[None])
            loss = binary_cross_entropy(scores, errors[batch]) + 0.3 * (scores - anchors[batch]).square().mean()
            loss = loss + 0.05 * sum((p - q).square().sum() for p, q in zip(head.parameters(), start, strict=True))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    *_, deltas = training(copied(), features, [Trial(1e-4, 5, 0, 0), trial], settings)
    for delta, parameter, before in zip(deltas, head.parameters(), start, strict=True):
        torch.testing.assert_close(delta[1], parameter.detach() - before, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 5, 12, 300])
def test_any_number_of_items_and_steps_can_be_trained_on(count):
    features = replace(drawn(count), labels=torch.zeros(count, dtype=torch.int64))
    for epochs in (1, 2, 11):
        *_, deltas = training(copied(), features, [Trial(1e-3, epochs, 0.1, 0.1)], HeadSettings())
        assert all(delta.isfinite().all() for delta in deltas)


def test_an_order_has_every_item_once_or_errors_as_often_as_the_rest():
    errors = torch.arange(1000) < 50
    plain = Order(errors, HeadSettings(), 0)
    first, second = plain.next_epoch(), plain.next_epoch()
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(1000))
    assert not torch.equal(first, second)
    assert torch.equal(Order(errors, HeadSettings(), 0).next_epoch(), first)
    assert not torch.equal(Order(errors, HeadSettings(seed=1), 0).next_epoch(), first)
    balanced = Order(errors, HeadSettings(balance=True), 0).next_epoch()
    assert errors[balanced].float().mean() == pytest.approx(0.5, abs=0.08)  # 5 sd of 1000 draws


def test_a_random_start_forgets_the_frozen_head():
    """The ablation: with a rate of 0 the head is a fresh one, drawn by its seed within torch's bound."""
    options = {"split": "train", "init": "random", "lr": 0.0, "keep_base": False, "calibrate": "none"}
    features, head = drawn(300), copied()
    found = [UncertaintyHead.fit_features(features, drawn(300, seed=1), head, seed=s, **options) for s in (0, 0, 1)]
    weights = [one.stored.deltas["weight"] + head.starts[0]["weight"] for one in found]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert 0.2 < weights[0].abs().max() <= 0.25 + 1e-6  # 1 / sqrt(16)
    bias = found[0].stored.deltas["bias"]
    logits = features.features @ weights[0].T + bias
    wanted = uncertainty(logits.double(), "entropy")
    torch.testing.assert_close(found[0].predict_features(features).uncertainty, wanted, rtol=1e-4, atol=1e-5)


def test_dropout_is_its_own_and_keeps_the_mean():
    x = torch.ones(200, 300)
    before = torch.random.get_rng_state()
    made = KeyedDropout(0.3, torch.Generator().manual_seed(0))(x)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert made.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert made.mean() == pytest.approx(1.0, abs=0.02)


def test_patience_ends_a_trial_and_keeps_its_best_epoch():
    best = _Best(2, patience=2)
    path = [(0.6, 0.5), (0.7, 0.4), (0.7, 0.45), (0.65, 0.9), (0.9, 0.9)]
    kept = [best.update(np.arange(2), epoch, np.array(row)).tolist() for epoch, row in enumerate(path, 1)]
    assert kept == [[True, True], [True, False], [False, False], [False, False], [False, False]]
    assert best.epochs.tolist() == [2, 1] and best.aurocs.tolist() == [0.7, 0.5]
    last = _Best(1, patience=None)
    assert all(last.update(np.arange(1), epoch, np.array([1.0 / epoch]))[0] for epoch in (1, 2, 3))
    assert last.epochs.tolist() == [3]


def test_an_auroc_is_scikit_learn_s_with_ties():
    generator = np.random.default_rng(0)
    scores, errors = np.round(generator.random((3, 200)), 1), generator.random(200) < 0.3
    np.testing.assert_allclose(aurocs(scores, errors), [roc_auc_score(errors, row) for row in scores], atol=1e-12)


def test_resampled_aurocs_are_those_of_repeated_items():
    generator = np.random.default_rng(0)
    scores, errors = np.round(generator.random((2, 60)), 1), generator.random(60) < 0.3
    scores[1] = generator.random(60)
    groups = np.arange(60) // 3
    for given in (None, groups):
        drawn = Resamples.of(errors, given, seed=0)
        found = drawn.aurocs(scores)
        for resample in (0, 7):
            weights = drawn.weights[resample].astype(int)
            if given is not None:
                assert all(len(set(weights[groups == row])) == 1 for row in range(20))
            again = np.repeat(np.arange(60), weights)
            wanted = [roc_auc_score(errors[again], row[again]) for row in scores]
            np.testing.assert_allclose(found[resample], wanted, atol=1e-6)


@pytest.mark.parametrize("num_errors", [1, 3])
def test_few_errors_tell_of_no_head_that_it_helps(num_errors):
    """Two scores that are as good: quantiles of resamples called one better in 29 and 13 of 100 cases."""
    errors, found = np.arange(100) < num_errors, []
    for seed in range(60):
        generator = np.random.default_rng([8, seed])
        scores = generator.normal(size=100) + errors + 0.5 * generator.normal(size=(2, 100))
        verdict = judge(errors, *scores, seed=seed)
        assert verdict.low <= verdict.difference <= verdict.high
        found.append(verdict.helps)
    assert sum(found) <= 3


def test_a_verdict_tells_help_harm_and_neither():
    generator = np.random.default_rng(0)
    errors = generator.random(1000) < 0.3
    good, bad = errors + generator.normal(0, 1, 1000), errors + generator.normal(0, 3, 1000)
    assert judge(errors, bad, good).helps and "helps" in str(judge(errors, bad, good))
    assert judge(errors, good, bad).harms and "harm" in str(judge(errors, good, bad))
    same = judge(errors, good, good + 1e-9 * bad)
    assert not same.helps and not same.harms and "cannot be told" in str(same)
    assert same.low <= same.difference <= same.high


def test_what_choosing_adds_is_taken_off():
    """The best of 30 scores that differ from the base by noise alone looks better; the verdict does not say so."""
    helped, raw, corrected = 0, [], []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        errors = generator.random(300) < 0.3
        base = errors + generator.normal(0, 1, 300)
        candidates = base + generator.normal(0, 0.3, (30, 300))
        candidates = np.concatenate([base[None], candidates + generator.normal(0, 0.3, (30, 300))])
        chosen = candidates[aurocs(candidates, errors).argmax()]
        verdict = judge(errors, base, chosen, candidates, seed=seed)
        raw.append(verdict.head - verdict.base)
        corrected.append(verdict.difference)
        helped += verdict.helps
    assert np.mean(raw) > 0 and np.mean(corrected) < 0.5 * np.mean(raw)
    assert helped <= 2


def test_the_line_in_log_odds_is_platt_s():
    """Against a minimiser of the likelihood of Platt's targets, in float64."""
    generator = np.random.default_rng(0)
    scores = generator.random(800)
    errors = generator.random(800) < expit(0.6 * np.log(scores / (1 - scores)) - 1.5)
    method, told = fit_map("platt", scores, errors, fewest=20)
    odds, wrong = np.log(scores / (1 - scores)), errors.sum()
    targets = np.where(errors, (wrong + 1) / (wrong + 2), 1 / (800 - wrong + 2))

    def loss(w):
        z = w[0] * odds + w[1]
        return -(targets * log_expit(z) + (1 - targets) * log_expit(-z)).mean()

    wanted = minimize(loss, [1.0, 0.0], tol=1e-12).x
    assert [method.slope, method.intercept] == pytest.approx(wanted.tolist(), abs=1e-3)
    assert "(Platt)" in told
    found = probability_of_error(method, scores)
    np.testing.assert_allclose(found, expit(method.slope * odds + method.intercept), atol=1e-9)
    again = PlattScaling.from_state(method.state())
    np.testing.assert_array_equal(probability_of_error(again, scores), found)


@pytest.mark.parametrize(("wrong", "count"), [(0, 200), (5, 200), (200, 200), (60, 120)])
def test_where_a_slope_has_no_support_the_share_of_errors_is_kept(wrong, count):
    """Also where the fitted slope would turn the order around."""
    scores = np.linspace(0.01, 0.9, count)
    errors = np.arange(count) < wrong  # the surest are wrong
    method, told = fit_map("platt", scores, errors, fewest=20)
    found = probability_of_error(method, scores)
    assert method.slope == 1.0 and ("ranks errors backwards" if wrong == 60 else "no slope") in told
    assert found.mean() == pytest.approx((wrong + 1) / (count + 2), abs=1e-9)
    assert (np.diff(found) > 0).all()


def test_steps_need_errors():
    generator = np.random.default_rng(0)
    scores = generator.random(1500)
    errors = generator.random(1500) < scores**2
    few, told = fit_map("isotonic", scores[:300], errors[:300], fewest=20)
    assert isinstance(few, PlattScaling) and "need 200 errors" in told
    many, _ = fit_map("isotonic", scores, errors, fewest=20)
    found = probability_of_error(many, scores)
    assert (np.diff(found[scores.argsort()]) >= 0).all()
    assert np.abs(found - scores**2).mean() < 0.05
    none, _ = fit_map("none", scores, errors, fewest=20)
    assert none is None and probability_of_error(None, scores) is not None


def test_the_smallest_scores_keep_their_order():
    scores = np.array([0.0, 1e-30, 1e-20, 1e-5, 0.5, 1 - 1e-9, 1.0])
    odds = log_odds(scores)
    assert np.isfinite(odds).all() and (np.diff(odds[:, 1] - odds[:, 0]) > 0).all()
    np.testing.assert_allclose(with_prior(np.array([0.5, 0.9]), 0.1), [0.1, 0.5], atol=1e-12)
    assert with_prior(scores, None) is scores


def test_a_score_that_ranks_backwards_is_told():
    generator = np.random.default_rng(0)
    scores = generator.random(400)
    errors = generator.random(400) < 0.6 * (1 - scores)
    method, told = fit_map("platt", scores, errors, fewest=20)
    assert "ranks errors backwards" in told and "no slope" not in told and method.slope == 1
    _, few = fit_map("platt", scores[:30], errors[:30], fewest=20)
    _, one = fit_map("platt", np.full(400, 0.3), errors, fewest=20)
    assert "support no slope" in few and "backwards" not in few + one
