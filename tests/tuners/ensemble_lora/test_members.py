"""Members: each is a LoRA of its own, trained as if alone, over a trunk that is run once."""

import warnings

import pytest
import torch
from families import FAMILIES, logits
from peft import PeftModel, get_peft_model
from small_trainer import arguments
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertForQuestionAnswering,
    BertForTokenClassification,
    Trainer,
)

from peft_calib import EnsembleLoraConfig, draws, export_lora, predict
from peft_calib.tuners import hooks
from peft_calib.tuners.laws import laws_of

BERT, LLAMA = FAMILIES["bert"], FAMILIES["llama"]
LAYERS = 4
HEADS = {
    "TOKEN_CLS": (BertForTokenClassification, "classifier"),
    "QUESTION_ANS": (BertForQuestionAnswering, "qa_outputs"),
}


def adapted(num_members=2, layers="last_half", family=BERT, dropout=0.0, **fields):
    overrides = {"num_hidden_layers": LAYERS}
    if family is BERT:
        overrides |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    fields = {"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS", "seed": 0, **fields}
    return get_peft_model(
        family.build(**overrides), EnsembleLoraConfig(num_members=num_members, layers=layers, **fields)
    )


def labelled(rows=6, family=BERT):
    batch = family.batch(rows)
    return {**batch, "labels": torch.arange(rows) % 3}


def steps(model, learning_rate, count=5):
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], learning_rate)
    model.train()
    for _ in range(count):
        optimiser.zero_grad()
        model(**labelled()).loss.backward()
        optimiser.step()
    return model.eval()


@pytest.mark.parametrize(
    ("layers", "names"), [("all", 4), ("last_half", 2), ("last_third", 2), ("last_quarter", 1), (3, 3)]
)
def test_layers_are_counted_from_the_last(layers, names):
    (law,) = laws_of(adapted(layers=layers))
    assert {slot.layer for slot in law.slots} - {None} == set(range(LAYERS - names, LAYERS))
    assert any(slot.name == "bert.pooler.dense" for slot in law.slots)
    assert not any("classifier" in slot.name for slot in law.slots)


def test_draw_k_is_member_k_and_its_export(tmp_path):
    model = steps(adapted(3), 1.0)
    batch = BERT.batch(4)
    with torch.no_grad(), draws(model, 3):
        members = model(**batch).logits.chunk(3)
    assert not torch.equal(members[0], members[1]) and not torch.equal(members[1], members[2])
    torch.testing.assert_close(logits(model, batch), members[0])  # what .eval() is
    export_lora(model, tmp_path / "members", num_samples=3)
    for k, member in enumerate(members):
        alone = PeftModel.from_pretrained(BERT.build(num_hidden_layers=LAYERS), tmp_path / "members" / f"draw-{k}")
        torch.testing.assert_close(logits(alone, batch), member, rtol=1e-5, atol=1e-6)
    with draws(model, 1, first=2):
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), members[2], rtol=1e-4, atol=1e-5)


def test_members_train_as_if_alone(tmp_path):
    """The loss is the mean of the members', so by plain gradients at K times the rate each goes its own way."""
    model = adapted(2)
    export_lora(model, tmp_path / "start", num_samples=2)
    trained = steps(model, 2 * 0.5)
    batch = BERT.batch(4)
    with torch.no_grad(), draws(trained, 2):
        members = trained(**batch).logits.chunk(2)
    for k, member in enumerate(members):
        base = BERT.build(num_hidden_layers=LAYERS)
        alone = PeftModel.from_pretrained(base, tmp_path / "start" / f"draw-{k}", is_trainable=True)
        torch.testing.assert_close(logits(steps(alone, 0.5), batch), member, rtol=1e-4, atol=1e-5)


def test_seeds_name_the_members():
    first, again, other = (next(laws_of(adapted(2, seed=seed))) for seed in (0, 0, 1))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
    key = next(iter(first.A))
    assert not torch.equal(first.A[key], other.A[key])
    assert not torch.equal(first.A[key][0], first.A[key][1])


