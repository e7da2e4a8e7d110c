"""One generation a forward: caching, checkpointing, cost, and whose random numbers are used."""

import random
import weakref

import numpy as np
import pytest
import torch
from families import FAMILIES, logits, perturb
from operations import Operations

from peft_calib import HyperLoraConfig, HyperLoraModel
from peft_calib.tuners import Mean, Train


def law_of(model):
    return model.base_model.get_law(model.active_adapter)


def count_generations(model):
    calls = []
    law_of(model).register_forward_hook(lambda *_: calls.append(1))
    return calls


def gradients(model, batch):
    model.zero_grad()
    model(**batch).logits.square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


# ----------------------------------------------------------------- how often


def test_one_generation_per_training_forward(family, adapt):
    model, batch = adapt(family).train(), family.batch()
    calls = count_generations(model)
    for expected in (1, 2):
        model(**batch).logits.sum().backward()
        assert len(calls) == expected


def test_one_generation_for_all_of_evaluation_and_generate(adapt):
    model = perturb(adapt(FAMILIES["llama"])).eval()
    calls, batch = count_generations(model), FAMILIES["llama"].batch()
    logits(model, batch)
    logits(model, batch)
    model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert len(calls) == 1


def test_encoder_decoder_generate_uses_current_factors(adapt):
    t5 = FAMILIES["t5"]
    model = adapt(t5).eval()
    ids = t5.batch()["input_ids"]
    encoder = model.get_base_model().get_encoder()
    with torch.no_grad():
        before = encoder(ids).last_hidden_state
        perturb(model, scale=0.5)
        after = encoder(ids).last_hidden_state  # called directly, without the base model's forward
    assert not torch.equal(before, after)
    model(**t5.batch())
    with torch.no_grad():
        assert torch.equal(encoder(ids).last_hidden_state, after)


def test_submodule_called_directly_trains_step_after_step(bert, adapt):
    model, ids = perturb(adapt(bert)).train(), bert.batch()["input_ids"]
    encoder, calls = model.get_base_model().bert, count_generations(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in (1, 2, 3):
        encoder(ids).last_hidden_state.square().mean().backward()
        assert len(calls) == step
        optimizer.step()
        optimizer.zero_grad()


def test_gradients_in_eval_mode(bert, adapt):
    model, batch = perturb(adapt(bert)).eval(), bert.batch()
    logits(model, batch)  # leaves factors without a graph in the cache
    assert all(g.abs().sum() > 0 for g in gradients(model, batch).values())


def test_frozen_law_is_cached_although_gradients_are_on(bert, adapt):
    model, batch = perturb(adapt(bert)).eval(), bert.batch()
    calls = count_generations(model)
    law_of(model).requires_grad_(False)
    model(**batch)
    model(**batch)
    assert len(calls) == 1


@pytest.mark.parametrize("optimizer", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_cache_follows_every_optimizer(bert, adapt, optimizer):
    model, batch = perturb(adapt(bert)), bert.batch()
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, **optimizer)
    model.train()(**batch).logits.square().mean().backward()
    before = logits(model, batch)
    adam.step()
    assert not torch.equal(logits(model, batch), before)


def test_cache_follows_loading_blending_and_invalidate(bert, adapt):
    model, batch = perturb(adapt(bert, noise_mode_a="add", noise_alpha=0.5)), bert.batch()
    law = law_of(model)
    seen = [logits(model, batch)]

    def changed():
        seen.append(logits(model, batch))
        return not torch.equal(*seen[-2:])

    law.load_state_dict({k: v + 0.01 if v.is_floating_point() else v for k, v in law.state_dict().items()})
    assert changed()
    law.alpha.fill_(0.1)
    assert changed()
    next(law.trunk.parameters()).data.add_(0.3)
    model.base_model.invalidate_factors()
    assert changed()


def test_cache_can_be_switched_off(bert, adapt):
    model, batch = adapt(bert, cache_eval=False).eval(), bert.batch()
    calls = count_generations(model)
    logits(model, batch)
    logits(model, batch)
    assert len(calls) == 2


def test_cached_factors_made_in_inference_mode_serve_autograd(bert, adapt):
    model, batch = perturb(adapt(bert)).eval(), bert.batch()
    with torch.inference_mode():
        model(**batch)
    law_of(model).requires_grad_(False)
    model.get_base_model().classifier.requires_grad_(True)
    model(**batch).logits.sum().backward()


def test_deleted_generation_frees_its_graph(bert, adapt):
    model = adapt(bert).train()
    model(**bert.batch())
    factor = weakref.ref(model.base_model.get_holder(model.get_base_model()).now.latest["default"].pairs[0][0])
    assert factor() is not None
    with model.disable_adapter():
        assert factor() is None


# ----------------------------------------------------------------- gradients


def reentrant(model):
    model.enable_input_require_grads()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    return model.train()


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_reentrant_checkpointing_gives_the_same_gradients(name, adapt):
    family = FAMILIES[name]
    expected = gradients(perturb(adapt(family)).train(), family.batch())
    model = reentrant(perturb(adapt(family)))
    for _ in range(2):  # the second forward must not see what the first left behind
        for key, value in gradients(model, family.batch()).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6 * float(value.abs().max()))


