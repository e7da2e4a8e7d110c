"""BayesianLoRA in a real model: limits, draws, saving, merging, export, PEFT's and transformers' entry points."""

import gc
import itertools
import json
import warnings
import weakref
from functools import partial

import pytest
import torch
import transformers as tf
from families import FAMILIES, logits, perturb
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from peft_calib import BayesianLoraConfig, HyperLoraConfig, export_lora
from peft_calib.tuners import FactorLinear, Sample
from peft_calib.tuners.asked import asking
from peft_calib.tuners.holder import FactorHolder

BERT = FAMILIES["bert"]
VARIANTS = {
    "default": {},
    "matrix_normal": {"posterior": "matrix_normal"},
    "full": {"posterior": "full", "r": 2},
    "maf": {"flow": "maf"},
    "matheron": {"conditional_noise": "matheron", "learn_lambda": True},
    "learned_kernels": {"learn_d": True, "learn_jitter": True},
    "shared": {"init": "random", "share_inducing": True},
    "wide": {"inducing_rows": 5, "inducing_cols": 6},
    "partly": {"bayesian_modules": ["query"]},
}


def adapt(family=BERT, adapter_name="default", seed=0, **fields) -> PeftModel:
    fields = {"r": 4, "target_modules": list(family.targets), "num_train_examples": 100, **fields}
    return get_peft_model(family.build(seed), BayesianLoraConfig(**fields), adapter_name=adapter_name)


def holder_of(model: nn.Module) -> FactorHolder:
    return next(module for module in model.modules() if isinstance(module, FactorHolder))


def spread_to_zero(model: PeftModel) -> None:
    """Variances so small that they vanish in float32."""
    with torch.no_grad():
        for parameter in model.base_model.get_law().spread_parameters():
            parameter.fill_(-1e4)


def sampled(model: PeftModel, batch: dict, **draw) -> torch.Tensor:
    """Logits of K draws in one forward, (K, rows, ...)."""
    holder, K = holder_of(model), draw.get("num_samples", 1)
    with asking(model.get_base_model(), {id(holder): Sample(**draw)}):
        return logits(model, {k: v.repeat(K, *[1] * (v.dim() - 1)) for k, v in batch.items()}).unflatten(0, (K, -1))


@pytest.fixture
def lora(tmp_path):
    """A trained LoRA on a three-layer Llama with its folder: q, k, v and the output head."""
    config = {**FAMILIES["llama"].settings, "num_hidden_layers": 3, "tie_word_embeddings": False}

    def build():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return tf.LlamaForCausalLM(tf.LlamaConfig(**config)).eval()

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "lm_head"]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = perturb(get_peft_model(build(), LoraConfig(**settings)))
    model.save_pretrained(tmp_path / "lora")
    return build, settings, str(tmp_path / "lora"), logits(model, FAMILIES["llama"].batch())


# ----------------------------------------------------------------- limits


def test_a_trained_lora_is_embedded_exactly(lora):
    build, settings, folder, expected = lora
    batch = FAMILIES["llama"].batch()
    model = get_peft_model(build(), BayesianLoraConfig(**settings, init_from=folder))
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-5)
    tensors = load_file(f"{folder}/adapter_model.safetensors")
    for slot, A, B in model.base_model.get_factors():
        for side, found in (("A", A), ("B", B)):
            given = tensors[f"base_model.model.{slot.name}.lora_{side}.weight"]
            assert (found - given).norm() / given.norm() < 4.4e-7


