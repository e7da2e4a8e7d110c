"""A model that answers with NaN or infinity: nobody is handed class 0 for it."""

import pytest
import torch
from datasets import Dataset
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from stochastic_models import bayesian

from peft_calib import Prediction, predict, predict_dataset, score_texts
from peft_calib.prediction import sample_generate
from peft_calib.prediction.result import NotFiniteError, RegressionPrediction

BERT, LLAMA = FAMILIES["bert"], FAMILIES["llama"]
HOWS = [{"how": "mean"}, {"num_samples": 3}, {"how": "late", "num_samples": 3}, {"how": "linear", "num_samples": 2}]
HOWS += [{"num_samples": "auto", "max_samples": 8}]


def spoil(model, value, rows=slice(1, None, 4), root=None):
    """Let the logits of some rows be spoilt, as an overflow would."""

    def hook(module, args, output):
        logits = output.logits.clone()
        logits[rows] = value
        output.logits = logits
        return output

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.register_forward_hook(hook)
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("options", HOWS, ids=str)
def test_every_way_to_predict_tells(options, value):
    model, batch = spoil(bayesian(BERT), value), BERT.batch(4)
    with pytest.raises(ValueError, match=r"not finite .* for 1 of 4 items \(1\)"):
        predict(model, batch, **options)


def test_one_draw_of_one_row_is_enough():
    model = spoil(bayesian(BERT), float("nan"), rows=slice(6, 7))
    with pytest.raises(NotFiniteError, match=r"1 of 4 items \(2\), in 1 of 3 draws \(1\).*bfloat16") as caught:
        predict(model, BERT.batch(4), num_samples=3)
    assert caught.value.wrong.nonzero().tolist() == [[1, 2]]


def test_a_class_that_is_ruled_out_is_no_fault():
    model = bayesian(BERT)
    model.get_base_model().classifier.register_forward_hook(
        lambda *args: torch.cat([args[2][:, :2], torch.full_like(args[2][:, :1], float("-inf"))], 1)
    )
    found = predict(model, BERT.batch(4), num_samples=2)
    assert (found.probabilities[:, 2] == 0).all() and torch.isfinite(found.entropy).all()


def test_data_sets_name_batches_and_rows():
    model = spoil(bayesian(BERT), float("nan"))
    data = Dataset.from_dict({"input_ids": BERT.batch(6)["input_ids"].tolist()})
    with pytest.raises(
        ValueError, match=r"2 of 6 items in 2 batches of 6 rows in all \(batch: items in it; 0: \[1\], 1"
    ):
        predict_dataset(model, data, num_samples=1, batch_size=3, progress=False)


def test_baselines_and_regression():
    stock = spoil(get_peft_model(BERT.build(), LoraConfig(r=2, target_modules=["query"])), float("nan"))
    for options in ({"dropout": 0.5, "num_samples": 2}, {"adapter_names": ["default"]}, {"how": "mean"}):
        with pytest.raises(ValueError, match="not finite"):
            predict(stock, BERT.batch(4), **options)
    one = spoil(bayesian(BERT, overrides={"num_labels": 1}), float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        predict(one, BERT.batch(4), num_samples=2)


def test_texts():
    model, ids = bayesian(LLAMA), LLAMA.batch(2)["input_ids"]
    labels = ids.clone()
    labels[:, :3] = -100
    good = score_texts(model, ids, labels, num_samples=2)
    head = model.get_base_model().lm_head

    def spoilt(position):
        def hook(_, __, output):
            output = output.clone()
            output[1, position] = float("nan")
            return output

        return head.register_forward_hook(hook)

    handle = spoilt(0)  # a position that is not scored
    assert torch.equal(score_texts(model, ids, labels, num_samples=2).entropy, good.entropy)
    handle.remove()
    spoilt(-2)
    with pytest.raises(ValueError, match=r"1 of 2 items \(texts\) \(1\)"):
        score_texts(model, ids, labels, num_samples=2)
    with pytest.raises(ValueError, match="not finite"):
        spoil_generation(bayesian(LLAMA))


def spoil_generation(model):
    model.get_base_model().lm_head.register_forward_hook(lambda *args: args[2] * float("nan"))
    return sample_generate(model, LLAMA.batch(2), num_samples=2, max_new_tokens=2)


def test_results_hold_no_such_numbers_however_they_are_made():
    nan = float("nan")
    for samples in ([[[0.5, 0.5]], [[nan, nan]]], [[[nan, nan]]]):
        with pytest.raises(ValueError, match="not finite"):
            Prediction(sample_probabilities=torch.tensor(samples), num_forwards=1)
    with pytest.raises(ValueError, match="not finite"):
        RegressionPrediction(sample_values=torch.tensor([[[nan]]]), num_forwards=1)
    adaptive = torch.tensor([[[0.5, 0.5]], [[nan, nan]]])
    made = Prediction(sample_probabilities=adaptive, num_forwards=1, draws_per_row=torch.tensor([1]))
    assert made.probabilities.tolist() == [[0.5, 0.5]]
    with pytest.raises(ValueError, match="not finite"):
        Prediction(sample_probabilities=adaptive, num_forwards=1, draws_per_row=torch.tensor([2]))


# ----------------------------------------------------------------- what results and messages look like


def test_results_are_shown_in_a_line():
    found = predict(bayesian(BERT), BERT.batch(4), num_samples=3, seed=5)
    assert repr(found).startswith("Prediction(3 draws of 4 items, how='sample', seed=5, cost of 3 forwards, 3 classes")
    assert "tensor" not in repr(found) and "\n" not in repr(found)
    values = RegressionPrediction(sample_values=torch.zeros(2, 3, 1), num_forwards=2)
    assert repr(values) == "RegressionPrediction(2 draws of 3 items, how='sample', seed=None, cost of 2 forwards)"


def test_generated_texts_are_shown_and_decoded(minilm):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    model = bayesian(LLAMA)
    samples = sample_generate(model, LLAMA.batch(2), num_samples=3, max_new_tokens=4)
    assert repr(samples).startswith("GeneratedSamples(3 draws of 2 prompts, up to 4 tokens, mean agreement")
    texts = samples.texts(tokenizer)
    assert [len(of_prompt) for of_prompt in texts] == [3, 3]
    kept = samples.sequences[1, 0][samples.mask[1, 0]].tolist()
    assert texts[0][1] == tokenizer.decode(kept, skip_special_tokens=True)
    scores = score_texts(model, *[LLAMA.batch(2)["input_ids"]] * 2, num_samples=2)
    assert repr(scores).startswith("TextScores(2 draws, 2 texts, mean confidence")


def test_texts_and_rows_of_different_length_are_named():
    model = bayesian(BERT)
    for batch in (["a great film"], "a great film", ("a", "b")):
        with pytest.raises(TypeError, match="Tokenise texts first"):
            predict(model, batch)
    data = Dataset.from_dict({"input_ids": [[5, 6, 7], [5, 6]], "label": [0, 1]})
    with pytest.raises(ValueError, match=r"different lengths in 'input_ids' \(\[2, 3\]\).*processing_class="):
        predict_dataset(model, data, num_samples=1, progress=False)
    assert len(predict_dataset(model, data, num_samples=1, batch_size=1, progress=False)) == 2
