"""The layers before the first draw run once, and nothing else changes."""

import pytest
import torch
import transformers as tf
from families import DECODER, ENCODER, FAMILIES, Family, perturb
from peft import get_peft_model
from stochastic_models import bayesian
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from peft_calib import BayesianLoraConfig, CurveLoraConfig, EnsembleLoraConfig, curve_at, draws, predict

DEPTH = {"gpt2": "n_layer", "t5": "num_layers"}
MORE = {
    "gpt2-classifier": Family(
        tf.GPT2ForSequenceClassification,
        tf.GPT2Config,
        FAMILIES["gpt2"].settings | {"pad_token_id": 0, "num_labels": 3},
        ("c_attn", "c_proj"),
    ),
    "llama-classifier": Family(
        tf.LlamaForSequenceClassification,
        tf.LlamaConfig,
        DECODER | {"pad_token_id": 0, "num_labels": 3},
        ("q_proj", "up_proj"),
    ),
    "mistral": Family(tf.MistralForCausalLM, tf.MistralConfig, DECODER, ("q_proj", "v_proj")),
    "qwen3": Family(tf.Qwen3ForCausalLM, tf.Qwen3Config, DECODER | {"head_dim": 8}, ("q_proj", "v_proj")),
    "electra": Family(tf.ElectraForSequenceClassification, tf.ElectraConfig, ENCODER, ("query", "value")),
}