def test_adapted_module_before_a_reentrant_block_is_refused_in_the_first_forward(adapt):
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.second, self.first(x), use_reentrant=True)

    from peft import get_peft_model

    model = get_peft_model(Two(), HyperLoraConfig(target_modules=["first", "second"])).train()
    with pytest.raises(RuntimeError, match=r"Reentrant gradient checkpointing cannot train .*use_reentrant"):
        model(torch.ones(2, 4))


def test_step_mode_gives_the_gradients_of_forward_mode(bert, adapt):
    expected = None
    for mode in ("forward", "step"):
        model = perturb(adapt(bert, regenerate=mode)).train()
        calls = count_generations(model)
        model.zero_grad()
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            ids = torch.randint(3, 64, (2, 6), generator=generator)
            (model(input_ids=ids).logits.square().mean() / 4).backward()
        model.base_model.flush_grads()
        got = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        assert len(calls) == (4 if mode == "forward" else 1)
        expected = expected or got
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-6 * float(value.abs().max()))


def test_step_mode_works_with_reentrant_checkpointing(bert, adapt):
    models = [perturb(adapt(bert, regenerate=mode)).train() for mode in ("forward", "step")]
    models[1].enable_input_require_grads()
    models[1].get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    grads = []
    for model in models:
        model(**bert.batch()).logits.square().mean().backward()
        model.base_model.flush_grads()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for key, value in grads[0].items():
        torch.testing.assert_close(grads[1][key], value, rtol=1e-5, atol=1e-6 * float(value.abs().max()))


def test_step_mode_complains_about_a_forgotten_flush(bert, adapt):
    model = perturb(adapt(bert, regenerate="step")).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**bert.batch()).logits.square().mean().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"call model\.flush_grads"):
        model(**bert.batch())


def test_accumulation_sums_over_forwards(bert, adapt):
    model, batch = perturb(adapt(bert)).train(), bert.batch(rows=4)
    whole = gradients(model, batch)
    model.zero_grad()
    for rows in (slice(0, 2), slice(2, 4)):
        (model(**{k: v[rows] for k, v in batch.items()}).logits.square().mean() / 2).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, whole[name], rtol=1e-5, atol=1e-7)


def test_data_parallel_is_refused(bert, adapt):
    model = adapt(bert)
    replica = model.get_base_model()._replicate_for_data_parallel()
    replica._is_replica = True
    with pytest.raises(RuntimeError, match="accelerate launch"):
        replica(**bert.batch())


