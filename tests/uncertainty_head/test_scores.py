"""The scores against their literal forms in float64, their gradients against the formulas, and where both fail."""

import math

import numpy as np
import pytest
import torch

from peft_calib.uncertainty_head.objective import cross_entropy, objective
from peft_calib.uncertainty_head.scores import SCORES, base_score, uncertainty

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 4 * torch.randn(1, 500, 5, generator=GENERATOR, dtype=torch.float64)


def literal(logits: torch.Tensor, score: str, sharpness: float = 100.0) -> torch.Tensor:
    """The formulas as the papers print them, of `(K, N, C)` logits."""
    p, num_classes = logits.softmax(-1).mean(0), logits.shape[-1]
    if score == "entropy":
        return torch.special.entr(p).sum(-1) / math.log(num_classes)
    raw = 1 - (sharpness * p).logsumexp(-1) / sharpness
    return raw if score == "sr_raw" else raw / (1 - 1 / num_classes)


@pytest.mark.parametrize("functions", [1, 3])
@pytest.mark.parametrize("score", SCORES)
def test_a_score_is_its_formula(score, functions):
    logits = LOGITS[:, :300].unflatten(1, (functions, -1))[0]
    torch.testing.assert_close(uncertainty(logits, score), literal(logits, score), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(uncertainty(logits.float(), score).double(), literal(logits, score), rtol=0, atol=1e-6)


@pytest.mark.parametrize("margin", [10.0, 18.0, 25.0, 60.0])
@pytest.mark.parametrize("score", SCORES)
def test_float32_keeps_a_score_where_one_minus_the_largest_is_zero(score, margin):
    logits = torch.tensor([[[margin, 0.0]]])
    rest = 1 / (1 + math.exp(margin))  # the probability of the other class
    entropy = -(rest * math.log(rest) + (1 - rest) * math.log1p(-rest)) / math.log(2)
    wanted = {"entropy": entropy, "sr_raw": rest, "sr_norm": 2 * rest}[score]  # the smooth maximum adds e^-100 / 100
    assert uncertainty(logits, score).item() == pytest.approx(wanted, rel=1e-5)


def test_gradients_are_the_formulas_of_the_papers():
    z = LOGITS.clone().requires_grad_()
    p = z.detach().softmax(-1)[0]
    (found,) = torch.autograd.grad(uncertainty(z, "sr_raw").sum(), z)
    weights = (100 * p).softmax(-1)
    wanted = -p * (weights - (weights * p).sum(-1, keepdim=True))
    torch.testing.assert_close(found[0], wanted, rtol=0, atol=1e-12)
    (found,) = torch.autograd.grad(uncertainty(z, "entropy").sum(), z)
    entropy = torch.special.entr(p).sum(-1, keepdim=True)
    wanted = -(p / math.log(5)) * (p.log() + entropy)
    torch.testing.assert_close(found[0], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("margin", [10.0, 25.0, 60.0])
@pytest.mark.parametrize("score", SCORES)
def test_a_confident_error_has_a_gradient(score, margin):
    """In float32 the literal score is 0 from a margin of about 17 on, and so was its gradient."""
    z = torch.tensor([[[margin, 0.0]]], requires_grad=True)
    cross_entropy(uncertainty(z, score), torch.ones(1)).sum().backward()
    assert z.grad[0, 0, 0].abs() > 0.5


def test_the_literal_form_loses_that_gradient():
    z = torch.tensor([[[25.0, 0.0]]], requires_grad=True)
    cross_entropy(literal(z, "sr_raw"), torch.ones(1)).sum().backward()
    assert z.grad.abs().max() < 1e-6


def test_a_smooth_maximum_is_within_its_bound_of_the_maximum():
    apart = base_score(LOGITS, "sr_raw") - uncertainty(LOGITS, "sr_raw")
    assert apart.min() >= -1e-12 and apart.max() <= math.log(5) / 100
    uniform = torch.zeros(1, 1, 5, dtype=torch.float64)
    assert (base_score(uniform, "sr_raw") - uncertainty(uniform, "sr_raw")).item() == pytest.approx(math.log(5) / 100)


def test_an_item_s_options_are_its_classes():
    """An item of three of five options has the score of those three alone, and a gradient that is 0 elsewhere."""
    options = torch.tensor([True, False, True, True, False]).expand(500, 5)
    for functions in (1, 2):
        logits = LOGITS.unflatten(1, (functions, -1))[0].clone().requires_grad_()
        own = options[: logits.shape[1]]
        for score in SCORES:
            found = uncertainty(logits, score, options=own)
            torch.testing.assert_close(found, uncertainty(logits[..., [0, 2, 3]], score), rtol=1e-12, atol=1e-12)
            (gradient,) = torch.autograd.grad(found.sum(), logits)
            assert gradient.isfinite().all() and gradient[..., [1, 4]].abs().max() == 0


def test_an_item_with_one_option_is_sure():
    options = torch.tensor([[True, False, False]])
    logits = torch.zeros(1, 1, 3, requires_grad=True)
    for score in SCORES:
        found = uncertainty(logits, score, options=options)
        assert found.item() == pytest.approx(0, abs=1e-6)
        assert torch.autograd.grad(found.sum(), logits)[0].isfinite().all()


def test_the_mean_of_scores_is_that_of_each_function():
    logits = LOGITS.unflatten(1, (4, -1))[0]
    for score in SCORES:
        each = torch.stack([uncertainty(one[None], score) for one in logits]).mean(0)
        torch.testing.assert_close(uncertainty(logits, score, aggregate="mean_u"), each)


def test_the_cross_entropy_is_torch_s():
    scores = torch.linspace(0.001, 0.999, 50)
    errors = torch.arange(50) % 2
    wanted = torch.nn.functional.binary_cross_entropy(scores, errors.float(), reduction="none")
    torch.testing.assert_close(cross_entropy(scores, errors), wanted, rtol=1e-5, atol=1e-6)


def test_the_objective_has_its_three_terms():
    generator = np.random.default_rng(0)
    scores, anchors = (torch.from_numpy(generator.uniform(0.05, 0.95, size)) for size in ((2, 6), 6))
    errors, distances = torch.tensor([1.0, 0, 0, 1, 0, 1]), torch.tensor([3.0, 5.0])
    alpha, beta = torch.tensor([0.5, 0.0]), torch.tensor([0.0, 0.1])
    told = torch.where(errors.bool(), -scores.log(), -(1 - scores).log()).mean(1)
    wanted = told + torch.stack([0.5 * (scores[0] - anchors).square().mean(), torch.tensor(0.5)])
    torch.testing.assert_close(objective(scores, errors, anchors, distances, alpha, beta), wanted)


@pytest.mark.parametrize(("name", "value"), [("score", "margin"), ("aggregate", "sum")])
def test_unknown_names_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be one of .*got '{value}'"):
        uncertainty(LOGITS, **{name: value})
