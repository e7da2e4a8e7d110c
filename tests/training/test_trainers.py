"""Trainers, precisions and entry points other than the plain ones: what works, and what is refused in clear words."""

import warnings

import pytest
import torch
import transformers as tf
from datasets import Dataset
from families import FAMILIES, perturb
from peft import PeftModel, get_peft_model
from test_gradients import METHODS as GRADIENT_METHODS
from test_gradients import rows as gradient_rows
from tokenizers import Tokenizer, models

import peft_calib
from peft_calib import BayesianLoraConfig, CurveLoraConfig, HyperLoraConfig
from peft_calib.trainer_callbacks import RegularizedLossMixin, RegularizerScheduleCallback
from peft_calib.tuners.holder import FactorHolder

CONFIGS = {"hyper": HyperLoraConfig, "bayesian": BayesianLoraConfig, "curve": CurveLoraConfig}
KL = dict(num_train_examples=3, prior_mean="zero", sample_seed=0)
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def tokenizer() -> tf.PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, 64)}}
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), pad_token="<pad>", eos_token="<eos>"
    )


def settings(kind, folder, **options):
    defaults = dict(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=8,
        max_grad_norm=0,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        dataloader_pin_memory=False,
    )
    return kind(**defaults | options)


def law_of(model):
    holder = next(module for module in model.modules() if isinstance(module, FactorHolder))
    return next(iter(holder.laws.values()))


def sgd_step(make_trainer, model) -> dict[str, torch.Tensor]:
    """What one step of SGD does to the law."""
    parameters = dict(law_of(model).named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    make_trainer((optimizer, None)).train()
    return {name: before[name] - p.detach() for name, p in parameters.items()}


def kl_gradient(model) -> dict[str, torch.Tensor]:
    law = law_of(model)
    law.zero_grad()
    (law.kl() / 3).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in law.named_parameters()}


# --------------------------------------------------------------------- losses formed elsewhere


def classifier(kl_weight=1.0):
    config = BayesianLoraConfig(r=2, target_modules=["query", "dense"], kl_weight=kl_weight, **KL)
    return perturb(get_peft_model(FAMILIES["bert"].build(**STILL), config).double()).train()


class RegularizedTrainer(RegularizedLossMixin, tf.Trainer):
    """The stock Trainer with the mixin."""