def test_zero_variance_is_lora(lora):
    build, settings, folder, expected = lora
    batch = FAMILIES["llama"].batch()
    model = get_peft_model(build(), BayesianLoraConfig(**settings, init_from=folder, num_train_examples=10))
    spread_to_zero(model)
    model.train()
    first, second = (model(**batch).logits.detach() for _ in range(2))
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-5)
    assert torch.equal(first, second)  # draws collapse
    assert torch.equal(first, logits(model, batch))  # into the mean
    draws = sampled(model, batch, num_samples=3, seed=1)
    torch.testing.assert_close(draws, expected.expand(3, -1, -1, -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("field", ["init_sd", "init_lambda"])
def test_deviation_from_lora_is_proportional_to_the_spread(lora, field):
    build, settings, folder, expected = lora
    sizes, deviations = (1e-1, 1e-2, 1e-3), []
    for size in sizes:
        fields = {"init_sd": 1e-8, "max_sd": 10.0, field: size}
        if field == "init_lambda":
            fields |= {"conditional_noise": "matheron", "max_lambda": 10.0}
        model = get_peft_model(build(), BayesianLoraConfig(**settings, init_from=folder, **fields)).double()
        change = sampled(model, FAMILIES["llama"].batch(), seed=2)[0] - expected
        deviations.append(change.abs().max().log10())
    slopes = [float(a - b) for a, b in itertools.pairwise(deviations)]
    assert slopes == pytest.approx([1.0, 1.0], abs=0.1)


# ----------------------------------------------------------------- modes and draws


def test_eval_is_the_mean_and_training_draws():
    model, batch = perturb(adapt()), BERT.batch()
    assert torch.equal(logits(model, batch), logits(model, batch))
    model.train()
    with torch.no_grad():  # no gradients, no draw
        quiet = model(**batch).logits
    first, second = model(**batch).logits, model(**batch).logits
    assert not torch.allclose(first, second)
    torch.testing.assert_close(quiet, logits(model, batch))


@pytest.mark.parametrize("variant", VARIANTS)
def test_draws_in_one_pass_equal_draws_one_at_a_time(variant):
    model, batch = perturb(adapt(**VARIANTS[variant])), BERT.batch()
    together = sampled(model, batch, num_samples=4, seed=3)
    for k in range(4):
        torch.testing.assert_close(sampled(model, batch, seed=3, first=k)[0], together[k], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[0], together[1])


def test_dropout_is_off_in_prediction():
    batch, models = BERT.batch(), [perturb(adapt(lora_dropout=p)) for p in (0.0, 0.9)]
    clean, dropped = (sampled(model, batch, num_samples=2) for model in models)
    assert torch.equal(clean, dropped)
    assert torch.equal(*(logits(model, batch) for model in models))


def test_one_draw_is_exactly_one_lora(family, tmp_path):
    """The factors of a draw, written into a stock LoRA, give the draw's logits."""
    model = perturb(adapt(family))
    batch, drawn = family.batch(), None
    drawn = sampled(model, batch, seed=5, first=2)[0]
    law = model.base_model.get_law()
    with torch.no_grad():
        pairs = law(Sample(1, 5, 2)).per_slot(law.slots)
    export_lora(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for slot, (A, B) in zip(law.slots, pairs, strict=True):
        tensors[f"base_model.model.{slot.name}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{slot.name}.lora_B.weight"] = B.contiguous()
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    stock = PeftModel.from_pretrained(family.build(), tmp_path)
    torch.testing.assert_close(logits(stock, batch), drawn, rtol=1e-5, atol=1e-5)


def test_every_parameter_is_named_trainable_and_learns(family):
    model = perturb(adapt(family, adapter_name="mine", kl_weight=0.0), scale=0.02)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("bayesianlora_" in name and ".mine." in name for name in trainable)
    assert {n for n, _ in model.named_parameters() if "bayesianlora_" in n} == set(trainable)
    model.train()
    model(**family.batch()).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in trainable.values())


# ----------------------------------------------------------------- checkpointing


def checkpointed(model: PeftModel) -> PeftModel:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def test_recomputation_after_another_forward_is_refused():
    model = checkpointed(perturb(adapt(FAMILIES["llama"])))
    ids = FAMILIES["llama"].batch()["input_ids"]
    for _ in range(2):  # backward after each forward is fine
        model(input_ids=ids, labels=ids).loss.backward()
    first, second = (model(input_ids=ids, labels=ids).loss for _ in range(2))
    with pytest.raises(RuntimeError, match="drawn other factors for another forward"):
        (first + second).backward()
    del first, second
    gc.collect()
    model(input_ids=ids, labels=ids).loss.backward()
    dropped = model(input_ids=ids, labels=ids).loss
    del dropped
    model(input_ids=ids, labels=ids).loss.backward()


# ----------------------------------------------------------------- saving, merging, export


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_reload_is_bit_equal(variant, low_cpu_mem_usage, tmp_path):
    model, batch = perturb(adapt(adapter_name="first", task_type="SEQ_CLS", **VARIANTS[variant])), BERT.batch()
    model.train()(**batch)
    model.save_pretrained(tmp_path)
    load = partial(PeftModel.from_pretrained, BERT.build(), low_cpu_mem_usage=low_cpu_mem_usage)
    again = load(tmp_path / "first", "elsewhere")
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert torch.equal(sampled(again, batch, num_samples=2, seed=4), sampled(model, batch, num_samples=2, seed=4))
    law, reloaded = model.base_model.get_law("first"), again.base_model.get_law("elsewhere")
    assert reloaded.num_generations == law.num_generations == 1
    torch.testing.assert_close(reloaded.kl(), law.kl(), rtol=0, atol=0)
    tensors = load_file(tmp_path / "first" / "adapter_model.safetensors")
    prefix = "base_model.model.calib_bayesian.bayesianlora_law."
    assert {k.removeprefix(prefix) for k in tensors if k.startswith(prefix)} == set(law.state_dict())


def test_embedded_lora_is_saved_with_the_adapter(lora, tmp_path):
    build, settings, folder, _ = lora
    batch = FAMILIES["llama"].batch()
    model = get_peft_model(build(), BayesianLoraConfig(**settings, init_from=folder))
    model.save_pretrained(tmp_path / "bayesian")
    assert '"init_from": null' in (tmp_path / "bayesian" / "adapter_config.json").read_text()
    assert model.peft_config["default"].init_from == folder  # the user's object is as it was
    again = PeftModel.from_pretrained(build(), tmp_path / "bayesian")
    assert torch.equal(logits(again, batch), logits(model, batch))
    torch.testing.assert_close(again.base_model.kl(), model.base_model.kl(), rtol=0, atol=0)


def test_other_inducing_sizes_are_refused_on_loading(tmp_path):
    adapt().save_pretrained(tmp_path)
    config = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config.replace('"inducing_rows": null', '"inducing_rows": 6'))
    with pytest.raises(ValueError, match=r"inducing_rows is 6, but the adapter was saved with None"):
        PeftModel.from_pretrained(BERT.build(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**json.loads(config), "r": 3, "identity": None}))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})  # without the digest
    with pytest.raises(ValueError, match="does not fit this base model"):
        PeftModel.from_pretrained(BERT.build(), tmp_path)