# ----------------------------------------------------------------- cost


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"embed_mode": "slot", "head": "full"},
        {"a_mode": "fixed", "head": "chunk", "chunk_size": 10},
        {"a_mode": "random", "head": "factored"},
        {"hyper_arch": "transformer", "hyper_dropout": 0.1, "noise_mode_a": "add", "noise_mode_b": "add"},
    ],
)
def test_operations_do_not_grow_with_depth(bert, fields):
    from peft import get_peft_model

    counts = []
    for layers in (6, 12, 24):
        base = bert.build(num_hidden_layers=layers)
        law = get_peft_model(base, HyperLoraConfig(target_modules="all-linear", **fields)).base_model.get_law()
        with Operations() as counter:
            law(Train()).per_slot(law.slots)
        counts.append(len(counter.names))
    assert counts[0] == counts[1] == counts[2]


# ----------------------------------------------------------------- whose random numbers


def random_state():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002 (the legacy state is the one to protect)


@pytest.mark.parametrize(
    "fields", [{}, {"a_mode": "random"}, {"hyper_arch": "transformer", "hyper_dropout": 0.1, "init": "authors"}]
)
def test_global_random_state_is_not_touched(bert, tmp_path, fields):
    base, batch = bert.build(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0), bert.batch()
    torch.manual_seed(3)
    before = random_state()
    model = HyperLoraModel(base, HyperLoraConfig(target_modules=["query"], seed=1, **fields), "default")
    model.train()
    model(**batch).logits.sum().backward()
    logits(model, batch)
    model.merge_adapter()
    after = random_state()
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert all(np.array_equal(a, b) for a, b in zip(before[2], after[2], strict=True))


def test_seed_decides_the_initial_draws(bert, adapt):
    def factors(seed, global_seed):
        torch.manual_seed(global_seed)
        return adapt(bert, seed=seed, init_weights=False).base_model.get_factors()

    one, same, other = factors(1, 0), factors(1, 99), factors(2, 0)
    for (_, A, B), (_, A1, B1), (_, A2, B2) in zip(one, same, other, strict=True):
        assert torch.equal(A, A1)
        assert torch.equal(B, B1)
        assert not torch.equal(A, A2)
        assert not torch.equal(B, B2)


# ----------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_compiles_into_one_graph_and_stays_compiled(name, adapt):
    import torch._dynamo as dynamo

    family, batch = FAMILIES[name], FAMILIES[name].batch()
    eager, compiled = perturb(adapt(family)).train(), perturb(adapt(family)).train()
    dynamo.reset()
    dynamo.utils.counters.clear()
    step = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for model, call in ((eager, eager), (compiled, step)):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            call(**batch).logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(logits(compiled, batch), logits(eager, batch), rtol=1e-5, atol=1e-6)
    dynamo.reset()


# ----------------------------------------------------------------- two networks on one model


def test_adapters_with_networks_of_different_size(bert, adapt, tmp_path):
    from peft import PeftModel

    model = adapt(bert, hyper_hidden=16, embed_dim=8)
    config = HyperLoraConfig(r=2, target_modules="all-linear", hyper_arch="transformer", hyper_hidden=32, hyper_ffn=8)
    model.add_adapter("wide", config)
    batch, outputs = bert.batch(), {}
    for name in ("default", "wide"):
        model.set_adapter(name)
        outputs[name] = logits(perturb(model, scale=0.2), batch)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bert.build(), tmp_path)
    again.load_adapter(tmp_path / "wide", "wide")
    for name, expected in outputs.items():
        again.set_adapter(name)
        assert torch.equal(logits(again, batch), expected)


def test_generated_weights_follow_the_embedding(bert, adapt):
    law = law_of(perturb(adapt(bert)))
    layers, before = [slot.layer for slot in law.slots], law(Mean()).per_slot(law.slots)
    with torch.no_grad():
        law.layer_emb.weight[1] += 1
    for layer, (_, B0), (_, B1) in zip(layers, before, law(Mean()).per_slot(law.slots), strict=True):
        assert torch.equal(B0, B1) == (layer != 1)
