"""Fitted to real models of all kinds: what a head says is the same after saving and loading, and in any batch."""

import pytest
import torch
from classifiers import CLASSIFIERS, classifier, rows, vary
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertForTokenClassification

from peft_calib import BayesianLoraConfig, EnsembleLoraConfig, UncertaintyHead
from peft_calib.uncertainty_head import extract_features

SMALL = {"lr": (1e-2,), "epochs": (3,), "alpha": (0.1,), "beta": (0.01,), "folds": 2, "keep_base": False}


def mistaken(model, data, **how) -> list[dict]:
    """Rows whose labels are the model's answers, two in five of them turned."""
    found = extract_features(model, data, **how)
    right = found.predicted.tolist()
    options = found.num_classes
    labels = [(label + (number % 5 < 2)) % options for number, label in enumerate(right)]
    return [row | {"labels": label} for row, label in zip(data, labels, strict=True)]


def fresh_base(family):
    """The base model again, as `classifier` makes it."""
    return classifier(family, adapt=False)


def check_round_trip(model, base, head, data, tmp_path, **how) -> None:
    """Saved beside its adapter and loaded on a fresh base model the head answers what it answered."""
    expected = head.predict(model, data, **how)
    model.save_pretrained(tmp_path)
    head.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    loaded = UncertaintyHead.from_pretrained(tmp_path, model=again)
    for batch_size in (32, 5):
        found = loaded.predict(again, data, batch_size=batch_size, **how)
        assert torch.equal(found.predicted, expected.predicted)
        torch.testing.assert_close(found.error_probability, expected.error_probability, rtol=0, atol=1e-5)
    assert head.stored.deltas is not None
    assert not torch.allclose(expected.uncertainty, expected.base_uncertainty, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_classifier_of_any_family(family, tmp_path):
    model = classifier(family)
    data = mistaken(model, rows(120))
    head = UncertaintyHead.fit(model, None, data, **SMALL)
    assert head.report.num_fit_errors == 48
    check_round_trip(model, fresh_base(family), head, data, tmp_path)


@pytest.mark.parametrize(
    ("config", "options", "starts"),
    [(BayesianLoraConfig, {"init_sd": 0.3}, 1), (EnsembleLoraConfig, {"num_members": 3}, 3)],
    ids=["bayes", "ensemble"],
)
@pytest.mark.parametrize("aggregate", ["bma", "mean_u"])
def test_draws_of_one_adapter(config, options, starts, aggregate, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        fields = {"r": 2, "task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
        model = vary(get_peft_model(fresh_base("bert"), config(**fields, **options))).eval()
    data = mistaken(model, rows(120), num_samples=3, seed=2)
    head = UncertaintyHead.fit(model, None, data, num_samples=3, seed=2, aggregate=aggregate, **SMALL)
    assert len(head.head.starts) == starts
    check_round_trip(model, fresh_base("bert"), head, data, tmp_path)


@pytest.mark.parametrize("aggregate", ["bma", "mean_u"])
def test_at_its_start_the_score_of_draws_is_that_of_their_answers(aggregate):
    """Of the mean of their probabilities, which holds what they disagree on, or the mean of their own scores."""
    model = get_peft_model(
        fresh_base("bert"),
        BayesianLoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query", "value"], init_sd=0.5),
    )
    vary(model).eval()
    data = mistaken(model, rows(120), num_samples=4)
    head = UncertaintyHead.fit(model, None, data, num_samples=4, aggregate=aggregate, **SMALL | {"lr": (1e-9,)})
    p = extract_features(model, data, num_samples=4).logits.double().softmax(-1)
    whole, parts = (torch.special.entr(q).sum(-1) / torch.tensor(3.0).log() for q in (p.mean(0), p))
    expected = whole if aggregate == "bma" else parts.mean(0)
    found = head.predict(model, data)
    torch.testing.assert_close(found.uncertainty, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.base_uncertainty, expected, rtol=0, atol=1e-5)
    assert (whole >= parts.mean(0) - 1e-12).all()  # by Jensen; the difference is the mutual information


def test_answer_tokens_of_a_language_model(tiny_decoder, tmp_path):
    answers = [5, 9, 11, 30]

    def base():
        return tiny_decoder(pad_token_id=1)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = vary(get_peft_model(base(), lora)).eval()
    data = mistaken(model, rows(120, num_labels=4), label_tokens=answers)
    head = UncertaintyHead.fit(model, None, data, label_tokens=answers, **SMALL)
    assert tuple(head.stored.deltas["weight"].shape) == (4, 32)
    check_round_trip(model, base(), head, data, tmp_path)


def test_prompts_with_fewer_options_have_their_own_scale(tiny_decoder):
    """An item of two options that are equally likely is as unsure as can be, and so is one of four."""
    model, answers = tiny_decoder(pad_token_id=1), [5, 9, 11, 30]
    data, counts = rows(120, num_labels=2), [2 + number % 3 for number in range(120)]
    features = extract_features(model, data, label_tokens=answers, options=counts)
    p = features.probabilities
    expected = torch.special.entr(p).sum(-1) / torch.tensor(counts).log()
    head = UncertaintyHead.fit(model, None, data, label_tokens=answers, **SMALL)
    found = head.predict(model, data, options=counts)
    torch.testing.assert_close(found.base_uncertainty, expected.double(), rtol=0, atol=1e-6)
    assert torch.equal(found.predicted, features.predicted)


def test_tokens_of_a_tagger(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}

    def base():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return BertForTokenClassification(BertConfig(vocab_size=50, num_labels=5, **sizes)).eval()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        lora = LoraConfig(r=2, target_modules=["query"], task_type="TOKEN_CLS")
        model = vary(get_peft_model(base(), lora)).eval()
    data = rows(40)
    for number, row in enumerate(data):
        row["labels"] = [(number + t) % 5 if m and t % 2 else -100 for t, m in enumerate(row["attention_mask"])]
    head = UncertaintyHead.fit(model, None, data, **SMALL)
    found = head.predict(model, data)
    assert len(found) == len(found.items) == sum(label != -100 for row in data for label in row["labels"])
    check_round_trip(model, base(), head, data, tmp_path)
