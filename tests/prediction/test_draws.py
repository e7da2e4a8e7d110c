"""One draw is one function: in one pass, one at a time, and as an exported LoRA, here and in another process."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, logits
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from stochastic_models import bayesian, curve, random_a

import peft_calib
from peft_calib import (
    BayesianLoraConfig,
    CurveLoraConfig,
    HyperLoraConfig,
    Prediction,
    draws,
    export_lora,
    load_frozen,
    predict,
)
from peft_calib.draws_index import read_draws_index
from peft_calib.files import file_hash
from peft_calib.identity import adapter_digest, folder_digest
from peft_calib.json_files import seal_of
from peft_calib.prediction.adaptive import half_width
from peft_calib.tuners.rows import repeat_rows, select_rows

LAWS = {"bayesian": bayesian, "random_a": random_a, "curve": curve}


def stock_probabilities(base, folder, batch):
    """The model as stock PEFT loads it from an exported folder."""
    return predict(PeftModel.from_pretrained(base, folder), batch, how="mean").probabilities


@pytest.mark.parametrize("law", LAWS)
def test_batched_is_sequential_is_exported(family, law, tmp_path):
    model, batch, K = LAWS[law](family), family.batch(3), 3
    batched = predict(model, batch, num_samples=K, seed=7).sample_probabilities
    one_by_one = predict(model, batch, num_samples=K, seed=7, memory_budget=1).sample_probabilities
    export_lora(model, tmp_path / "draws", num_samples=K, seed=7)
    exported = [stock_probabilities(family.build(), tmp_path / "draws" / f"draw-{k}", batch) for k in range(K)]
    assert (batched[0] - batched[1]).abs().max() > 1e-5  # the draws do differ
    torch.testing.assert_close(one_by_one, batched, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.stack(exported), batched, rtol=0, atol=1e-5)


def test_bf16(family, tmp_path):
    model, batch = bayesian(family, dtype=torch.bfloat16), family.batch(3)
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
    batched = predict(model, batch, num_samples=3).sample_probabilities
    sequential = predict(model, batch, num_samples=3, memory_budget=1).sample_probabilities
    export_lora(model, tmp_path / "draws", num_samples=3)
    base = family.build().bfloat16()
    exported = stock_probabilities(base, tmp_path / "draws" / "draw-0", batch)
    torch.testing.assert_close(sequential, batched, rtol=0, atol=2e-2)
    torch.testing.assert_close(exported, batched[0], rtol=0, atol=2e-2)


def test_draw_is_the_exported_model_in_another_process(bert, tmp_path):
    model, batch = bayesian(bert, task_type="SEQ_CLS"), bert.batch()
    expected = predict(model, batch, num_samples=3, seed=11).sample_probabilities
    bert.build().save_pretrained(tmp_path / "base")
    export_lora(model, tmp_path / "draws", num_samples=3, seed=11)
    model.save_pretrained(tmp_path / "adapter")
    code = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parents[1] / "tuners")!r})
from families import FAMILIES, logits
from peft import PeftModel
from transformers import AutoModelForSequenceClassification as Auto
batch = FAMILIES["bert"].batch()
for k in range(3):
    stock = PeftModel.from_pretrained(Auto.from_pretrained({str(tmp_path / "base")!r}), f"{tmp_path}/draws/draw-{{k}}")
    torch.save(logits(stock, batch).softmax(-1), f"{tmp_path}/{{k}}.pt")
assert "peft_calib" not in sys.modules
import peft_calib
again = PeftModel.from_pretrained(Auto.from_pretrained({str(tmp_path / "base")!r}), {str(tmp_path / "adapter")!r})
torch.save(peft_calib.predict(again, batch, num_samples=3, seed=11).sample_probabilities, f"{tmp_path}/again.pt")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    stock = torch.stack([torch.load(tmp_path / f"{k}.pt") for k in range(3)])
    torch.testing.assert_close(stock, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.load(tmp_path / "again.pt"), expected, rtol=0, atol=1e-6)


def test_antithetic_draws_are_the_same_everywhere(bert, tmp_path):
    model, batch, K = bayesian(bert), bert.batch(3), 4
    options = {"num_samples": K, "seed": 7, "antithetic": True}
    p = predict(model, batch, **options).sample_probabilities
    ordinary = predict(model, batch, num_samples=K, seed=7).sample_probabilities
    torch.testing.assert_close(p[::2], ordinary[::2])
    assert (p[1::2] - ordinary[1::2]).abs().max() > 1e-4
    for how in ({"memory_budget": 1}, {"how": "late"}):
        again = predict(model, batch, **options, **how).sample_probabilities
        torch.testing.assert_close(again, p, rtol=0, atol=1e-5)
    with torch.no_grad(), draws(model, num_samples=K - 1, seed=7, first=1, antithetic=True):
        by_hand = model(**batch).logits.softmax(-1).unflatten(0, (K - 1, 3))
    torch.testing.assert_close(by_hand, p[1:], rtol=0, atol=1e-5)
    export_lora(model, tmp_path / "draws", **options)
    exported = [stock_probabilities(bert.build(), tmp_path / "draws" / f"draw-{k}", batch) for k in range(K)]
    torch.testing.assert_close(torch.stack(exported), p, rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "draws" / "draws.json").read_text())["antithetic"] is True


def test_antithetic_draws_have_a_less_variable_mean(bert):
    """At a small spread a model is nearly linear in the normals, which cancel within a pair."""
    model, batch = bayesian(bert, init_sd=0.05), bert.batch(3)

    def means(antithetic):
        asked = [predict(model, batch, num_samples=2, seed=s, antithetic=antithetic) for s in range(20)]
        return torch.stack([p.probabilities for p in asked]).double()

    assert means(True).var(0).sum() < 0.1 * means(False).var(0).sum()


def test_adaptive_antithetic_draws_stop_earlier(bert):
    model, batch = bayesian(bert, init_sd=0.3), bert.batch(12)
    options = {"num_samples": "auto", "tolerance": 5e-4, "max_samples": 32}
    plain, paired = (predict(model, batch, antithetic=a, **options) for a in (False, True))
    assert paired.average_num_samples < plain.average_num_samples and not (paired.draws_per_row % 2).any()
    fixed = predict(model, batch, num_samples=32, antithetic=True)
    for row in range(12):
        count = int(paired.draws_per_row[row])
        drawn = paired.sample_probabilities[:count, row]
        torch.testing.assert_close(drawn, fixed.sample_probabilities[:count, row], rtol=0, atol=1e-5)
        if count < 32:  # stopped by the interval over pairs
            top = int(paired.predictions[row])
            assert float(half_width(drawn[:, top].double().unflatten(0, (-1, 2)).mean(1))) <= 5e-4


def test_adaptive_draws_are_mirrored_unless_told_otherwise(bert, tmp_path):
    model, batch = bayesian(bert, init_sd=0.3), bert.batch(3)
    options = {"num_samples": "auto", "tolerance": 5e-4}
    default, paired = (predict(model, batch, **options, **asked) for asked in ({}, {"antithetic": True}))
    assert default.antithetic and torch.equal(default.probabilities, paired.probabilities)
    assert not predict(model, batch, **options, antithetic=False).antithetic
    assert not predict(model, batch, **options, max_samples=15).antithetic  # pairs would not come out even
    assert not predict(model, batch, num_samples=4).antithetic
    assert Prediction.load(default.save(tmp_path)).antithetic


@pytest.mark.parametrize("config", [HyperLoraConfig, CurveLoraConfig])
def test_laws_without_mirror_images_refuse_to_mirror(bert, config, tmp_path):
    model = get_peft_model(bert.build(), config(r=2, target_modules=["query"])).eval()
    with pytest.raises(ValueError, match="no mirror image"):
        predict(model, bert.batch(), antithetic=True)
    with pytest.raises(ValueError, match="no mirror image"):
        export_lora(model, tmp_path / "out", num_samples=2, antithetic=True)
    assert not predict(model, bert.batch(), num_samples="auto").antithetic


def test_antithetic_draws_are_refused_where_they_mean_nothing(bert):
    model = bayesian(bert)
    with pytest.raises(ValueError, match="come in pairs"):
        predict(model, bert.batch(), num_samples="auto", max_samples=15, antithetic=True)
    with pytest.raises(ValueError, match="mirror image"):
        predict(model, bert.batch(), dropout=0.1, antithetic=True)


def test_rows_are_draw_major_and_the_batch_may_come_by_position(bert):
    model, batch = bayesian(bert), bert.batch(3)
    expected = predict(model, batch, num_samples=4, seed=2).sample_probabilities
    with torch.no_grad(), draws(model, num_samples=4, seed=2):
        by_name = model(**batch).logits.softmax(-1)
        by_position = model(batch["input_ids"], batch["attention_mask"]).logits.softmax(-1)
    assert by_name.shape == (12, 3)
    torch.testing.assert_close(by_name.unflatten(0, (4, 3)), expected)
    assert torch.equal(by_name, by_position)


def test_first_continues_the_same_draws(bert):
    model, batch = bayesian(bert), bert.batch()
    whole = predict(model, batch, num_samples=5, seed=3).sample_probabilities
    with torch.no_grad(), draws(model, num_samples=2, seed=3, first=3):
        rest = model(**batch).logits.softmax(-1).unflatten(0, (2, -1))
    torch.testing.assert_close(rest, whole[3:], rtol=0, atol=1e-6)
    assert not torch.allclose(whole, predict(model, batch, num_samples=5, seed=4).sample_probabilities)


def test_everything_is_put_back(bert):
    model, batch = bayesian(bert), bert.batch()
    model.train()
    model.base_model.model.classifier.eval()
    modes = [m.training for m in model.modules()]
    before = logits(model, batch)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    with pytest.raises(KeyError, match="inside"), draws(model, num_samples=2):
        raise KeyError("inside")
    predict(model, batch, num_samples=2)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(logits(model, batch), before)


def test_dropout_never_acts(bert):
    model = bayesian(bert, lora_dropout=0.5, overrides={"hidden_dropout_prob": 0.5})
    expected = predict(model, bert.batch(), num_samples=2).sample_probabilities
    assert torch.equal(predict(model.train(), bert.batch(), num_samples=2).sample_probabilities, expected)


def test_global_random_state_is_untouched(bert, tmp_path):
    model = bayesian(bert, lora_dropout=0.5).train()
    before = torch.get_rng_state()
    for how in ("mean", "sample", "late", "linear"):
        predict(model, bert.batch(), how)
    export_lora(model, tmp_path / "draws", num_samples=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_flow_through_draws(bert):
    model = bayesian(bert)
    with draws(model, num_samples=3):
        model(**bert.batch()).logits.square().sum().backward()
    assert all(p.grad is not None for p in model.base_model.get_law().spread_parameters())


def test_native_transformers_adapter(bert):
    base = bert.build()
    base.add_adapter(BayesianLoraConfig(r=4, target_modules=["query"], init_sd=0.5, init="random"))
    p = predict(base, bert.batch(), num_samples=3)
    assert p.sample_probabilities.shape == (3, 2, 3)
    assert p.mutual_information.min() > 0


def test_export_layout(bert, tmp_path):
    model = bayesian(bert)
    path = export_lora(model, tmp_path / "draws", num_samples=2, seed=5)
    assert sorted(p.name for p in path.iterdir()) == ["draw-0", "draw-1", "draws.json", "mean"]
    index = json.loads((path / "draws.json").read_text())
    assert index.pop("digest") == seal_of(index)
    assert index == {
        "num_samples": 2,
        "seed": 5,
        "draws": ["draw-0", "draw-1"],
        "mean": "mean",
        "adapter": adapter_digest(model),
        "digests": {name: folder_digest(path / name) for name in ("draw-0", "draw-1", "mean")},
        "weights": {
            name: file_hash(path / name / "adapter_model.safetensors") for name in ("draw-0", "draw-1", "mean")
        },
    }
    expected = predict(model, bert.batch(), how="mean").probabilities
    torch.testing.assert_close(stock_probabilities(bert.build(), path / "mean", bert.batch()), expected)
    export_lora(model, path, num_samples=1)  # stale draws of the earlier export are gone
    assert sorted(p.name for p in path.iterdir()) == ["draw-0", "draws.json", "mean"]
    with pytest.raises(ValueError, match="no adapter folder"):
        export_lora(model, path)


def test_reordered_draws_are_refused(bert, tmp_path):
    """Weights of draws, and draw k of a seed, would go to another draw."""
    path = export_lora(bayesian(bert), tmp_path / "draws", num_samples=12)
    index = json.loads((path / "draws.json").read_text())
    assert read_draws_index(path)[0] == [f"draw-{k}" for k in range(12)]
    index["draws"][1:3] = reversed(index["draws"][1:3])
    (path / "draws.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"draws\.json: draws is .* in the order in which they were written"):
        load_frozen(bert.build(), path)


def test_export_without_a_mean(bert, tmp_path):
    path = export_lora(random_a(bert, seed=None), tmp_path / "draws", num_samples=2)
    assert not (path / "mean").exists()
    assert json.loads((path / "draws.json").read_text())["mean"] is None


@pytest.mark.parametrize("num_samples", [0, -1, 1.5, True])
def test_bad_number_of_draws(bert, tmp_path, num_samples):
    model = bayesian(bert)
    with pytest.raises(ValueError, match="num_samples must be"):
        predict(model, bert.batch(), num_samples=num_samples)
    with pytest.raises(ValueError, match="num_samples must be"), draws(model, num_samples=num_samples):
        pass
    with pytest.raises(ValueError, match="num_samples must be"):
        export_lora(model, tmp_path, num_samples=num_samples)


@pytest.mark.parametrize("how", ["mean", "sample", "late", "linear"])
def test_adapter_must_be_in_place(bert, how):
    model = bayesian(bert)
    with model.disable_adapter(), pytest.raises(ValueError, match="disabled"):
        predict(model, bert.batch(), how)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        predict(model, bert.batch(), how)
    model.unmerge_adapter()
    predict(model, bert.batch(), how)


def test_bad_input(bert, llama):
    model, batch = bayesian(bert), bert.batch()
    with pytest.raises(ValueError, match="how must be one of"):
        predict(model, batch, how="median")
    with pytest.raises(ValueError, match="no tensor with rows"):
        predict(model, {})
    with pytest.raises(ValueError, match="has no rows"):
        predict(model, {k: v[:0] for k, v in batch.items()})
    with pytest.raises(TypeError, match="mapping"):
        predict(model, batch["input_ids"])
    with pytest.raises(TypeError, match="no adapter of peft_calib"):
        predict(bert.build(), batch)
    stock = get_peft_model(bert.build(), LoraConfig(target_modules=["query"]))
    with pytest.raises(TypeError, match="no adapter of peft_calib"):
        predict(stock, batch)
    prompt = get_peft_model(llama.build(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    for how in ("mean", "sample"):
        with pytest.raises(TypeError, match="prompt-learning"):
            predict(prompt, llama.batch(), how)


def test_two_adapters_only_the_active_one_is_drawn(bert):
    model = bayesian(bert)
    expected = predict(model, bert.batch(), num_samples=2).sample_probabilities
    model.add_adapter("other", BayesianLoraConfig(r=2, target_modules=["query"], init_sd=0.5, init="random"))
    assert torch.equal(predict(model, bert.batch(), num_samples=2).sample_probabilities, expected)
    model.set_adapter("other")
    assert not torch.allclose(predict(model, bert.batch(), num_samples=2).sample_probabilities, expected)


def test_deterministic_law_answers_k_times_the_same(bert):
    model = get_peft_model(bert.build(), HyperLoraConfig(r=4, target_modules=["query"], init_weights=False))
    p = predict(model, bert.batch(), num_samples=3)
    assert torch.equal(p.sample_probabilities[0], p.sample_probabilities[2])
    assert p.mutual_information.max() < 1e-12


def test_repeating_rows():
    batch = {
        "input_ids": torch.arange(6).view(2, 3),
        "position_ids": torch.arange(3)[None],
        "cache_position": torch.arange(2),
        "nested": [torch.tensor([5, 6]), None],
        "flag": True,
    }
    out = repeat_rows(batch, 2, 2)
    assert out["input_ids"].tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]]
    assert out["position_ids"].shape == (1, 3)
    assert out["cache_position"].tolist() == [0, 1]
    assert out["nested"][0].tolist() == [5, 6, 5, 6]
    mrope = {"input_ids": torch.zeros(2, 4), "position_ids": torch.arange(24).view(3, 2, 4)}
    assert repeat_rows(mrope, 3, 2)["position_ids"].shape == (3, 6, 4)
    assert select_rows({"input_ids": batch["input_ids"]}, 2, torch.tensor([1]))["input_ids"].tolist() == [[3, 4, 5]]
    with pytest.raises(ValueError, match="cannot be picked"):
        select_rows({"input_ids": torch.zeros(2, 3), "patches": torch.zeros(7, 3)}, 2, torch.tensor([0]))


def test_filled_cache_is_refused(llama):
    model, batch = bayesian(llama), llama.batch()
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        with draws(model, num_samples=2), pytest.raises(ValueError, match="key-value cache"):
            model(input_ids=batch["input_ids"], past_key_values=cache)


def test_public_names():
    assert peft_calib.predict is predict and peft_calib.draws is draws
    assert set(FAMILIES) == {"bert", "roberta", "gpt2", "llama", "qwen2", "t5", "vit"}


def test_lower_floors_do_not_import_prediction():
    package = Path(peft_calib.__file__).parent
    for file in [*package.glob("tuners/**/*.py"), *package.glob("calibration/**/*.py"), package / "export.py"]:
        assert not re.search(r"^\s*(from|import) .*prediction", file.read_text(), flags=re.MULTILINE), file
