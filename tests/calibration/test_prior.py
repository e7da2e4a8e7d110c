"""Class shares: the correction is Bayes' rule, the estimate the maximum of the likelihood, its interval covers."""

import json

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit

from peft_calib.calibration import PriorCorrection, PriorEstimate, calibration_report, estimate_prior
from peft_calib.calibration.inputs import softmax
from peft_calib.calibration.recalibrate import TemperatureScaling, load_state
from peft_calib.json_files import read_json

TRAIN, NEW = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.2, 0.7])
MEANS = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])


def gaussian(generator, prior, size):
    """Rows of three normal classes, their labels, and the exact posterior under the training shares."""
    y = generator.choice(3, size, p=prior)
    x = MEANS[y] + generator.normal(size=(size, 2))
    return softmax(_log_density(x) + np.log(TRAIN)), y, x


def _log_density(x):
    return -0.5 * ((x[:, None] - MEANS) ** 2).sum(axis=-1)


def test_the_correction_is_the_posterior_under_the_new_shares():
    p, _, x = gaussian(np.random.default_rng(0), NEW, 200)
    exact = softmax(_log_density(x) + np.log(NEW))
    correction = PriorCorrection(TRAIN, NEW)
    assert correction.transform(p, input="probabilities") == pytest.approx(exact, abs=1e-12)
    assert correction.transform(np.log(p) + 7.0) == pytest.approx(exact, abs=1e-12)
    back = PriorCorrection(NEW, TRAIN).transform(exact, input="probabilities")
    assert back == pytest.approx(p, abs=1e-12)


def test_equal_shares_change_nothing_and_small_numbers_keep_their_ratio():
    p, _, _ = gaussian(np.random.default_rng(1), NEW, 50)
    assert PriorCorrection(TRAIN, TRAIN).transform(p, input="probabilities") == pytest.approx(p, abs=1e-14)
    far = PriorCorrection([0.5, 0.5], [1 - 1e-9, 1e-9]).transform([[-800.0, 0.0], [0.0, 0.0]])
    assert far[0] == pytest.approx([0.0, 1.0]) and far[1, 1] == pytest.approx(1e-9, rel=1e-6)


def test_a_class_of_share_zero_is_ruled_out_and_a_mask_stays():
    correction = PriorCorrection(TRAIN, [0.5, 0.5, 0.0])
    z = np.array([[0.0, 1.0, 2.0], [0.0, -np.inf, 2.0]])
    p = correction.transform(z)
    assert (p[:, 2] == 0).all() and p[1, 1] == 0 and p.sum(axis=1) == pytest.approx(1.0)
    assert p[0, 1] / p[0, 0] == pytest.approx(np.e * 0.5 / 0.3 / (0.5 / 0.5))
    assert np.isneginf(correction.transform_logits(z)[1, 1:]).all()
    with pytest.raises(ValueError, match="Row 0 allows only classes whose new share is 0"):
        correction.transform([[-np.inf, -np.inf, 0.0]])


def test_one_number_a_row_torch_and_tokens():
    correction = PriorCorrection([0.5, 0.5], [0.8, 0.2])
    z = torch.tensor([0.3, -1.0])
    p = correction.transform(z)
    assert isinstance(p, torch.Tensor) and p.shape == (2, 2)
    assert p[:, 1].numpy() == pytest.approx(expit(z.numpy() + np.log(0.2 / 0.8)), abs=1e-7)
    assert correction.transform(np.zeros((2, 4, 2))).shape == (2, 4, 2)


def test_it_is_saved_loaded_and_evaluated_like_the_others(tmp_path):
    p, y, _ = gaussian(np.random.default_rng(2), NEW, 400)
    correction = PriorCorrection(TRAIN, NEW)
    correction.save(tmp_path / "prior.json")
    for again in (PriorCorrection.load(tmp_path / "prior.json"), load_state(read_json(tmp_path / "prior.json"))):
        assert (again.transform(np.log(p)) == correction.transform(np.log(p))).all()
    report = correction.evaluate(p, y, input="probabilities", confidence_level=None)
    assert report["nll"] < calibration_report(p, y, confidence_level=None)["nll"] - 0.1
    with pytest.raises(ValueError, match="holds a saved 'PriorCorrection'"):
        TemperatureScaling.load(tmp_path / "prior.json")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"train_prior": [0.5, 0.5, 0.0]}, "share of 0 for class 2"),
        ({"new_prior": [0.5, 0.5]}, "new_prior"),
        ({"new_prior": [0.5, 0.7, 0.3]}, "must sum to 1"),
        ({"new_prior": "x"}, "new_prior"),
        ({"new_prior": [0.2, 0.2, 0.6]}, "changed by hand"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, change, told):
    state = PriorCorrection(TRAIN, NEW).state()
    state["parameters"] |= change
    path = tmp_path / "prior.json"
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=told) as error:
        PriorCorrection.load(path)
    assert "prior.json" in str(error.value)


