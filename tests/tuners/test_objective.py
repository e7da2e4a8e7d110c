"""The regulariser in the loss: where it appears, and that its gradient does not depend on how a step is cut."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from families import FAMILIES
from peft import PeftModel, get_peft_model
from processes import run_ranks
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

import peft_calib
from peft_calib import BayesianLoraConfig
from peft_calib.tuners.holder import FactorHolder
from peft_calib.tuners.objective import add_to_outputs, honours_num_items, micro_batch_share, named_inputs

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LABELS = torch.tensor([0, 2])


def bert(kl_weight: float = 1.0, **fields) -> PeftModel:
    config = BayesianLoraConfig(
        r=4, target_modules=["query", "dense"], num_train_examples=10, kl_weight=kl_weight, **fields
    )
    return get_peft_model(FAMILIES["bert"].build(**STILL), config).train()


def holder_of(model: nn.Module) -> FactorHolder:
    return next(module for module in model.modules() if isinstance(module, FactorHolder))


# ----------------------------------------------------------------- outputs


def test_losses_in_dicts_outputs_and_tuples():
    one, half = torch.tensor(1.0), torch.tensor(0.5)
    assert add_to_outputs({"loss": one, "x": 3}, half, 1.0, True) == {"loss": torch.tensor(1.5), "x": 3}
    output = add_to_outputs(SequenceClassifierOutput(loss=one, logits=one), half, 0.5, True)
    assert (output.loss, output[0], output["loss"]) == (1.25, 1.25, 1.25)
    assert add_to_outputs((one, "logits"), half, 1.0, True) == (torch.tensor(1.5), "logits")
    assert add_to_outputs((one, "logits"), half, 1.0, False) == (one, "logits")  # no labels: no loss
    assert add_to_outputs((torch.ones(2, 3), one), half, 1.0, True)[0].shape == (2, 3)
    one_logit = torch.ones(1, 1)
    assert add_to_outputs((one_logit, one), half, 1.0, True)[0] is one_logit
    assert add_to_outputs({"loss": None}, half, 1.0, True) == {"loss": None}
    assert add_to_outputs(one, half, 1.0, True) is one


def test_sum_is_formed_in_float32():
    loss = add_to_outputs({"loss": torch.tensor(256.0, dtype=torch.bfloat16)}, torch.tensor(1.5), 1.0, True)["loss"]
    assert loss.dtype == torch.bfloat16
    assert loss == 258  # bfloat16 + bfloat16 would round 1.5 away or up alone
    double = add_to_outputs({"loss": torch.tensor(1.0, dtype=torch.float64)}, torch.tensor(1e-9).double(), 1.0, True)
    assert double["loss"] == 1 + 1e-9


def test_arguments_by_position_are_found():
    class Model(nn.Module):
        def forward(self, x, labels=None):
            return x

    assert named_inputs(Model(), (1, 2), {}) == {"x": 1, "labels": 2}
    assert named_inputs(Model(), (1,), {"labels": 3}) == {"x": 1, "labels": 3}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (tf.LlamaForCausalLM, True),
        (tf.GPT2LMHeadModel, True),
        (tf.Qwen2ForCausalLM, True),
        (tf.BertForSequenceClassification, False),
        (tf.RobertaForSequenceClassification, False),
        (tf.BertForMaskedLM, False),
        (tf.T5ForConditionalGeneration, False),
    ],
)
def test_heads_that_hand_the_count_to_their_loss(model, expected):
    """Judged by the source, proven by running: with twice the count an honest loss is halved."""
    assert honours_num_items(model) is expected
    config = {
        "LlamaForCausalLM": FAMILIES["llama"],
        "GPT2LMHeadModel": FAMILIES["gpt2"],
        "Qwen2ForCausalLM": FAMILIES["qwen2"],
        "BertForSequenceClassification": FAMILIES["bert"],
        "RobertaForSequenceClassification": FAMILIES["roberta"],
        "BertForMaskedLM": FAMILIES["bert"],
        "T5ForConditionalGeneration": FAMILIES["t5"],
    }[model.__name__]
    with torch.random.fork_rng(devices=[]):
        network = model(config.config(**config.settings)).eval()
    batch = config.batch()
    labels = (
        LABELS if "Sequence" in model.__name__ else batch.get("decoder_input_ids", batch["input_ids"]).contiguous()
    )
    losses = [network(**batch, labels=labels, num_items_in_batch=n).loss for n in (torch.tensor(4), torch.tensor(8))]
    assert torch.allclose(losses[0], 2 * losses[1]) is expected


def test_share_counts_items_as_the_trainer_does():
    llama, classifier = FAMILIES["llama"].build(), FAMILIES["bert"].build()
    labels = torch.tensor([[5, 6, -100, 7], [8, 9, 9, -100]])
    inputs = {"labels": labels, "num_items_in_batch": torch.tensor(20)}
    assert micro_batch_share(llama, inputs) == 4 / 20  # the first column predicts nothing
    assert micro_batch_share(llama, {**inputs, "shift_labels": labels}) == pytest.approx(6 / 20)
    assert micro_batch_share(llama, {"labels": labels}) == 1
    assert micro_batch_share(classifier, inputs) == 1


# ----------------------------------------------------------------- presence and absence


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
@pytest.mark.parametrize("return_dict", [True, False])
def test_present_in_training_only(task_type, return_dict):
    model, batch = bert(task_type=task_type), {**FAMILIES["bert"].batch(), "labels": LABELS}
    model.get_base_model().config.return_dict = return_dict
    kl = model.base_model.kl() / 10
    out = model(**batch, return_dict=return_dict)
    loss, scores = (out.loss, out.logits) if return_dict else (out[0], out[1])
    task = nn.functional.cross_entropy(scores, LABELS)
    torch.testing.assert_close(loss, task + kl)
    torch.testing.assert_close(sum(holder_of(model).pending), kl)
    out = model.eval()(**batch, return_dict=return_dict)
    loss, scores = (out.loss, out.logits) if return_dict else (out[0], out[1])
    torch.testing.assert_close(loss, nn.functional.cross_entropy(scores, LABELS))


def test_absent_without_gradients_and_without_labels():
    model, batch = bert(), FAMILIES["bert"].batch()
    with torch.no_grad():
        out = model(**batch, labels=LABELS)
        torch.testing.assert_close(out.loss, nn.functional.cross_entropy(out.logits, LABELS))
    assert model(**batch).loss is None


def test_loops_with_a_loss_of_their_own():
    model, batch = bert(), FAMILIES["bert"].batch()
    scores = model(**batch).logits
    term = peft_calib.regularization_loss(model)
    torch.testing.assert_close(term, model.base_model.kl() / 10)
    assert peft_calib.regularization_loss(model) is None  # once for each forward
    (nn.functional.cross_entropy(scores, LABELS) + term).backward()
    own = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    twin = bert()
    twin(**batch, labels=LABELS).loss.backward()
    for name, parameter in twin.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, own[name], rtol=1e-5, atol=1e-8)
    model.eval()(**batch)
    assert peft_calib.regularization_loss(model) is None


def test_models_that_are_no_transformers():
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x, labels=None):
            scores = self.linear(x)
            return {"loss": None if labels is None else nn.functional.cross_entropy(scores, labels), "scores": scores}

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(Tiny(), BayesianLoraConfig(r=2, target_modules=["linear"], num_train_examples=4))
    out = model(torch.ones(2, 3), torch.tensor([0, 1]))
    task = nn.functional.cross_entropy(out["scores"], torch.tensor([0, 1]))
    torch.testing.assert_close(out["loss"], task + model.base_model.kl() / 4)


def test_an_error_in_the_forward_leaves_no_trace():
    model, batch = bert(), FAMILIES["bert"].batch()
    with pytest.raises(ValueError, match="batch_size"):
        model(**batch, labels=torch.tensor([0, 2, 1]))
    out = model(**batch, labels=LABELS)
    task = nn.functional.cross_entropy(out.logits, LABELS)
    torch.testing.assert_close(out.loss, task + model.base_model.kl() / 10)


# ----------------------------------------------------------------- one optimiser step, cut in different ways


def rows(classify: bool) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for i in range(8):
        ids = torch.randint(3, 64, (6,), generator=generator)
        labels = torch.tensor(i % 3) if classify else ids.clone().index_fill_(0, torch.arange(i % 4), -100)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def step(classify: bool, kl_weight: float, folder: Path, batch: int, accumulation: int) -> dict[str, torch.Tensor]:
    """What one SGD step of size one with the stock Trainer does to the law's parameters."""
    family = FAMILIES["bert" if classify else "llama"]
    config = BayesianLoraConfig(
        r=2,
        target_modules=list(family.targets),
        num_train_examples=10,
        kl_weight=kl_weight,
        prior_mean="zero",
        sample_seed=0,
        task_type="SEQ_CLS" if classify else "CAUSAL_LM",
    )
    base = family.build(**(STILL if classify else {}))
    model = peft_calib.prepare_for_trainer(get_peft_model(base, config)).double()
    law = model.base_model.get_law()
    before = {n: p.detach().clone() for n, p in law.named_parameters()}
    args = tf.TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    tf.Trainer(model, args, train_dataset=rows(classify), optimizers=(optimizer, None)).train()
    return {n: p.detach() - before[n] for n, p in law.named_parameters()}


