"""One optimiser step of the stock Trainer, cut into micro-batches and processes in every way: one gradient."""

import copy
from functools import cache

import pytest
import torch
import transformers as tf
from families import FAMILIES, perturb
from peft import get_peft_model
from processes import run_ranks
from safetensors.torch import load_file, save_file

import peft_calib
from peft_calib import BayesianLoraConfig, CurveLoraConfig, HyperLoraConfig
from peft_calib.tuners.curve_lora.sampling import opposite

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
METHODS = {
    "hyper-lora": (HyperLoraConfig, {}),
    "bayesian-lora": (BayesianLoraConfig, dict(num_train_examples=3, prior_mean="zero")),
    # a margin out of reach, so that the diversity term is on whatever the rows
    "curve-lora": (CurveLoraConfig, dict(jsd_weight=0.5, jsd_margin=10.0)),
}
TASKS = {"classification": "bert", "language": "llama"}


def rows(task: str) -> list[dict]:
    """Eight rows; of a language model's the first 0 to 4 tokens have no label."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for i in range(8):
        ids = torch.randint(3, 64, (6,), generator=generator)
        labels = ids.clone().index_fill_(0, torch.arange(i % 5), -100) if task == "language" else torch.tensor(i % 3)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def build(method: str, task: str):
    """The adapter in float64, off its start, with sampling fixed: every forward, on every rank, uses one draw."""
    torch.manual_seed(0)  # a Trainer made before has set another, and an adapter without a seed starts by it
    kind, own = METHODS[method]
    family = FAMILIES[TASKS[task]]
    base = family.build(**(STILL if task == "classification" else {}))
    config = kind(r=2, target_modules=list(family.targets), **own)
    model = perturb(peft_calib.prepare_for_trainer(get_peft_model(base, config)).double()).train()
    law = model.base_model.get_law()
    law.generations = lambda: torch.tensor(1)
    if method == "curve-lora":
        t = torch.tensor([0.7], dtype=torch.float64)
        law._points = lambda draw: torch.cat([t, opposite(t, law.shape)])[: draw.num_samples]
    return model


def trainable(model) -> dict[str, torch.Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


class Collate:
    """Stacks rows and remembers which of them this process saw."""

    def __init__(self):
        self.seen = []

    def __call__(self, chosen):
        self.seen += [row["input_ids"] for row in chosen]
        return {key: torch.stack([row[key] for row in chosen]) for key in chosen[0]}


def trainer_step(method, task, folder, batch, accumulation, average):
    """The gradient, from what one step of SGD does to the parameters, and the rows of this process."""
    model, collate = build(method, task), Collate()
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    args = tf.TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        average_tokens_across_devices=average,
        max_grad_norm=0,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    optimizer = torch.optim.SGD(trainable(model).values(), lr=1.0)
    tf.Trainer(model, args, train_dataset=rows(task), data_collator=collate, optimizers=(optimizer, None)).train()
    return {name: before[name] - p.detach() for name, p in trainable(model).items()}, torch.stack(collate.seen)


def gradient_of(method, task, *parts):
    """By hand: the gradient of the average over parts of each part's loss, regulariser included."""
    model = build(method, task)
    for part in parts:
        (model(**Collate()(part)).loss / len(parts)).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trainable(model).items()}


@cache
def whole(method, task):
    return gradient_of(method, task, rows(task))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert any(tensor.abs().max() > 1e-3 for tensor in expected.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_accumulation(method, task, tmp_path):
    for batch, accumulation in ((8, 1), (4, 2), (2, 4)):
        assert_same(trainer_step(method, task, tmp_path, batch, accumulation, True)[0], whole(method, task))


def test_the_regulariser_counts():
    """Without it the gradients compared above would be others."""
    for method, change in (("bayesian-lora", {"kl_weight": 0.0}), ("curve-lora", {"jsd_weight": 0.0})):
        kind, own = METHODS[method]
        expected = copy.deepcopy(whole(method, "language"))
        METHODS[method] = (kind, {**own, **change})
        try:
            found = gradient_of(method, "language", rows("language"))
        finally:
            METHODS[method] = (kind, own)
        difference = max((found[name] - tensor).abs().max() for name, tensor in expected.items())
        assert difference > 1e-3


def cases():
    """Method, task, rows of a micro-batch, accumulation, and whether tokens are averaged across processes."""
    return [
        (method, task, batch, accumulation, average)
        for method in METHODS
        for task in TASKS
        for batch, accumulation in ((4, 1), (2, 2))
        for average in (True, False)
        # everything for one method; of the others what is peculiar to them
        if method == "bayesian-lora" or (accumulation == 2 and (average or method == "curve-lora"))
    ]


def worker(rank, folder):
    for index, case in enumerate(cases()):
        method, task, batch, accumulation, average = case
        gradient, seen = trainer_step(method, task, folder, batch, accumulation, average)
        save_file({**gradient, "seen": seen}, folder / f"{index}-{rank}.safetensors")


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Without `average_tokens_across_devices` the Trainer averages the processes' token means: so do we, exactly."""
    run_ranks(worker, tmp_path)
    for index, (method, task, _, _, average) in enumerate(cases()):
        of_ranks = [load_file(tmp_path / f"{index}-{rank}.safetensors") for rank in (0, 1)]
        by_content = {tuple(row["input_ids"].tolist()): row for row in rows(task)}
        parts = [[by_content[tuple(ids)] for ids in each.pop("seen").tolist()] for each in of_ranks]
        assert sorted(len(part) for part in parts) == [4, 4]
        assert len({tuple(row["input_ids"].tolist()) for part in parts for row in part}) == 8
        expected = whole(method, task) if average else gradient_of(method, task, *parts)
        for gradient in of_ranks:
            assert_same(gradient, expected)
        if task == "language" and not average:
            labels = [sum(int((row["labels"][1:] != -100).sum()) for row in part) for part in parts]
            assert labels[0] != labels[1]
