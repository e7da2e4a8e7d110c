"""What is asked of a model: classes, numbers, tokens, and the next token."""

from dataclasses import replace

import pytest
import torch
import transformers as tf
from families import DECODER, ENCODER, FAMILIES, Family, logits, perturb
from peft import get_peft_model
from stochastic_models import bayesian

from peft_calib import (
    BayesianLoraConfig,
    LabelsPrediction,
    RegressionPrediction,
    draws,
    predict,
    predict_dataset,
    score_texts,
)

TOKENS = Family(tf.BertForTokenClassification, tf.BertConfig, ENCODER, ("query", "value"))
CHOICE = Family(tf.BertForMultipleChoice, tf.BertConfig, ENCODER, ("query", "value"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_label_tokens_are_read_at_the_last_token(name, side):
    family = FAMILIES[name]
    model, batch = bayesian(family), family.batch(3)
    if side != "none":
        hidden = slice(None, 2) if side == "left" else slice(-2, None)
        batch["attention_mask"][1, hidden] = 0
    p = predict(model, batch, num_samples=3, label_tokens=[7, 3, 20])
    counted = {"position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)}  # as `generate` does
    with draws(model, num_samples=3), torch.no_grad():
        all_logits = model(**batch, **counted).logits.unflatten(0, (3, 3))
    last = [5, 3 if side == "right" else 5, 5]
    for row in range(3):
        expected = all_logits[:, row, last[row]][:, [7, 3, 20]].softmax(-1)
        torch.testing.assert_close(p.sample_probabilities[:, row], expected, rtol=0, atol=1e-6)
    assert predict(model, batch, num_samples=2).sample_probabilities.shape == (2, 3, 64)  # the whole vocabulary


@pytest.mark.parametrize("side", ["right", "none"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_vocabulary_is_computed_for_one_position(name, side):
    family = FAMILIES[name]
    model, batch = bayesian(family), family.batch(3)
    if side == "right":
        mask = "decoder_attention_mask" if name == "t5" else "attention_mask"
        batch[mask] = torch.ones_like(batch["decoder_input_ids" if name == "t5" else "input_ids"])
        batch[mask][0, -1] = 0
    shapes = []
    model.get_base_model().get_output_embeddings().register_forward_hook(
        lambda module, args, output: shapes.append(tuple(output.shape))
    )
    predict(model, batch, num_samples=4, label_tokens=[1, 2])
    assert shapes == [(12, 1, 64)]


def test_adapted_output_layer(llama):
    model = bayesian(llama, targets=["q_proj", "lm_head"], overrides={"tie_word_embeddings": False})
    batch = llama.batch(3)
    batch["attention_mask"][1, -2:] = 0
    p = predict(model, batch, num_samples=3, label_tokens=[7, 3])
    one = predict(model, batch, num_samples=3, label_tokens=[7, 3], memory_budget=1)
    assert p.mutual_information.min() > 0
    torch.testing.assert_close(p.sample_probabilities, one.sample_probabilities, rtol=0, atol=1e-6)


def test_encoder_decoder_starts_by_itself():
    t5 = FAMILIES["t5"]
    model, batch = bayesian(t5), t5.batch()
    del batch["decoder_input_ids"]
    p = predict(model, batch, num_samples=2, label_tokens=[5, 6])
    given = predict(model, batch | {"decoder_input_ids": torch.zeros(2, 1).long()}, num_samples=2, label_tokens=[5, 6])
    assert torch.equal(p.sample_probabilities, given.sample_probabilities)


def test_texts_as_label_tokens(minilm, llama):
    tokenizer = tf.AutoTokenizer.from_pretrained(minilm)
    model = bayesian(llama, overrides={"vocab_size": len(tokenizer)})
    p = predict(model, llama.batch(), num_samples=2, label_tokens=["yes", "no"], tokenizer=tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["yes", "no"])
    assert torch.equal(p.probabilities, predict(model, llama.batch(), num_samples=2, label_tokens=ids).probabilities)
    with pytest.raises(ValueError, match="3 tokens, not one"):
        predict(model, llama.batch(), label_tokens=["yes", "no yes no"], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="pass tokenizer="):
        predict(model, llama.batch(), label_tokens=["yes", "no"])


@pytest.mark.parametrize("ids", [[3], [3, 3], [3, 64], [-1, 3], []])
def test_bad_label_tokens(llama, ids):
    with pytest.raises(ValueError, match="label_tokens"):
        predict(bayesian(llama), llama.batch(), label_tokens=ids)


def test_label_tokens_need_a_language_model(bert):
    with pytest.raises(ValueError, match="language model"):
        predict(bayesian(bert), bert.batch(), label_tokens=[1, 2])


def test_all_padding_row_is_refused(llama):
    batch = llama.batch(2)
    batch["attention_mask"][1] = 0
    with pytest.raises(ValueError, match="padding only"):
        predict(bayesian(llama), batch)


def test_token_classification():
    model, batch = bayesian(TOKENS), TOKENS.batch(3)
    batch["attention_mask"][1, -2:] = 0
    p = predict(model, batch, num_samples=3)
    assert p.positions.tolist() == batch["attention_mask"].nonzero().tolist()
    with draws(model, num_samples=3), torch.no_grad():
        expected = model(**batch).logits.softmax(-1).unflatten(0, (3, 3))[:, batch["attention_mask"].bool()]
    torch.testing.assert_close(p.sample_probabilities, expected)
    labels = torch.full((3, 6), -100)
    labels[0, 1], labels[2, 4] = 2, 1
    q = predict(model, batch | {"labels": labels}, num_samples=3)
    assert q.positions.tolist() == [[0, 1], [2, 4]]
    assert q.labels.tolist() == [2, 1]
    assert q.to_dataset()["position"][:] == [1, 4]
    late = predict(model, batch | {"labels": labels}, "late", num_samples=3)
    torch.testing.assert_close(late.sample_probabilities, q.sample_probabilities)


def test_token_rows_are_numbered_through():
    from peft_calib import predict_dataset

    model = bayesian(TOKENS)
    data = [{"input_ids": row, "labels": row * 0} for row in TOKENS.batch(5)["input_ids"]]
    p = predict_dataset(model, data, num_samples=2, batch_size=2, progress=False)
    assert p.positions.tolist() == [[row, position] for row in range(5) for position in range(6)]


def test_regression():
    family = Family(tf.BertForSequenceClassification, tf.BertConfig, ENCODER | {"num_labels": 1}, ("query", "value"))
    model, batch = bayesian(family), family.batch(3)
    p = predict(model, batch, num_samples=5)
    assert isinstance(p, RegressionPrediction)
    with draws(model, num_samples=5), torch.no_grad():
        values = model(**batch).logits.unflatten(0, (5, 3))
    torch.testing.assert_close(p.mean, values.mean(0))
    torch.testing.assert_close(p.variance, values.var(0))
    assert p.variance.min() > 0


def test_multiple_choice_model():
    model = bayesian(CHOICE)
    batch = {"input_ids": torch.randint(3, 64, (2, 4, 6), generator=torch.Generator().manual_seed(0))}
    p = predict(model, batch, num_samples=3)
    assert p.sample_probabilities.shape == (3, 2, 4)
    one = predict(model, batch, num_samples=3, memory_budget=1)
    torch.testing.assert_close(p.sample_probabilities, one.sample_probabilities, rtol=0, atol=1e-6)


def test_decoder_with_a_classification_head():
    settings = DECODER | {"num_labels": 3, "pad_token_id": 0}
    family = Family(tf.LlamaForSequenceClassification, tf.LlamaConfig, settings, ("q_proj", "v_proj"))
    model, batch = bayesian(family), family.batch(3)
    p = predict(model, batch, how="mean")
    torch.testing.assert_close(p.probabilities, logits(model, batch).softmax(-1))
    assert p.num_forwards == 1


def test_labels_go_along_and_cost_nothing(bert):
    model, batch = bayesian(bert), bert.batch(3) | {"labels": torch.tensor([0, 1, 2])}
    assert predict(model, batch, num_samples=2).labels.tolist() == [0, 1, 2]


def test_bad_task(bert):
    with pytest.raises(ValueError, match="task must be one of"):
        predict(bayesian(bert), bert.batch(), task="guess")
    with pytest.raises(ValueError, match="no output layer"):
        predict(bayesian(bert), bert.batch(), task="next_token")
    with pytest.raises(ValueError, match="needs logits"):
        predict(bayesian(bert), bert.batch(), task="token")


def test_labels_are_sigmoids_averaged_over_draws(bert):
    model, batch = bayesian(bert, overrides={"problem_type": "multi_label_classification"}), bert.batch(3)
    p = predict(model, batch | {"labels": torch.eye(3)}, num_samples=5)
    assert isinstance(p, LabelsPrediction) and p.labels.shape == (3, 3)
    with draws(model, num_samples=5), torch.no_grad():
        each = model(**batch).logits.unflatten(0, (5, 3)).sigmoid().double()
    torch.testing.assert_close(p.probabilities, each.mean(0).float())
    assert torch.equal(p.predictions, each.mean(0) >= 0.5)
    entropies = torch.stack([each, 1 - each], -1)
    entropies = -(entropies * entropies.log()).sum((-1, -2))
    mean = torch.stack([each.mean(0), 1 - each.mean(0)], -1)
    torch.testing.assert_close(p.entropy, -(mean * mean.log()).sum((-1, -2)), rtol=1e-5, atol=1e-7)
    expected = p.entropy - entropies.mean(0)
    torch.testing.assert_close(p.mutual_information, expected, rtol=1e-3, atol=1e-7)
    batched = predict_dataset(model, [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)],
                              num_samples=5, batch_size=2, progress=False)  # fmt: skip
    torch.testing.assert_close(batched.sample_probabilities, p.sample_probabilities, rtol=0, atol=1e-6)
    some = predict(model, batch, num_samples="auto", tolerance=0.2)
    assert some.draws_per_row is not None and isinstance(some, LabelsPrediction)
    mean_only = predict(model, batch, how="mean")
    torch.testing.assert_close(mean_only.probabilities, logits(model, batch).sigmoid())
    assert predict(model, batch, how="linear", num_samples=3).sample_probabilities.shape == (3, 3, 3)


def test_labels_are_saved_and_read(bert, tmp_path):
    model = bayesian(bert, overrides={"problem_type": "multi_label_classification"})
    p = predict(model, bert.batch(3), num_samples=2)
    p.save(tmp_path / "p")
    again = LabelsPrediction.load(tmp_path / "p")
    assert torch.equal(again.sample_probabilities, p.sample_probabilities)
    assert again.to_dataset().column_names == ["probabilities", "prediction", "entropy", "mutual_information"]
    assert "3 labels" in repr(again) and len(again.select(torch.tensor([1]))) == 1


def padded(rows, left):
    """Rows of tokens as a batch, with padding in front or behind."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for row, tokens in enumerate(rows):
        place = slice(longest - len(tokens), None) if left else slice(len(tokens))
        ids[row, place], mask[row, place] = tokens, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", ["gpt2", "gpt2-classifier", "llama"])
def test_what_stands_beside_a_row_moves_none_of_its_tokens(name):
    """Positions count from a row's first token, as `generate` counts them, not from the place it has in a batch."""
    family = FAMILIES[name.partition("-")[0]]
    if name == "gpt2-classifier":
        family = replace(family, model=tf.GPT2ForSequenceClassification)
    base = family.build(**({"pad_token_id": 0} if "gpt2" in name else {}))
    targets = list(family.targets)
    config = BayesianLoraConfig(r=2, target_modules=targets, init_sd=0.5)
    model = perturb(get_peft_model(base, config), scale=0.3).eval()
    random = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 60, (count,), generator=random) for count in (3, 9, 6)]
    ways = {"sample": {}, "late": {}}
    ways |= {"linear": {"label_tokens": [4, 9, 30]}} if name in ("gpt2", "llama") else {"linear": {}}
    for how, options in ways.items():

        def asked(rows, left=False, how=how, options=options):
            return predict(model, padded(rows, left), how, num_samples=3, **options).sample_probabilities

        alone = torch.cat([asked([tokens]) for tokens in rows], dim=1)
        for left in (True, False):
            torch.testing.assert_close(asked(rows, left), alone, rtol=0, atol=1e-5)
    if name in ("gpt2", "llama"):
        found = []
        for left in (True, False):
            batch = padded(rows, left)
            unasked = batch["attention_mask"].cumsum(-1) * batch["attention_mask"] < 2
            labels = batch["input_ids"].masked_fill(unasked, -100)
            scores = score_texts(model, batch["input_ids"], labels, batch["attention_mask"], num_samples=3)
            found.append(scores.sample_log_probabilities.sum(-1))
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-4)