def kl_step(classify: bool, folder: Path, batch: int, accumulation: int) -> dict[str, torch.Tensor]:
    """The part of the step that is the KL's: equal draws with and without it."""
    with_kl, without = (step(classify, weight, folder, batch, accumulation) for weight in (1.0, 0.0))
    return {name: with_kl[name] - without[name] for name in with_kl}


@pytest.mark.parametrize("classify", [False, True])
def test_gradient_does_not_depend_on_accumulation(classify, tmp_path):
    whole = kl_step(classify, tmp_path, 8, 1)
    assert all(change.abs().max() > 0 for name, change in whole.items() if "mean" in name or "offset" in name)
    for batch, accumulation in ((4, 2), (2, 4)):
        cut = kl_step(classify, tmp_path, batch, accumulation)
        for name, change in whole.items():
            torch.testing.assert_close(cut[name], change, rtol=1e-5, atol=1e-9)


def ranks(rank: int, folder: Path) -> None:
    found = {classify: kl_step(classify, folder, 2, 2) for classify in (False, True)}
    if rank == 0:
        torch.save(found, folder / "step.pt")


@pytest.mark.slow
def test_gradient_does_not_depend_on_the_number_of_ranks(tmp_path):
    run_ranks(ranks, tmp_path)
    found = torch.load(tmp_path / "step.pt")
    for classify in (False, True):
        whole = kl_step(classify, tmp_path, 8, 1)
        for name, change in whole.items():
            torch.testing.assert_close(found[classify][name], change, rtol=1e-5, atol=1e-9)