@pytest.mark.parametrize(
    ("train", "new", "told"),
    [
        ([50, 30], [0.5, 0.5], "If these are counts"),
        ([1.0, 0.0], [0.5, 0.5], "Leave the class out"),
        ([0.5, 0.5], [0.2, 0.3, 0.5], "the same classes"),
        ([0.5, 0.5], [1.5, -0.5], "none negative"),
        ([0.5, 0.5], [float("nan"), 0.5], "none negative"),
        ([1.0], [1.0], "two classes or more"),
    ],
)
def test_what_are_no_shares_is_refused(train, new, told):
    with pytest.raises(ValueError, match=told):
        PriorCorrection(train, new)


def test_there_is_nothing_to_fit():
    with pytest.raises(ValueError, match="nothing to fit"):
        PriorCorrection(TRAIN, NEW).fit(np.zeros((20, 3)), np.zeros(20, int))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.8, 1.0])
def test_two_answers_have_a_closed_form(share):
    """A share `s` of rows with p, the rest with 1 - p: `s = p pi + (1 - p)(1 - pi)`, cut off at 0 and 1."""
    sure = round(200 * share)
    rows = [[0.8, 0.2]] * sure + [[0.2, 0.8]] * (200 - sure)
    found = estimate_prior(rows, [0.5, 0.5], num_resamples=50)
    assert found.prior[0] == pytest.approx(np.clip((share - 0.2) / 0.6, 0.0, 1.0), abs=1e-6)


def test_certain_answers_are_counted():
    found = estimate_prior(np.eye(3)[[0] * 30 + [1] * 70], TRAIN, num_resamples=200)
    assert found.prior == pytest.approx([0.3, 0.7, 0.0], abs=1e-9)
    # Wilson's interval of 30 of 100
    assert found.low[0] == pytest.approx(0.219, abs=0.02) and found.high[0] == pytest.approx(0.396, abs=0.02)


def test_it_is_the_maximum_of_the_likelihood():
    p, _, _ = gaussian(np.random.default_rng(3), NEW, 300)
    found = estimate_prior(p, TRAIN, num_resamples=20).prior

    def loss(free):
        return -np.log((p / TRAIN) @ softmax(np.append(free, 0.0)[None])[0]).mean()

    best = softmax(np.append(minimize(loss, np.zeros(2), tol=1e-12).x, 0.0)[None])[0]
    assert found == pytest.approx(best, abs=1e-5)
    # A fixed point of the paper's step: the shares are the mean of the corrected probabilities.
    assert PriorCorrection(TRAIN, found).transform(p, input="probabilities").mean(axis=0) == pytest.approx(
        found, abs=1e-8
    )


def test_the_interval_holds_the_shares():
    """A small sample of `benchmarks/prior_intervals.py`."""
    shares, held = np.array([0.05, 0.25, 0.7]), np.zeros(3)
    for repeat in range(60):
        p, _, _ = gaussian(np.random.default_rng([4, repeat]), shares, 120)
        found = estimate_prior(p, TRAIN, num_resamples=100, seed=repeat)
        held += (found.low <= shares) & (shares <= found.high)
    assert (held >= 52).all()  # of a binomial of 60 and .95, four deviates below


def test_the_estimate_is_a_record():
    p, _, _ = gaussian(np.random.default_rng(5), NEW, 100)
    found = estimate_prior(p, TRAIN, num_resamples=50, seed=1)
    assert isinstance(found, PriorEstimate)
    again = estimate_prior(np.log(p), TRAIN, num_resamples=50, seed=1, input="logits")
    assert again.low == pytest.approx(found.low, abs=1e-8)
    assert json.loads(json.dumps(found.to_dict()))["num_rows"] == 100
    assert "only the shares have changed" in str(found) and "class 2 0." in str(found)
    assert (found.correction().new_prior == found.prior).all()


def test_rows_that_tell_nothing_are_refused():
    with pytest.raises(ValueError, match="do not tell all classes apart"):
        estimate_prior(np.tile(TRAIN, (50, 1)), TRAIN)
    p, _, _ = gaussian(np.random.default_rng(6), NEW, 100)
    # A class split by a coin: its two halves are never told apart.
    split = np.concatenate([p[:, :2], 0.5 * p[:, 2:], 0.5 * p[:, 2:]], axis=1)
    with pytest.raises(ValueError, match="do not tell all classes apart"):
        estimate_prior(split, [0.5, 0.3, 0.1, 0.1])
    with pytest.raises(ValueError, match="at least 10 unlabelled rows"):
        estimate_prior(p[:9], TRAIN)
    with pytest.raises(ValueError, match="3 classes, but `train_prior` has 2"):
        estimate_prior(p, [0.5, 0.5])


def test_global_random_state_is_left_alone():
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    estimate_prior([[0.9, 0.1]] * 10 + [[0.2, 0.8]] * 10, [0.5, 0.5], num_resamples=20)
    assert (torch.get_rng_state() == state[0]).all() and (np.random.get_state()[1] == state[1]).all()  # noqa: NPY002
