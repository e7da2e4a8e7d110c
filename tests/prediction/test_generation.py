"""Texts written by one draw each, and what all draws say about a text."""

import pytest
import torch
from families import FAMILIES
from peft import PeftModel
from scipy.stats import entropy
from stochastic_models import bayesian
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from peft_calib import draws, export_lora, sample_generate, score_texts


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_each_text_is_that_of_the_exported_draw(name, tmp_path):
    family = FAMILIES[name]
    model, batch = bayesian(family), family.batch(2)
    batch.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts = sample_generate(model, batch, num_samples=3, seed=6, **options)
    export_lora(model, tmp_path / "draws", num_samples=3, seed=6)
    for k in range(3):
        stock = PeftModel.from_pretrained(family.build(), tmp_path / "draws" / f"draw-{k}").eval()
        expected = stock.generate(**batch, **options)[:, -5:]
        assert torch.equal(texts.sequences[k], expected)
    assert texts.sequences.shape == (3, 2, 5)
    assert (texts.log_probabilities < 0).all()
    assert texts.mask.all()


def test_log_probability_is_that_of_the_writing_draw(llama):
    model, batch = bayesian(llama), llama.batch(2)
    texts = sample_generate(model, batch, num_samples=3, max_new_tokens=4, do_sample=False, eos_token_id=None)
    for k in range(3):
        ids = torch.cat([batch["input_ids"], texts.sequences[k]], dim=1)
        with torch.no_grad(), draws(model, num_samples=1, first=k):
            log_p = model(input_ids=ids).logits[:, 5:-1].log_softmax(-1)
        expected = log_p.gather(-1, texts.sequences[k].unsqueeze(-1)).sum((1, 2))
        torch.testing.assert_close(texts.log_probabilities[k], expected, rtol=0, atol=1e-4)


def test_sampling_is_keyed_and_leaves_the_random_state(llama):
    model, batch = bayesian(llama), llama.batch(2)
    options = {"num_samples": 4, "max_new_tokens": 6, "do_sample": True}
    state = torch.get_rng_state()
    first, again = sample_generate(model, batch, seed=1, **options), sample_generate(model, batch, seed=1, **options)
    assert torch.equal(first.sequences, again.sequences)
    assert not torch.equal(first.sequences, sample_generate(model, batch, seed=2, **options).sequences)
    assert torch.equal(torch.get_rng_state(), state)


def test_text_ends_at_the_end_token(llama):
    model, batch = bayesian(llama), llama.batch(2)
    free = sample_generate(model, batch, num_samples=2, max_new_tokens=6, do_sample=False, eos_token_id=None)
    end = int(free.sequences[0, 0, 2])
    texts = sample_generate(
        model, batch, num_samples=2, max_new_tokens=6, do_sample=False, eos_token_id=end, pad_token_id=0
    )
    first_end = (free.sequences[0, 0] == end).nonzero()[0].item()
    assert texts.mask[0, 0].tolist()[: first_end + 2] == [True] * (first_end + 1) + [False]


def test_a_generation_config_is_keyed_and_ends_texts(llama):
    """What stands in `generation_config=` counts as the same arguments do."""
    model, batch = bayesian(llama), llama.batch(2)
    options = {"do_sample": True, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": list(range(1, 20))}
    state = torch.get_rng_state()
    said = sample_generate(model, batch, 4, seed=1, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(77)
        config = GenerationConfig(**options)
        written = sample_generate(model, batch, 4, seed=1, generation_config=config)
    assert torch.equal(torch.get_rng_state(), state) and config.to_dict() == GenerationConfig(**options).to_dict()
    assert not said.mask.all() and torch.equal(said.mask, written.mask)
    assert torch.equal(said.sequences, written.sequences)
    assert torch.equal(said.log_probabilities, written.log_probabilities)
    for name in ("num_beams", "num_return_sequences"):
        with pytest.raises(ValueError, match=f"so {name} must be 1"):
            sample_generate(model, batch, 2, generation_config=GenerationConfig(**{**options, name: 3}))
        own = model.get_base_model().generation_config
        setattr(own, name, 3)
        with pytest.raises(ValueError, match=f"so {name} must be 1"):
            sample_generate(model, batch, 2, **options)
        setattr(own, name, 1)


def test_a_text_ends_where_another_criterion_stops_it(llama):
    """What stands behind it is no token of the text, and has no part in its probability."""

    class Third(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] % 3 == 0

    model, batch = bayesian(llama), llama.batch(2)
    options = {"do_sample": True, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
    texts = sample_generate(model, batch, 4, seed=1, stopping_criteria=StoppingCriteriaList([Third()]), **options)
    same = sample_generate(model, batch, 4, seed=1, **{**options, "eos_token_id": list(range(0, 64, 3))})
    assert not texts.mask.all() and torch.equal(texts.mask, same.mask)
    assert torch.equal(texts.sequences[texts.mask], same.sequences[same.mask])
    torch.testing.assert_close(texts.log_probabilities, same.log_probabilities, rtol=0, atol=1e-5)


def test_agreement(llama):
    from peft_calib.prediction.texts import GeneratedSamples

    sequences = torch.tensor([[[1, 2]], [[1, 2]], [[1, 3]], [[4, 4]]])
    mask = torch.ones_like(sequences, dtype=torch.bool)
    assert GeneratedSamples(sequences, torch.zeros(4, 1), mask).agreement.tolist() == [0.5]


def test_scores_of_a_text(llama):
    model, ids = bayesian(llama), llama.batch(3)["input_ids"]
    labels = ids.clone()
    labels[:, :3] = -100
    s = score_texts(model, ids, labels, num_samples=5, seed=2)
    with torch.no_grad(), draws(model, num_samples=5, seed=2):
        p = model(input_ids=ids).logits.double().softmax(-1).unflatten(0, (5, 3))[:, :, :-1]
    kept = labels[:, 1:] != -100
    of_token = p.gather(-1, ids[:, 1:].expand(5, -1, -1).unsqueeze(-1)).squeeze(-1)
    expected = {
        "entropy": torch.tensor(entropy(p.mean(0).numpy(), axis=-1)),
        "mutual_information": torch.tensor(entropy(p.mean(0).numpy(), axis=-1) - entropy(p.numpy(), axis=-1).mean(0)),
        "log_probabilities": of_token.mean(0).log(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(s, name).double()[kept], value[kept], rtol=0, atol=2e-6)
        assert getattr(s, name)[~kept].abs().max() == 0
    of_text = torch.where(kept, of_token, 1).prod(-1).mean(0).log()
    torch.testing.assert_close(s.sequence_log_probabilities.double(), of_text, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        s.confidence.double(), (expected["log_probabilities"] * kept).sum(-1).div(3).exp(), rtol=0, atol=1e-5
    )
    assert s.mutual_information.max() > 1e-5


def test_bad_input(llama, bert):
    model, batch = bayesian(llama), llama.batch()
    with pytest.raises(ValueError, match="num_beams"):
        sample_generate(model, batch, num_beams=2)
    with pytest.raises(ValueError, match="num_samples"):
        sample_generate(model, batch, num_samples=0)
    with pytest.raises(TypeError, match="generate"):
        sample_generate(bayesian(bert), bert.batch())
    with pytest.raises(ValueError, match="differ in shape"):
        score_texts(model, batch["input_ids"], batch["input_ids"][:, 1:])
    t5 = FAMILIES["t5"]
    with pytest.raises(ValueError, match="encoder-decoder"):
        score_texts(bayesian(t5), t5.batch()["input_ids"], t5.batch()["input_ids"])
