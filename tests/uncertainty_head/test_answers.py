"""Answer tokens of a language model: the rows of its output layer are the head."""

import pytest
import torch
from classifiers import vary
from peft import LoraConfig, get_peft_model

import peft_calib
from peft_calib import BayesianLoraConfig, EnsembleLoraConfig
from peft_calib.uncertainty_head import UncertaintyHead, copy_head, extract_features

ANSWERS = [5, 9, 11, 30]


@pytest.fixture
def decoder(tiny_decoder):
    def build(config=LoraConfig, seed=0, bias=False, **fields):
        model = tiny_decoder(pad_token_id=1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if bias:
                model.set_output_embeddings(torch.nn.Linear(32, 64))
            fields = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | fields
            return vary(get_peft_model(model, config(**fields))).eval()

    return build


def prompts(count=10, left=False):
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(count):
        ids = torch.randint(3, 60, (3 + number % 4,), generator=generator).tolist()
        pad, mask = [1] * (7 - len(ids)), [1] * len(ids)
        rows = (pad + ids, [0] * len(pad) + mask) if left else (ids + pad, mask + [0] * len(pad))
        found.append({"input_ids": rows[0], "attention_mask": rows[1], "labels": number % 4})
    return found


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_rows_of_the_answer_tokens_are_copied(decoder, left, bias):
    model, data = decoder(bias=bias), prompts(left=left)
    found = extract_features(model, data, label_tokens=ANSWERS, batch_size=4)
    expected = peft_calib.predict_dataset(model, data, "mean", label_tokens=ANSWERS, batch_size=4, progress=False)
    assert torch.allclose(found.probabilities.float(), expected.probabilities, atol=1e-6)
    copied = copy_head(model, label_tokens=ANSWERS)
    output = model.get_output_embeddings()
    assert torch.equal(copied.starts[0]["weight"], output.weight[ANSWERS])
    assert sum(value.numel() for value in copied.parameters()) == len(ANSWERS) * (32 + bias)
    assert torch.allclose(copied(found.features), found.logits, atol=1e-5)


@pytest.mark.parametrize("fields", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}])
@pytest.mark.parametrize(
    ("config", "draws"), [(LoraConfig, 1), (BayesianLoraConfig, 3), (EnsembleLoraConfig, 3)], ids=str
)
def test_an_output_layer_that_the_adapter_changes(decoder, config, draws, fields):
    own = {"num_members": 3} if config is EnsembleLoraConfig else {}
    model, ways = decoder(config, **fields, **own), {"label_tokens": ANSWERS, "num_samples": draws}
    found, copied = extract_features(model, prompts(), **ways), copy_head(model, **ways)
    assert found.logits.shape == (draws, 10, 4)
    assert torch.allclose(copied(found.features), found.logits, atol=1e-4)


def test_texts_are_answers_where_a_tokenizer_reads_them(decoder, minilm):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    model, data = decoder(), prompts(3)
    with pytest.raises(ValueError, match="pass tokenizer="):
        extract_features(model, data, label_tokens=["a", "b"])
    with pytest.raises(ValueError, match="not all in the vocabulary"):
        extract_features(model, data, label_tokens=["a", "b"], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="two different tokens"):
        extract_features(model, data, label_tokens=[5, 5])
    with pytest.raises(ValueError, match="Say which tokens answer its prompts"):
        extract_features(model, data)


# ------------------------------------------------------------------------------------------ prompts with fewer options


def test_an_option_that_a_prompt_does_not_have_has_no_probability(decoder):
    model, data = decoder(), prompts()
    counts = [2 + number % 3 for number in range(10)]
    for row, count in zip(data, counts, strict=True):
        row["labels"] %= count
    found = extract_features(model, data, label_tokens=ANSWERS, options=counts)
    whole = extract_features(model, data, label_tokens=ANSWERS)
    for item, count in enumerate(counts):
        expected = whole.logits[0, item, :count].double().softmax(-1)
        assert torch.allclose(found.probabilities[item, :count], expected)
        assert (found.probabilities[item, count:] == 0).all()
    masked = extract_features(model, data, label_tokens=ANSWERS, options=found.options)
    assert torch.equal(masked.options, found.options) and (masked.hashes == found.hashes).all()
    assert (found.predicted < torch.tensor(counts)).all()


def test_options_that_cannot_be_are_refused(decoder):
    model, data = decoder(), prompts(4)
    with pytest.raises(ValueError, match=r"The label of item 3, 3, is not among its options"):
        extract_features(model, data, label_tokens=ANSWERS, options=[4, 4, 4, 3])
    with pytest.raises(ValueError, match="Item 1 has fewer than two options"):
        extract_features(model, data, label_tokens=ANSWERS, options=[4, 1, 4, 4])
    with pytest.raises(ValueError, match=r"a bool mask \(4, 4\)"):
        extract_features(model, data, label_tokens=ANSWERS, options=[4, 4])
    assert extract_features(model, data, label_tokens=ANSWERS, options=[4, 4, 4, 4]).options is None


def test_token_ids_are_no_class_ids(decoder):
    """Rows as they are trained on have the ids of the answer among their labels, which say nothing of classes."""
    model = decoder()
    data = [row | {"labels": [-100] * 6 + [ANSWERS[row["labels"]]]} for row in prompts(left=True)]
    for given in (data, [{name: value for name, value in row.items() if name != "labels"} for row in data]):
        with pytest.raises(ValueError, match=r"which of the 4 label tokens is its answer, 0 ... 3, and not the ids"):
            UncertaintyHead.fit(model, None, given, label_tokens=ANSWERS)
