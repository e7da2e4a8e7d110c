"""Every law in every precision of the base, under autocast and without: trained, drawn from, saved, merged."""

import itertools

import pytest
import torch
from families import FAMILIES, perturb
from peft import PeftModel, get_peft_model, get_peft_model_state_dict

from peft_calib import draws, predict

BERT = FAMILIES["bert"]
BATCH, LABELS = BERT.batch(3), torch.tensor([0, 1, 2])
#: How far two ways to one logit may lie apart: a few roundings of the coarser of the two precisions that meet.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}
PRECISIONS = [pytest.param(dtype, half, id=f"{dtype}{'-autocast' * half}"[6:])
              for dtype, half in itertools.product(TOLERANCES, (False, True))]  # fmt: skip


def half_of(dtype: torch.dtype) -> torch.dtype:
    """What autocast computes in; torch's layers refuse a base in one half precision under autocast to the other."""
    return torch.bfloat16 if dtype == torch.float32 else dtype


def build(principal, dtype: torch.dtype) -> PeftModel:
    return get_peft_model(BERT.build().to(dtype), principal.config(target_modules=list(BERT.targets)))


def answer(model: PeftModel, dtype: torch.dtype, autocast: bool) -> torch.Tensor:
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", half_of(dtype), enabled=autocast):
        return model(**BATCH).logits


@pytest.mark.parametrize(("dtype", "autocast"), PRECISIONS)
def test_a_short_life_in_every_precision(principal, dtype, autocast, tmp_path):
    model = build(principal, dtype)
    law = principal.law(model)
    assert {p.dtype for p in law.parameters()} == {torch.float32}
    optimizer = torch.optim.SGD(law.parameters(), lr=0.1)
    with torch.autocast("cpu", half_of(dtype), enabled=autocast):
        loss = perturb(model, scale=0.03).train()(**BATCH, labels=LABELS).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in law.parameters())
    before = [p.detach().clone() for p in law.parameters()]
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(law.parameters(), before, strict=True))

    mean = answer(model, dtype, autocast)
    _draws_are_apart(model, principal, half_of(dtype), autocast)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(BERT.build().to(dtype), tmp_path)
    saved, loaded = get_peft_model_state_dict(model), get_peft_model_state_dict(again)
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert torch.equal(answer(again, dtype, autocast), mean)
    computed = half_of(dtype) if autocast else dtype
    assert mean.dtype == computed
    near = TOLERANCES[computed]
    torch.testing.assert_close(answer(model.merge_and_unload(), dtype, autocast), mean, rtol=near, atol=near)


def _draws_are_apart(model: PeftModel, method, half: torch.dtype, autocast: bool) -> None:
    """As far as a law has several functions, and in the order in which they are drawn alone."""
    with torch.autocast("cpu", half, enabled=autocast):
        found = predict(model, BATCH, num_samples=2, seed=3).sample_probabilities
        alone = predict(model, BATCH, num_samples=1, seed=3).sample_probabilities
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]), rtol=0, atol=1e-5)
    if method.law(model).varies:
        assert not torch.equal(*found)
    if method.law(model).num_draws is None:  # a law with a fixed number of functions spreads one over all of them
        torch.testing.assert_close(found[0], alone[0], rtol=0, atol=TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_factors_are_made_in_float32(principal, dtype):
    """Those of a base in half precision are the bits of those in float32, and autocast only rounds them."""
    exact, rounded = (perturb(build(principal, kind)) for kind in (torch.float32, dtype))
    with torch.no_grad(), draws(exact, 2, seed=1), draws(rounded, 2, seed=1):
        for (A, B), (C, D) in zip(_pairs(exact, principal), _pairs(rounded, principal), strict=True):
            assert A.dtype == C.dtype == torch.float32
            assert torch.equal(A, C) and torch.equal(B, D)
        with torch.autocast("cpu", torch.bfloat16):
            pairs = [(A.bfloat16(), B.bfloat16()) for A, B in _pairs(exact, principal, autocast=False)]
            for pair, found in zip(pairs, _pairs(exact, principal), strict=True):
                assert all(torch.equal(made, cast) for made, cast in zip(found, pair, strict=True))


def _pairs(model: PeftModel, method, autocast: bool = True) -> list:
    """Factors of every slot for the draws in place; autocast around it holds, unless it is said not to."""
    held = torch.is_autocast_enabled("cpu") and autocast
    with torch.autocast("cpu", torch.bfloat16, enabled=held):
        return method.holder(model.eval()).generation("default").pairs