@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_merge_is_the_mean_in_either_mode(variant, train_mode):
    model, batch = perturb(adapt(**VARIANTS[variant])), BERT.batch()
    expected = logits(model, batch)
    model.train(train_mode)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-5, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), expected, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(m, (FactorLinear, FactorHolder)) for m in merged.modules())
    assert not merged._forward_hooks
    assert not merged._forward_hooks_with_kwargs
    assert not merged._forward_pre_hooks


@pytest.mark.parametrize("variant", VARIANTS)
def test_export_is_the_mean(variant, tmp_path):
    model, batch = perturb(adapt(task_type="SEQ_CLS", **VARIANTS[variant])), BERT.batch()
    export_lora(model, tmp_path / "lora")
    stock = PeftModel.from_pretrained(BERT.build(), tmp_path / "lora")
    assert type(stock.peft_config["default"]) is LoraConfig
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for slot, *pair in model.base_model.get_factors():
        for side, factor in zip("AB", pair, strict=True):
            assert torch.equal(tensors[f"base_model.model.{slot.name}.lora_{side}.weight"], factor)
    # PEFT's layer adds the update in another order of operations
    torch.testing.assert_close(logits(stock, batch), logits(model, batch), rtol=1e-5, atol=1e-6)


def test_conversion_to_lora_by_peft():
    model, batch = perturb(adapt()), BERT.batch()
    config, tensors = convert_to_lora(model, rank=4)
    stock = get_peft_model(BERT.build(), config)
    set_peft_model_state_dict(stock, tensors)
    torch.testing.assert_close(logits(stock, batch), logits(model, batch), rtol=1e-4, atol=1e-5)


def test_native_adapters_of_transformers(tmp_path):
    batch, model = BERT.batch(), BERT.build()
    model.add_adapter(BayesianLoraConfig(r=4, target_modules=["query"], num_train_examples=9), adapter_name="mine")
    perturb(model)
    model.eval()
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    fresh = BERT.build()
    fresh.load_adapter(str(tmp_path), adapter_name="theirs")
    assert torch.equal(logits(fresh, batch), expected)
    labels = torch.tensor([0, 2])
    fresh.load_adapter(str(tmp_path), adapter_name="trained", is_trainable=True)
    fresh.set_adapter("trained")
    fresh.train()
    out = fresh(**batch, labels=labels)
    task = torch.nn.functional.cross_entropy(out.logits, labels)
    kl = holder_of(fresh).laws["trained"].kl()
    torch.testing.assert_close(out.loss, task + kl / 9)


# ----------------------------------------------------------------- several adapters