def sft_step(kl_weight: float, folder: Path, batch: int, accumulation: int) -> dict[str, torch.Tensor]:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl import SFTConfig, SFTTrainer

    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, 64)}}
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
    )
    config = BayesianLoraConfig(
        r=2,
        target_modules=["q_proj", "down_proj"],
        num_train_examples=10,
        kl_weight=kl_weight,
        prior_mean="zero",
        sample_seed=0,
        task_type="CAUSAL_LM",
    )
    data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows(False)])
    args = SFTConfig(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=False,
        max_grad_norm=0,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    model = get_peft_model(FAMILIES["llama"].build(), config).double()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, optimizers=(optimizer, None))
    law = model.base_model.get_law()
    before = {n: p.detach().clone() for n, p in law.named_parameters()}
    trainer.train()
    return {n: p.detach() - before[n] for n, p in law.named_parameters()}


@pytest.mark.slow
def test_trl_trains_on_the_regulariser(tmp_path):
    """SFTTrainer from TRL 1.15 forms its loss from log_probs; the KL's gradient must be that of the plain Trainer."""
    pytest.importorskip("trl")
    expected = kl_step_like_sft(tmp_path)
    for batch, accumulation in ((8, 1), (4, 2), (2, 4)):
        with_kl, without = (sft_step(weight, tmp_path, batch, accumulation) for weight in (1.0, 0.0))
        for name, change in expected.items():
            torch.testing.assert_close(with_kl[name] - without[name], change, rtol=1e-5, atol=1e-9)


def kl_step_like_sft(folder: Path) -> dict[str, torch.Tensor]:
    """-grad of KL / N for the same adapter, without any trainer."""
    config = BayesianLoraConfig(
        r=2,
        target_modules=["q_proj", "down_proj"],
        num_train_examples=10,
        prior_mean="zero",
        sample_seed=0,
        task_type="CAUSAL_LM",
    )
    law = get_peft_model(FAMILIES["llama"].build(), config).double().base_model.get_law()
    (law.kl() / 10).backward()
    return {n: torch.zeros_like(p) if p.grad is None else -p.grad for n, p in law.named_parameters()}
