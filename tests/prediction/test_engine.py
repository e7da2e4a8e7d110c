"""Passes, memory and rows with fewer draws."""

import pytest
import torch
from scipy.stats import t as student
from stochastic_models import bayesian

from peft_calib import predict
from peft_calib.prediction.adaptive import half_width, settled, settled_numbers
from peft_calib.prediction.budget import draws_per_pass


def count_rows_of_forwards(model):
    seen = []
    model.get_base_model().bert.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len((*args, *kwargs.values())[0])),
        with_kwargs=True,
    )
    return seen


def test_passes_follow_the_budget(bert):
    model, batch = bayesian(bert), bert.batch(2)
    root = model.get_base_model()
    seen = count_rows_of_forwards(model)
    predict(model, batch, num_samples=8)
    assert seen == [16, 2]  # in its first pass a model is looked at, see tuners/one_by_one.py
    need = next(b for b in range(1, 10**7, 997) if draws_per_pass(root, batch, 2, 8, b) > 1)
    for factor, expected in ((0.1, [2] * 8), (1.01, [4] * 4), (100.0, [16])):
        seen.clear()
        predict(model, batch, num_samples=8, memory_budget=int(need * factor))
        assert seen == expected
    assert draws_per_pass(root, batch, 2, 8, int(need * 2.6)) == 4  # two equal passes instead of 5 and 3


def test_images_have_a_size(family):
    batch = family.batch(1)
    assert draws_per_pass(bayesian(family).get_base_model(), batch, 1, 64, 1) == 1
    assert draws_per_pass(bayesian(family).get_base_model(), batch, 1, 64, 10**12) == 64


class Limited:
    """Runs out of memory above a number of rows, as an accelerator would."""

    def __init__(self, model, limit):
        self.limit, self.seen = limit, []
        model.get_base_model().bert.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        rows = len((*args, *kwargs.values())[0])
        if rows > self.limit:
            raise torch.OutOfMemoryError("simulated")
        self.seen.append(rows)


@pytest.mark.parametrize(("limit", "expected"), [(12, [12, 12]), (5, [4] * 6), (2, [2] * 12), (1, [1] * 24)])
def test_out_of_memory_halves_the_pass(bert, limit, expected):
    model, batch = bayesian(bert), bert.batch(4)
    whole = predict(model, batch, num_samples=6).sample_probabilities
    limited = Limited(model, limit)
    got = predict(model, batch, num_samples=6).sample_probabilities
    torch.testing.assert_close(got, whole, rtol=0, atol=1e-6)
    assert limited.seen == expected


def test_out_of_memory_for_a_single_row_is_an_error(bert):
    model = bayesian(bert)
    Limited(model, 0)
    with pytest.raises(torch.OutOfMemoryError, match="smaller batches"):
        predict(model, bert.batch(2), num_samples=2)


# --------------------------------------------------------------------- adaptive


@pytest.mark.parametrize("n", [2, 3, 5, 16, 31, 32, 200])
def test_interval_is_students(n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    expected = student.ppf(0.975, n - 1) * x.std().item() / n**0.5
    assert half_width(x).item() == pytest.approx(expected, rel=2e-3)


def test_what_is_settled():
    same = torch.tensor([0.6, 0.4]).expand(4, 1, 2)
    assert settled(same, 0.02).all()
    tie = torch.tensor([0.5, 0.5]).expand(4, 1, 2)
    assert settled(tie, 0.02).all()  # the lead is known to be nothing
    wide = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.8, 0.2], [0.2, 0.8]]).unsqueeze(1)
    assert not settled(wide, 0.02).any()
    assert not settled(wide, 0.1).any()
    decided_but_imprecise = torch.tensor([[0.99, 0.01], [0.9, 0.1], [0.95, 0.05], [0.85, 0.15]]).unsqueeze(1)
    assert not settled(decided_but_imprecise, 0.02).any()
    assert settled(decided_but_imprecise, 0.2).all()
    assert settled_numbers(torch.tensor([1.0, 1.01, 0.99, 1.0]).view(4, 1, 1), 0.1).all()


def test_adaptive_draws_are_the_first_draws(bert):
    model, batch = bayesian(bert, init_sd=0.9), bert.batch(12)
    fixed = predict(model, batch, num_samples=16, seed=3)
    tolerance = half_width(fixed.sample_probabilities[:8].amax(-1)).median().item()
    auto = predict(model, batch, num_samples="auto", seed=3, tolerance=tolerance, antithetic=False)
    assert len(auto.draws_per_row.unique()) > 1  # rows do stop at different times
    assert auto.num_forwards == auto.average_num_samples < 16
    for row, n in enumerate(auto.draws_per_row.tolist()):
        torch.testing.assert_close(
            auto.sample_probabilities[:n, row], fixed.sample_probabilities[:n, row], rtol=0, atol=1e-6
        )
        assert auto.sample_probabilities[n:, row].isnan().all()
        if n < 16:
            so_far = fixed.sample_probabilities[:, row : row + 1]
            assert settled(so_far[:n], tolerance).all()
            assert n == 4 or not settled(so_far[: n - 4], tolerance).any()
    assert (auto.entropy - auto.expected_entropy - auto.mutual_information).abs().max() < 1e-6


def test_adaptive_on_label_tokens(llama):
    model, batch = bayesian(llama), llama.batch(5)
    batch["attention_mask"][2, -2:] = 0
    fixed = predict(model, batch, num_samples=16, label_tokens=[4, 9], antithetic=True)
    auto = predict(model, batch, num_samples="auto", label_tokens=[4, 9], tolerance=0.001)
    for row, n in enumerate(auto.draws_per_row.tolist()):
        torch.testing.assert_close(
            auto.probabilities[row], fixed.sample_probabilities[:n, row].mean(0), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("bad", [{"tolerance": 0}, {"tolerance": "a"}, {"max_samples": 1}, {"how": "late"}])
def test_bad_adaptive(bert, bad):
    with pytest.raises(ValueError, match=r"tolerance|max_samples|sample"):
        predict(bayesian(bert), bert.batch(), num_samples="auto", **bad)