def test_beside_other_adapters_and_deleted():
    batch, model = BERT.batch(), perturb(adapt())
    expected = logits(model, batch)
    model.add_adapter("other", BayesianLoraConfig(r=2, target_modules=["query"], sample_seed=1, init_weights=False))
    assert torch.equal(logits(model, batch), expected)
    model.set_adapter("other")
    assert not torch.allclose(logits(model, batch), expected)
    laws = holder_of(model).laws
    assert not any(p.requires_grad for p in laws["default"].parameters())
    assert laws["default"]._whitened is None  # an inactive adapter keeps nothing
    law = weakref.ref(laws["other"])
    model.train()(**batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("other")
    gc.collect()
    assert law() is None
    model.set_adapter("default")
    assert torch.equal(logits(model, batch), expected)


def test_disabled_adapter_is_inert():
    batch = {**BERT.batch(), "labels": torch.tensor([0, 2])}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BayesianLoraConfig(r=4, target_modules=["query"], num_train_examples=100)
    model = perturb(get_peft_model(BERT.build(**still), config)).train()
    expected = BERT.build(**still).train()(**batch).loss
    with model.disable_adapter():
        assert torch.equal(model(**batch).loss, expected)
        assert not any(p.requires_grad for p in holder_of(model).parameters())
        assert holder_of(model).pending == []
    assert model(**batch).loss > expected + 0.5 * model.base_model.kl() / 100


def test_two_adapters_through_transformers_share_one_hook():
    model, batch = BERT.build(), {**BERT.batch(), "labels": torch.tensor([0, 2])}
    model.add_adapter(BayesianLoraConfig(r=4, target_modules=["query"], num_train_examples=5), adapter_name="a")
    assert isinstance(model.calib_bayesian, FactorHolder)
    hooks = len(model._forward_hooks)
    model.add_adapter(HyperLoraConfig(r=4, target_modules=["key"]), adapter_name="b")
    assert len(model._forward_hooks) == hooks
    model.set_adapter("a")
    out = model.train()(**batch)
    task = torch.nn.functional.cross_entropy(out.logits, batch["labels"])
    torch.testing.assert_close(out.loss, task + model.calib_bayesian.laws["a"].kl() / 5)


# ----------------------------------------------------------------- precision


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_half_precision_base(autocast_adapter_dtype):
    base = BERT.build().to(torch.bfloat16)
    config = BayesianLoraConfig(r=4, target_modules=["query", "dense"], num_train_examples=10)
    model = get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype)
    expected = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    assert {p.dtype for p in holder_of(model).parameters()} == {expected}
    batch = BERT.batch()
    torch.testing.assert_close(
        logits(model, batch), logits(BERT.build().to(torch.bfloat16), batch), rtol=0.02, atol=0.02
    )
    out = model.train()(**batch, labels=torch.tensor([0, 2]))
    assert out.loss.isfinite()
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in holder_of(model).parameters())


def test_factor_mathematics_is_float32_under_autocast():
    model, batch = perturb(adapt()), {**BERT.batch(), "labels": torch.tensor([0, 2])}
    kl = model.base_model.kl().detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.train()(**batch).loss
    loss.backward()
    torch.testing.assert_close(sum(holder_of(model).pending).detach(), kl / 100, rtol=1e-6, atol=0)
    assert all(p.grad.dtype == torch.float32 for p in holder_of(model).parameters())


# ----------------------------------------------------------------- the paper's settings


def llama2_7b() -> nn.Module:
    with torch.device("meta"):
        return tf.LlamaForCausalLM(
            tf.LlamaConfig(
                vocab_size=32000,
                hidden_size=4096,
                intermediate_size=11008,
                num_hidden_layers=32,
                num_attention_heads=32,
                tie_word_embeddings=False,
            )
        )


def test_paper_settings_have_the_papers_parameter_count():
    """Trainable parameters of the released code on Llama-2-7B: 4,901,762, i.e. 418,690 more than LoRA."""
    counts = []
    for config in (
        BayesianLoraConfig.paper(),
        LoraConfig(r=8, target_modules=["q_proj", "v_proj", "lm_head"]),
    ):
        model = get_peft_model(llama2_7b(), config, low_cpu_mem_usage=True)
        counts.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
    assert counts[0] == 4_901_762
    assert counts[0] - counts[1] == 418_690


def test_paper_settings_train_and_have_the_papers_initial_sizes():
    family = FAMILIES["llama"]
    model = get_peft_model(family.build(tie_word_embeddings=False), BayesianLoraConfig.paper(num_train_examples=100))
    law = model.base_model.get_law()
    assert {law.slots[i].name.rpartition(".")[2] for members in law.layout.members.values() for i in members} == {
        "q_proj",
        "lm_head",
    }
    for slot, A, B in model.base_model.get_factors():
        if slot.name.endswith("v_proj"):
            assert B.abs().max() == 0
        else:  # sigma = 0.1 / sqrt(columns), core entries of variance one
            limit = (slot.in_features, slot.r)
            for W, columns, size in zip((A, B), limit, (A.numel(), B.numel()), strict=True):
                assert W.norm().item() == pytest.approx(0.1 / columns**0.5 * 9, rel=0.6), size
    ids = family.batch()["input_ids"]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in law.parameters())
