"""Answers with their draws and samples: what is scored is what was written, whatever stands beside it in a batch."""

from copy import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from stochastic_models import perturb
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_calib import BayesianLoraConfig, generate_answers, sample_generate, score_texts

PROMPTS = ["a short question", "a question that is longer than the other one is", "and a third"]


@pytest.fixture(scope="module")
def tokenizer(tiny_decoder_folder):
    return AutoTokenizer.from_pretrained(tiny_decoder_folder)


@pytest.fixture(scope="module")
def bayesian(tiny_decoder_folder):
    base = AutoModelForCausalLM.from_pretrained(tiny_decoder_folder)
    config = BayesianLoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_sd=0.5)
    return perturb(get_peft_model(base, config), scale=0.1).eval()


def ask(model, tokenizer, prompts=PROMPTS, **options):
    return generate_answers(
        model, tokenizer, prompts, **{"max_new_tokens": 5, "until": ["."], "progress": False, **options}
    )


def test_each_answer_is_the_models_likeliest_text_with_its_own_probability(bayesian, tokenizer):
    found = ask(bayesian, tokenizer, num_samples=3, seed=7)
    assert len(found) == 3 and {len(texts) for texts in found.samples} == {3}
    for row, prompt in enumerate(PROMPTS):
        ids = tokenizer([prompt], return_tensors="pt")["input_ids"]
        best = bayesian.generate(input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=[10**6])
        answer = best[0, ids.shape[1] :]
        stop = [k for k, token in enumerate(answer.tolist()) if "." in tokenizer.decode([token])]
        answer = answer[: stop[0] + 1] if stop else answer
        assert found.answers[row] == tokenizer.decode(answer, skip_special_tokens=True).partition(".")[0].strip()
        whole = torch.cat([ids[0], answer])[None]
        labels = torch.where(torch.arange(whole.shape[1]) < ids.shape[1], -100, whole)
        alone = score_texts(bayesian, whole, labels, num_samples=3, seed=7)
        kept = found.scored.mask[row]
        assert int(kept.sum()) == len(answer)
        torch.testing.assert_close(
            found.scored.sample_log_probabilities[:, row][:, kept],
            alone.sample_log_probabilities[:, 0, -len(answer) :],
            atol=1e-4,
            rtol=1e-4,
        )
    scores = found.scores()
    assert scores.num_rows == 3 and (scores["mean_mutual_information"] > 0).any()
    assert found.records()[1]["prompt"] == PROMPTS[1] and found.records()[1]["answer"] == found.answers[1]
    assert "3 answers with 3 samples each" in repr(found)


def test_settings_that_a_model_brings_along_bend_no_answer(bayesian, tokenizer):
    own = bayesian.get_base_model().generation_config
    before, plain = copy(own), ask(bayesian, tokenizer, num_samples=2, seed=1)
    bent = {
        "num_beams": 2,
        "repetition_penalty": 30.0,
        "no_repeat_ngram_size": 1,
        "min_new_tokens": 5,
        "typical_p": 0.2,
    }
    try:
        for name, value in bent.items():
            setattr(own, name, value)
        found = ask(bayesian, tokenizer, num_samples=2, seed=1)
    finally:
        bayesian.get_base_model().generation_config = before
    assert found.answers == plain.answers and found.samples == plain.samples


def test_equal_arguments_give_equal_answers_and_no_state_is_touched(bayesian, tokenizer):
    tokenizer.padding_side = "right"
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second = (ask(bayesian, tokenizer, num_samples=2, seed=1, batch_size=2) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before) and tokenizer.padding_side == "right"
    assert first.samples == second.samples and first.answers == second.answers
    assert torch.equal(first.sample_log_probabilities, second.sample_log_probabilities)
    other = ask(bayesian, tokenizer, num_samples=2, seed=2, batch_size=2)
    assert other.samples != first.samples and other.answers == first.answers
    # batches draw their tokens anew: the same prompt twice is not sampled twice alike
    again = ask(bayesian, tokenizer, [PROMPTS[0], PROMPTS[0]], num_samples=8, batch_size=1, temperature=2.0)
    assert again.samples[0] != again.samples[1] and again.answers[0] == again.answers[1]


def test_batches_change_answers_and_their_scores_only_by_rounding(bayesian, tokenizer):
    together, alone = (ask(bayesian, tokenizer, num_samples=2, batch_size=size) for size in (3, 1))
    assert together.answers == alone.answers
    for name in ("mean_log_probability", "mean_entropy", "mean_mutual_information", "sum_log_probability"):
        assert together.scores()[name] == pytest.approx(alone.scores()[name], abs=1e-4)


def test_a_stock_lora_and_a_model_without_adapter_are_one_function(tiny_decoder_folder, tokenizer):
    base = AutoModelForCausalLM.from_pretrained(tiny_decoder_folder).eval()
    plain = ask(base, tokenizer, num_samples=4)
    stock = ask(get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])), tokenizer)
    assert plain.answers == stock.answers and len(stock.samples[0]) == 8
    assert plain.scored.sample_log_probabilities.shape[0] == 1
    assert (plain.scores()["mean_mutual_information"] == 0).all()
    assert max(len(set(texts)) for texts in plain.samples) > 1
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long)}
    assert sample_generate(base, batch, 3, how="mean", do_sample=True, max_new_tokens=2).sequences.shape == (3, 2, 2)
    with pytest.raises(TypeError):
        ask(base, tokenizer, how="sample")


def test_what_is_wrong_is_said_first(bayesian, tokenizer):
    for prompts, told in (
        ("one text", "prompts is a list"),
        ([], "no prompt was given"),
        (["a", " "], "Prompt 1 is ' '"),
    ):
        with pytest.raises(ValueError, match=told):
            ask(bayesian, tokenizer, prompts)
    for options, told in (
        ({"until": ["ab"]}, "until is a list of texts of one character"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"num_samples": 0}, "num_samples must be a whole number of at least 1"),
        ({"batch_size": True}, "batch_size must be a whole number"),
        ({"how": "late"}, 'how must be "sample" or "mean"'),
    ):
        with pytest.raises(ValueError, match=told):
            ask(bayesian, tokenizer, **options)


def test_the_page_runs_as_printed(bayesian, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "generated-text.md").read_text()
    code = page.split("```python\n")[1].partition("```")[0]
    code = code.replace(
        "num_samples=8, max_new_tokens=16", "num_samples=2, max_new_tokens=2, batch_size=64, progress=False"
    )
    code = code.replace("right[rest])", "right[rest], confidence_level=None)")
    asked = [f"{word} {other} {third}" for word in "abcde" for other in "fghijk" for third in "lmnop"]
    found = ask(bayesian, tokenizer, asked, num_samples=2, max_new_tokens=2, until=["\n"], batch_size=64)
    sure = found.scores()["sum_log_probability"]
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(0)).tolist()
    right = [found.answers[row] if sure[row] > sorted(sure)[50] else "another" for row in order]
    exec(
        code,
        {"model": bayesian, "tokenizer": tokenizer, "prompts": [asked[row] for row in order], "references": right},
    )
    assert "cross-fitted NLL" in capsys.readouterr().out and (tmp_path / "p_correct.json").is_file()
