"""Factors follow the parameters, whichever way these are written."""

import pytest
import torch
from families import FAMILIES, logits, perturb
from peft import PeftModel, get_peft_model
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from peft_calib import BayesianLoraConfig, CurveLoraConfig, HyperLoraConfig, draws, export_lora
from peft_calib.tuners.laws import holders_of, laws_of

BERT = FAMILIES["bert"]
CONFIGS = {
    "hyper": HyperLoraConfig(r=4, target_modules=["query", "dense"]),
    "bayesian": BayesianLoraConfig(r=4, target_modules=["query", "dense"], num_train_examples=9),
    "curve": CurveLoraConfig(r=4, target_modules=["query", "dense"]),
}


def by_vector(parameters):
    vector_to_parameters(1.5 * parameters_to_vector(parameters), parameters)


def by_data_assignment(parameters):
    for p in parameters:
        p.data = p.data * 1.5


def by_data_in_place(parameters):
    for p in parameters:
        p.data.mul_(1.5)


def by_data_copy(parameters):
    for p in parameters:
        p.data.copy_(p.data * 1.5)


def by_numpy(parameters):
    for p in parameters:
        view = p.detach().numpy()
        view *= 1.5


def by_one_number(parameters):
    largest = max(parameters, key=lambda p: float(p.detach().abs().max()))
    largest.data.view(-1)[int(largest.detach().abs().argmax())] += 1.0


def by_exchange(parameters):
    """The same numbers in other places: no sum over them would tell."""
    for p in parameters:
        p.data.copy_(p.data.flatten().flip(0).view(p.shape))


def by_foreach(parameters):
    torch._foreach_mul_([p.data for p in parameters], 1.5)


def by_averaging(parameters):
    average = [p.detach().clone() * 2 for p in parameters]
    for p, mean in zip(parameters, average, strict=True):
        p.data.lerp_(mean, 0.5)


WAYS = [by_vector, by_data_assignment, by_data_in_place, by_data_copy, by_numpy, by_one_number, by_exchange]
WAYS += [by_foreach, by_averaging]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("law", CONFIGS)
def test_answers_follow_every_write(law, way):
    model, batch = perturb(get_peft_model(BERT.build(), CONFIGS[law]), scale=0.3).eval(), BERT.batch()
    base = model.get_base_model()

    def asked():
        with torch.no_grad():
            found = [
                model(**batch).logits,
                base.bert(**batch).last_hidden_state,
                *model.base_model.get_factors()[0][1:],
            ]
            with draws(model, 2):
                return [*found, model(**batch).logits]

    before = asked()
    before = asked()  # now from what is cached
    way([p for one in laws_of(model) for p in one.parameters()])
    after = asked()
    model.base_model.invalidate_factors()
    for found, right in zip(after, asked(), strict=True):
        assert torch.equal(found, right)
    assert not torch.equal(before[0], after[0])


@pytest.mark.parametrize("law", CONFIGS)
def test_exports_follow_writes_that_leave_no_trace(law, tmp_path):
    model, batch = perturb(get_peft_model(BERT.build(), CONFIGS[law]), scale=0.3).eval(), BERT.batch()
    logits(model, batch)
    by_data_in_place([p for one in laws_of(model) for p in one.parameters()])
    exported = PeftModel.from_pretrained(BERT.build(), export_lora(model, tmp_path / "mean"))
    torch.testing.assert_close(logits(exported, batch), logits(model, batch), rtol=1e-4, atol=1e-5)


def test_an_unchanged_law_is_asked_once_and_training_looks_at_nothing():
    model, batch = perturb(get_peft_model(BERT.build(), CONFIGS["bayesian"]), scale=0.3).eval(), BERT.batch()
    calls = []
    next(laws_of(model)).register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        logits(model, batch)
    assert len(calls) == 1
    holder = holders_of(model)[0]
    contents = holder.now.cached["default"][1]
    contents.hold = lambda _: pytest.fail("a training step compared the law's tensors")
    model.train()(**batch).logits.sum().backward()


def test_averaged_weights_are_followed():
    model, batch = perturb(get_peft_model(BERT.build(), CONFIGS["curve"]), scale=0.3).eval(), BERT.batch()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    seen = [logits(averaged.module, batch)]
    for _ in range(2):
        perturb(model, scale=0.3)
        averaged.update_parameters(model)
        seen.append(logits(averaged.module, batch))
        for law in laws_of(averaged.module):
            law.invalidate()
        holders_of(averaged.module)[0].invalidate()
        assert torch.equal(seen[-1], logits(averaged.module, batch))
        assert not torch.equal(*seen[-2:])


def test_parameters_lent_for_one_call():
    """functional_call puts other tensors in place; with a transform around it they are no tensors to keep."""
    model, batch = perturb(get_peft_model(BERT.build(), CONFIGS["hyper"]), scale=0.3).eval(), BERT.batch()
    own = {name: p.detach() for name, p in model.named_parameters()}
    expected = logits(model, batch)

    def at(scale):
        moved = {name: p * scale if "calib" in name else p for name, p in own.items()}
        return torch.func.functional_call(model, moved, (), batch).logits

    with torch.no_grad():
        assert torch.equal(at(1.0), expected)
        found = [at(scale) for scale in (1.2, 1.4, 1.2)]
        assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
        together = torch.func.vmap(at)(torch.tensor([1.2, 1.4]))
    torch.testing.assert_close(together, torch.stack(found[:2]), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model, batch), expected)