def smoothed_step(trainer_class, kl_weight, folder, accumulation=1, smoothing=0.1):
    model = classifier(kl_weight)
    peft_calib.prepare_for_trainer(model)
    args = settings(
        tf.TrainingArguments,
        folder,
        label_smoothing_factor=smoothing,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    data = gradient_rows("classification")
    return sgd_step(lambda both: trainer_class(model, args, train_dataset=data, optimizers=both), model)


def mean_loss(outputs, labels, num_items_in_batch=None):
    """By the contract of `compute_loss_func`: divided by all items of the optimiser step."""
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


class PopsLabels(tf.Trainer):
    """Class weights, as recipes have them."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels, weight=torch.ones(3).double())
        return (loss, outputs) if return_outputs else loss


class KeepsLabels(tf.Trainer):
    """The older form of the recipe: the model forms a loss too, which nobody uses."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class BuildsOnTheLoss(tf.Trainer):
    """A loss made of the model's own, which has the regulariser in it."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        loss = outputs.loss + 0.1 * outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


class OneMoreForward(tf.Trainer):
    """A forward for metrics between the one that is trained on and the step, as TRL has it."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits, labels)
        with torch.no_grad():
            outputs = model(**inputs)
        return (loss, outputs) if return_outputs else loss


OUTSIDE = {
    "popped labels": (PopsLabels, {}),
    "kept labels": (KeepsLabels, {}),
    "compute_loss_func": (tf.Trainer, {"compute_loss_func": mean_loss}),
    "one more forward": (OneMoreForward, {}),
}


def step_by(trainer_class, kl_weight, folder, accumulation=1, return_dict=True, **given):
    model = classifier(kl_weight)
    model.get_base_model().config.return_dict = return_dict
    peft_calib.prepare_for_trainer(model)
    args = settings(
        tf.TrainingArguments,
        folder,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    data = gradient_rows("classification")
    return sgd_step(lambda both: trainer_class(model, args, train_dataset=data, optimizers=both, **given), model)


def kl_part(trainer_class, folder, **given):
    with_kl, without = (step_by(trainer_class, weight, folder, **given) for weight in (1.0, 0.0))
    return {name: with_kl[name] - without[name] for name in with_kl}


def assert_once(found):
    for name, gradient in kl_gradient(classifier()).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("how", OUTSIDE)
def test_mixin_adds_the_regulariser_once_wherever_the_loss_is_formed(tmp_path, how, accumulation):
    kind, given = OUTSIDE[how]
    mixed = type("Mixed", (RegularizedLossMixin, kind), {})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        assert_once(kl_part(mixed, tmp_path, accumulation=accumulation, **given))


@pytest.mark.parametrize("how", OUTSIDE)
def test_a_regulariser_outside_the_loss_is_announced_in_the_first_step(tmp_path, how):
    kind, given = OUTSIDE[how]
    with pytest.warns(UserWarning, match=r"reached no loss.*RegularizedLossMixin"):
        step_by(kind, 1.0, tmp_path, **given)


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize(
    ("kind", "return_dict"), [(tf.Trainer, True), (tf.Trainer, False), (BuildsOnTheLoss, True)]
)  # fmt: skip
def test_a_loss_that_has_the_regulariser_is_left_alone(tmp_path, kind, return_dict, mixed):
    kind = type("Mixed", (RegularizedLossMixin, kind), {}) if mixed else kind
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        assert_once(kl_part(kind, tmp_path, accumulation=2, return_dict=return_dict))


@pytest.mark.parametrize(("smoothing", "accumulation"), [(0.1, 1), (0.1, 2), (0.0, 2)])
def test_mixin_adds_the_regulariser_once(tmp_path, smoothing, accumulation):
    expected = kl_gradient(classifier())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        with_kl, without = (
            smoothed_step(RegularizedTrainer, weight, tmp_path, accumulation, smoothing) for weight in (1.0, 0.0)
        )
    for name, gradient in expected.items():
        torch.testing.assert_close(with_kl[name] - without[name], gradient, rtol=1e-5, atol=1e-8)


def test_a_regulariser_that_is_dropped_is_announced(tmp_path):
    with pytest.warns(UserWarning, match="RegularizedLossMixin"):
        smoothed_step(tf.Trainer, 1.0, tmp_path, accumulation=2)


def test_a_loop_of_ones_own_is_warned_only_if_it_forgets():
    model, batch = classifier(), FAMILIES["bert"].batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            model(**batch).logits.sum().backward()
            peft_calib.regularization_loss(model)
        for _ in range(2):
            model(**batch, labels=torch.tensor([0, 1])).loss.backward()
    model(**batch)
    with pytest.warns(UserWarning, match="reached no loss"):
        model(**batch)


# --------------------------------------------------------------------- TRL

trl = pytest.importorskip("trl")


def preferences() -> Dataset:
    ids = [[3 + (5 * i + j) % 60 for j in range(5)] for i in range(16)]
    return Dataset.from_dict({"chosen_ids": ids[:8], "rejected_ids": ids[8:]})


def reward_step(config, folder, batch=8, accumulation=1, mixin=True):
    base = FAMILIES["llama"]
    sizes = tf.LlamaConfig(**base.settings, num_labels=1, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.LlamaForSequenceClassification(sizes)
    model = get_peft_model(model, config).double()
    kind = type("Regularized", (RegularizedLossMixin, trl.RewardTrainer), {}) if mixin else trl.RewardTrainer
    args = settings(
        trl.RewardConfig, folder, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        gradient_checkpointing=False,
    )  # fmt: skip

    def make(both):
        return kind(model, args, train_dataset=preferences(), processing_class=tokenizer(), optimizers=both)

    return sgd_step(make, model), model


@pytest.mark.parametrize("method", CONFIGS)
def test_reward_trainer(method, tmp_path):
    config = CONFIGS[method](r=2, target_modules=["q_proj", "down_proj"], task_type="SEQ_CLS")
    change, model = reward_step(config, tmp_path)
    assert any(tensor.abs().max() > 0 for tensor in change.values())
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_reward_trainer_counts_the_regulariser_once(tmp_path):
    def change(weight, **options):
        config = BayesianLoraConfig(
            r=2, target_modules=["q_proj", "down_proj"], kl_weight=weight, task_type="SEQ_CLS", **KL
        )
        return reward_step(config, tmp_path, **options)[0]

    whole = {
        name: tensor - other for (name, tensor), other in zip(change(1.0).items(), change(0.0).values(), strict=True)
    }
    assert max(tensor.abs().max() for tensor in whole.values()) > 1e-3
    cut = change(1.0, batch=4, accumulation=2)
    without = change(0.0, batch=4, accumulation=2)
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name] - without[name], tensor, rtol=1e-5, atol=1e-8)


def language_model(config):
    return get_peft_model(FAMILIES["llama"].build(pad_token_id=0, eos_token_id=1), config)


def test_dpo_is_refused_for_draws_and_works_without(tmp_path):
    data = Dataset.from_dict({"prompt": ["w5 w6"] * 8, "chosen": [" w7 w8"] * 8, "rejected": [" w9"] * 8})

    def make(config):
        args = settings(trl.DPOConfig, tmp_path, gradient_checkpointing=False, per_device_train_batch_size=4)
        return trl.DPOTrainer(
            language_model(config),
            args=args,
            train_dataset=data,
            processing_class=tokenizer(),
            callbacks=[RegularizerScheduleCallback()],
        )

    common = dict(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for config in (
        BayesianLoraConfig(**common),
        CurveLoraConfig(**common),
        HyperLoraConfig(a_mode="random", **common),
    ):
        with pytest.raises(ValueError, match="DPOTrainer forms its loss from several forwards"):
            make(config)
    make(HyperLoraConfig(**common)).train()


# --------------------------------------------------------------------- other entry points


@pytest.mark.parametrize("method", CONFIGS)
def test_mixed_model_is_refused(method):
    with pytest.raises(ValueError, match="not compatible"):
        get_peft_model(FAMILIES["bert"].build(), CONFIGS[method](target_modules=["query"]), mixed=True)


@pytest.mark.parametrize("method", CONFIGS)
def test_native_adapter_in_the_stock_trainer(method, tmp_path):
    """`model.add_adapter` of transformers, trained, saved and loaded again."""
    config = CONFIGS[method](r=2, target_modules=["query", "value"])
    model = FAMILIES["bert"].build(**STILL)
    model.add_adapter(config)
    peft_calib.prepare_for_trainer(model)
    args = settings(tf.TrainingArguments, tmp_path, max_steps=3, learning_rate=1e-2)
    data = gradient_rows("classification")
    trainer = tf.Trainer(model, args, train_dataset=data, callbacks=[RegularizerScheduleCallback()])
    before = {name: p.detach().clone() for name, p in law_of(model).named_parameters()}
    trainer.train()
    assert any(not torch.equal(before[name], p) for name, p in law_of(model).named_parameters())
    trainer.save_model(tmp_path / "native")
    batch = FAMILIES["bert"].batch()
    expected = model.eval()(**batch).logits
    again = FAMILIES["bert"].build(**STILL)
    again.load_adapter(str(tmp_path / "native"))
    torch.testing.assert_close(again.eval()(**batch).logits, expected, rtol=1e-5, atol=1e-6)
    wrapped = PeftModel.from_pretrained(FAMILIES["bert"].build(**STILL), tmp_path / "native").eval()
    torch.testing.assert_close(wrapped(**batch).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", CONFIGS)
def test_bf16_autocast_in_the_stock_trainer(method, tmp_path):
    """Parameters stay float32, and the loss is that of float32 to bfloat16's rounding."""
    losses = {}
    for bf16 in (False, True):
        config = CONFIGS[method](r=2, target_modules=["query", "dense"])
        model = peft_calib.prepare_for_trainer(get_peft_model(FAMILIES["bert"].build(**STILL), config))
        args = settings(tf.TrainingArguments, tmp_path, max_steps=4, learning_rate=1e-3, bf16=bf16)
        trainer = tf.Trainer(
            model, args, train_dataset=gradient_rows("classification"), callbacks=[RegularizerScheduleCallback()]
        )
        trainer.train()
        assert {p.dtype for p in law_of(model).parameters()} == {torch.float32}
        losses[bf16] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[True] == pytest.approx(losses[False], rel=2e-2)
    assert losses[True] != losses[False]


@pytest.mark.parametrize("method", CONFIGS)
def test_fp16_autocast_and_loss_scaling(method):
    """A scaled loss under float16: finite gradients, those of float32 to float16's rounding."""
    config = CONFIGS[method](r=2, target_modules=["query", "dense"])
    batch = {**FAMILIES["bert"].batch(), "labels": torch.tensor([0, 1])}
    found = {}
    for half in (False, True):
        model = perturb(get_peft_model(FAMILIES["bert"].build(**STILL), config)).train()
        scale = 1024.0 if half else 1.0
        with torch.autocast("cpu", dtype=torch.float16, enabled=half):
            loss = model(**batch).loss
        (loss.float() * scale).backward()
        found[half] = torch.cat([p.grad.flatten() / scale for p in law_of(model).parameters() if p.grad is not None])
    assert torch.isfinite(found[True]).all()
    cosine = torch.nn.functional.cosine_similarity(found[True], found[False], dim=0)
    assert cosine > 0.999


def four_losses(config, layers, backend=None, seen=None) -> list[float]:
    """Of four steps, compiled if there is a backend."""
    model = get_peft_model(FAMILIES["llama"].build(num_hidden_layers=layers), config).train()
    step = model if backend is None else torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = FAMILIES["llama"].batch()
    losses = []
    for _ in range(4):
        loss = step(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if seen is not None:
            seen.append(backend.frame_count)
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("method", CONFIGS)
def test_compiled_training_step(method):
    """One graph without a break, compiled once, with the draws and losses of the step that is not compiled."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter, seen = CompileCounterWithBackend("aot_eager"), []
    own = {"num_train_examples": 10} if method == "bayesian" else {}
    config = CONFIGS[method](r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **own)
    losses = four_losses(config, 2, counter, seen)
    torch._dynamo.reset()
    assert seen == [1, 1, 1, 1]
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(four_losses(config, 2), rel=1e-4)


def test_the_methods_are_those_of_the_gradient_tests():
    assert {kind for kind, _ in GRADIENT_METHODS.values()} == set(CONFIGS.values())