def test_heads_start_as_the_base_and_anew():
    weight = "heads.stacks.classifier/weight"
    base = BERT.build(num_hidden_layers=LAYERS).classifier.weight
    (law,) = laws_of(adapted(3))
    heads = law.get_parameter(weight)
    assert torch.equal(heads[0], base)
    assert not torch.equal(heads[1], heads[2])
    for head in heads[1:]:
        assert 0.5 < float(head.std() / base.std()) < 2
    (law,) = laws_of(adapted(3, fresh_heads=False))
    assert all(torch.equal(head, base) for head in law.get_parameter(weight))


@pytest.mark.parametrize("task", HEADS)
def test_heads_that_peft_adds_late_are_the_members_own(task):
    kind, head = HEADS[task]
    base = kind(BERT.build(num_hidden_layers=LAYERS).config)
    model = get_peft_model(base, EnsembleLoraConfig(target_modules=["query"], task_type=task, seed=0))
    (law,) = laws_of(model)
    assert f"heads.stacks.{head}/weight" in dict(law.named_parameters())
    assert not any(head in n and "law" not in n for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_trunk_is_run_once_and_changes_nothing(family, monkeypatch):
    family = FAMILIES[family]
    options = {"family": family, "target_modules": list(family.targets), "task_type": None}
    batch = family.batch(3)
    batch["labels"] = batch["input_ids"] if family is LLAMA else torch.arange(3)

    def gradients():
        model = adapted(3, **options).train()
        model(**batch)  # in its first forward a model is looked at, see tuners/one_by_one.py
        runs = []
        block = next(module for module in model.modules() if isinstance(module, nn.ModuleList))[0]
        inner = next(module for module in block.modules() if isinstance(module, nn.Linear))
        inner.register_forward_hook(lambda module, args, output: runs.append(len(args[0])))
        loss = model(**batch).loss
        loss.backward()
        return loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, runs

    loss, grads, runs = gradients()
    assert runs == [3]
    monkeypatch.setattr(hooks, "trunk_replay", lambda *_: None)
    whole, expected, repeated = gradients()
    assert repeated == [9]
    torch.testing.assert_close(loss, whole)
    for name, gradient in expected.items():
        torch.testing.assert_close(grads[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target_length", [4, 6])
def test_a_trunk_that_ends_in_a_decoder_reads_the_labels(target_length, monkeypatch):
    """The tokens of a decoder are made of the labels: without them it would run on the encoder's."""
    small = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = BartConfig(vocab_size=64, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, dropout=0.0, **small)
    fields = {"r": 2, "target_modules": ["q_proj"], "seed": 0, "layers": 1}
    model = get_peft_model(BartForConditionalGeneration(config), EnsembleLoraConfig(**fields)).train()
    generator = torch.Generator().manual_seed(0)
    batch = {"input_ids": torch.randint(3, 64, (4, 6), generator=generator)}
    batch["labels"] = torch.randint(3, 64, (4, target_length), generator=generator)
    loss = model(**batch).loss
    monkeypatch.setattr(hooks, "trunk_replay", lambda *_: None)
    torch.testing.assert_close(loss, model(**batch).loss)


def test_a_loss_of_the_first_member_alone_is_told(tmp_path):
    """Logits in training are the first member's: a loss formed of them would leave the others as they are."""
    rows = [{"input_ids": [3 + i, 4, 5], "labels": i % 2} for i in range(8)]
    trainer = Trainer(adapted(2), arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=rows)
    with pytest.warns(UserWarning, match="no other member would train"):
        trainer.train()
    other = Trainer(adapted(2), arguments(tmp_path), train_dataset=rows)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no other member")
        other.train()


class Plain(nn.Module):
    """A model that compiles in a moment."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x, labels):
        logits = self.out(self.inner(x).tanh())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("outside", [False, True])
def test_a_compiled_loss_of_the_first_member_alone_is_told(outside):
    """No hook goes into a compiled graph; the gradients of the other members tell, in the first step that has any."""
    model = get_peft_model(Plain(), EnsembleLoraConfig(target_modules=["inner"], seed=0)).train()
    x, labels = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    step = torch.compile(model, backend="eager")
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    told = []
    for weight in (0.0, 1.0, 1.0):
        optimiser.zero_grad()
        outputs = step(x=x, labels=labels)
        loss = nn.functional.cross_entropy(outputs["logits"], labels) if outside else outputs["loss"]
        (weight * loss).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimiser.step()
        told.append(any("no other member" in str(warning.message) for warning in caught))
    assert told == [False, outside, False]
    torch.compiler.reset()


def test_a_gradient_of_zeros_is_no_loss_of_the_first_member():
    """DistributedDataParallel gives one to every output."""
    model = adapted(2).train()
    outputs = model(**labelled())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no other member")
        torch.autograd.backward([outputs.loss, outputs.logits], [torch.ones(()), torch.zeros_like(outputs.logits)])


def test_a_loss_formed_outside_member_by_member():
    """The way out that the warning names has the gradients of the model's own loss."""
    batch = labelled()
    labels = batch.pop("labels")
    found = []
    for outside in (False, True):
        model = adapted(2).train()
        if outside:
            for k in range(2):
                with draws(model, 1, first=k):
                    (nn.functional.cross_entropy(model(**batch).logits, labels) / 2).backward()
        else:
            model(**batch, labels=labels).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_no_dropout_below_and_dropout_above():
    model = adapted(2, dropout=0.5).train()
    model(**labelled())  # in its first forward a model is looked at
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    seen = []
    first = blocks[2].attention.self.query  # the map with its update; the frozen one in it sees each row once
    last = blocks[2].output.dense
    for module in (first, last):
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    for _ in range(2):
        model(**labelled())
    below, above = (seen[0], seen[2]), (seen[1], seen[3])
    assert torch.equal(*below)
    assert torch.equal(*below[0].chunk(2))  # both members read the same
    assert not torch.equal(*above)
    assert all(module.training for module in blocks.modules())


def test_a_prediction_runs_the_trunk_once():
    model = steps(adapted(3), 1.0)
    batch = BERT.batch(4)
    found = predict(model, batch)
    assert found.sample_probabilities.shape == (3, 4, 3)
    assert 1 + 0.4 * 2 < found.num_forwards < 1 + 0.6 * 2  # half of the layers, and the pooler
    with torch.no_grad(), draws(model, 3):
        whole = model(**batch).logits.softmax(-1).unflatten(0, (3, 4))
    torch.testing.assert_close(found.sample_probabilities, whole)


def test_trained_modules_below_leave_no_trunk():
    model = adapted(2).train()
    embedding = model.get_input_embeddings()
    embedding.weight.requires_grad_(True)
    model(**labelled()).loss.backward()
    assert embedding.weight.grad is not None and bool(embedding.weight.grad.any())


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_members": 0}, "num_members must be a positive integer"),
        ({"num_members": 10**6}, "at most"),
        ({"layers": "upper"}, "layers must be one of"),
        ({"layers": 0}, "layers must be one of"),
        ({"layers": 2, "layers_to_transform": [1]}, "layers_to_transform names layers one by one"),
    ],
)
def test_bad_fields(fields, match):
    with pytest.raises(ValueError, match=match):
        EnsembleLoraConfig(target_modules=["query"], **fields)


def test_more_layers_than_there_are():
    with pytest.raises(ValueError, match="layers=9, but the model has 4"):
        adapted(layers=9)


def test_members_that_are_not_there():
    with pytest.raises(ValueError, match="3 draws were asked for, but there are 2"):
        predict(adapted(2), BERT.batch(2), num_samples=3)


def test_a_head_of_members_has_no_weight_of_its_own():
    model = adapted(2)
    head = model.get_base_model().classifier
    with pytest.raises(AttributeError, match="classifier has no weight of its own: the law of 'default' holds one"):
        _ = head.modules_to_save.default.weight
    assert not hasattr(head.modules_to_save.default, "weights")
    assert model.merge_and_unload().classifier.weight.shape == (3, 32)


def test_a_layer_below_is_refused_with_the_way_out():
    names = ["encoder.layer.0.attention.self.query"]
    with pytest.raises(ValueError, match="layers='last_half' leaves out every layer"):
        adapted(target_modules=names)
    assert len(next(laws_of(adapted(target_modules=names, layers="all"))).slots) == 1
    with pytest.raises(ValueError, match=r"No modules were targeted|not found in the base model"):
        adapted(target_modules=["nowhere"])