def count_calls(model, batch, **kwargs):
    """Rows seen by each first-level block during a prediction."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            for index, block in enumerate(module):

                def look(_, args, kwargs, key=(name, index)):
                    seen.setdefault(key, []).append(len(args[0] if args else kwargs["hidden_states"]))

                handles.append(block.register_forward_pre_hook(look, with_kwargs=True))
    prediction = predict(model, batch, **kwargs)
    for handle in handles:
        handle.remove()
    return prediction, seen


@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
@pytest.mark.parametrize("rows", [1, 3])
def test_equal_to_sample(name, rows):
    family = (FAMILIES | MORE)[name]
    depth = DEPTH.get(name.partition("-")[0], "num_hidden_layers")
    model = bayesian(family, overrides={depth: 4}, bayesian_layers=[-1])
    batch = family.batch(rows)
    if rows > 1 and "attention_mask" in batch:
        batch["attention_mask"][1, -2:] = 0
        batch["input_ids"][1, -2:] = 0
    late = predict(model, batch, "late", num_samples=5, seed=1)
    sample = predict(model, batch, "sample", num_samples=5, seed=1)
    assert (late.sample_probabilities[0] - late.sample_probabilities[1]).abs().max() > 1e-6
    torch.testing.assert_close(late.sample_probabilities, sample.sample_probabilities, rtol=0, atol=1e-6)
    assert late.num_forwards < (5 if name == "t5" else 4) < 5.5 == sample.num_forwards + 0.5
    # a late pass leaves no trace
    again = predict(model, batch, "sample", num_samples=5, seed=1)
    assert torch.equal(again.sample_probabilities, sample.sample_probabilities)


def met(model, batch):
    """A model whose first pass for several functions is over: in it, one function runs alone, to count rows."""
    predict(model, batch, num_samples=2)
    return model


def test_blocks_below_run_once(bert):
    model = met(bayesian(bert, overrides={"num_hidden_layers": 4}, bayesian_layers=[2, 3]), bert.batch(3))
    _, seen = count_calls(model, bert.batch(3), how="late", num_samples=5)
    layers = [calls for (name, _), calls in seen.items() if name.endswith("encoder.layer")]
    # the lower two see the three rows once; their stand-ins are called with all rows, and do nothing
    assert layers == [[3, 15], [3, 15], [3, 15], [15]]


def test_stand_ins_do_no_work(bert):
    model = met(bayesian(bert, overrides={"num_hidden_layers": 4}, bayesian_layers=[3]), bert.batch(3))
    dense = model.base_model.model.bert.encoder.layer[0].attention.self.query
    rows = []
    dense.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    predict(model, bert.batch(3), "late", num_samples=5)
    assert rows == [3]


def test_layers_to_transform_and_chunks(bert):
    model = bayesian(bert, overrides={"num_hidden_layers": 4}, layers_to_transform=[3], targets=["query", "value"])
    whole = predict(model, bert.batch(3), "late", num_samples=6)
    parts = predict(model, bert.batch(3), "late", num_samples=6, memory_budget=1)
    torch.testing.assert_close(whole.sample_probabilities, parts.sample_probabilities, rtol=0, atol=1e-6)


def test_only_the_pooler_varies(bert):
    model = bayesian(bert, bayesian_modules=["bert.pooler.dense"])
    late = predict(model, bert.batch(3), "late", num_samples=4)
    sample = predict(model, bert.batch(3), num_samples=4)
    torch.testing.assert_close(late.sample_probabilities, sample.sample_probabilities, rtol=0, atol=1e-6)
    assert late.num_forwards < 1.5


@pytest.mark.parametrize("below", ["word_embeddings", "LayerNorm", "position_embeddings", "pooler"])
@pytest.mark.parametrize("law", [EnsembleLoraConfig, CurveLoraConfig])
def test_what_each_draw_has_of_its_own_below_the_layers(bert, law, below):
    """A member, or a point, has its own of each module trained whole, wherever that lies and whatever it reads."""
    own = {"layers": "all"} if law is EnsembleLoraConfig else {"curve_modules_to_save": True}
    fields = {"modules_to_save": ["classifier", below], "layers_to_transform": [3], **own}
    config = law(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_weights=False, **fields)
    model = perturb(get_peft_model(bert.build(num_hidden_layers=4), config), scale=0.3).eval()
    batch, alone = bert.batch(3), []
    with torch.no_grad():
        for k in range(2):
            with curve_at(model, 2.0 * k) if law is CurveLoraConfig else draws(model, 1, first=k):
                alone.append(model(**batch).logits.softmax(-1))
        with draws(model, 2):
            together = model(**batch).logits.softmax(-1).unflatten(0, (2, -1))
    assert (alone[0] - alone[1]).abs().max() > 0.01
    found = [predict(model, batch, how, num_samples=2).sample_probabilities for how in ("sample", "late")]
    for one in (together, *found):
        torch.testing.assert_close(one, torch.stack(alone), rtol=0, atol=1e-6)


def test_decoder_only_posterior_runs_the_encoder_once():
    family = FAMILIES["t5"]
    model = bayesian(family, bayesian_modules=r"decoder\..*")
    late = predict(model, family.batch(2), "late", num_samples=3)
    sample = predict(model, family.batch(2), num_samples=3)
    assert late.num_forwards < 3
    torch.testing.assert_close(late.sample_probabilities, sample.sample_probabilities, rtol=0, atol=1e-6)


def test_a_shared_block_is_refused():
    config = tf.AlbertConfig(**{**ENCODER, "embedding_size": 16, "num_hidden_groups": 1})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = tf.AlbertForSequenceClassification(config).eval()
    adapter = BayesianLoraConfig(
        r=2, target_modules=["query", "pooler"], bayesian_modules=["albert.pooler"], init_sd=0.5
    )
    model = get_peft_model(base, adapter)
    batch = FAMILIES["bert"].batch()
    with pytest.raises(ValueError, match="more than once"):
        predict(model, batch, "late", num_samples=2)
    assert predict(model, batch, num_samples=2).num_samples == 2


def test_one_draw_and_no_prefix(bert):
    model = bayesian(bert)
    late, sample = (predict(model, bert.batch(), how, num_samples=4) for how in ("late", "sample"))
    assert torch.equal(late.sample_probabilities, sample.sample_probabilities)
    assert late.num_forwards == 4
    one = predict(model, bert.batch(), "late", num_samples=1)
    assert one.num_forwards == 1


@pytest.mark.parametrize("vocabulary", [64, 2000])
def test_the_cost_is_that_of_the_multiplications(vocabulary):
    """Counted by torch; the factors, which `num_forwards` leaves out, are counted along, so it is a little less."""
    sizes = {"num_hidden_layers": 6, "vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 128}
    model = bayesian(FAMILIES["llama"], overrides=sizes, bayesian_layers=[-1], r=1)
    batch = {"input_ids": torch.randint(2, 64, (4, 24), generator=torch.Generator().manual_seed(0))}
    met(model, batch)

    def multiplications(how, **options):
        with FlopCounterMode(display=False) as counter:
            prediction = predict(model, batch, how, **options)
        return counter.get_total_flops(), prediction.num_forwards

    one, _ = multiplications("mean")
    late, forwards = multiplications("late", num_samples=8)
    assert forwards == pytest.approx(late / one, rel=0.05)
