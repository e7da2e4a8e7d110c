"""States of tokens for an attention probe, and dropout passes, of a small adapted encoder."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from peft_calib.calibration.scores.selective import error_auroc, rank
from peft_calib.uncertainty_head import FeatureSet, extract_features
from peft_calib.uncertainty_head.baselines import (
    AttentionProbe,
    Bald,
    ProbeTraining,
    SequenceFeatures,
    token_states,
)
from peft_calib.uncertainty_head.baselines.sequences import with_tokens

LENGTHS = (3, 7, 5, 2, 7, 4, 6)


class Pads:
    """Stands in for a tokenizer: pads with 0 at the right."""

    padding_side = "right"

    def pad(self, rows, **_):
        longest = max(len(row["input_ids"]) for row in rows)
        ids = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]
        mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
        found = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        return found | {"labels": torch.tensor([row["label"] for row in rows])}


@pytest.fixture
def model(tiny_classifier):
    config = LoraConfig(
        r=2, target_modules=["query", "value"], modules_to_save=["classifier"], init_lora_weights=False
    )
    return get_peft_model(tiny_classifier(), config).eval()


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 64, (length,), generator=generator).tolist() for length in LENGTHS]
    return Dataset.from_dict({"input_ids": ids, "label": [0, 1, 2, 0, 1, 2, 0]})


OPTIONS = {"batch_size": 3, "collate_fn": Pads().pad}


def hooks_of(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("layer", [-1, 0])
def test_the_states_are_the_hidden_states_without_padding(model, rows, layer):
    hooks = hooks_of(model)
    found = token_states(model, rows, layer=layer, dtype=torch.float32, **OPTIONS)
    assert hooks_of(model) == hooks
    assert torch.equal(found.features, extract_features(model, rows, **OPTIONS).features)
    assert isinstance(found, SequenceFeatures) and found.ends.tolist() == torch.tensor(LENGTHS).cumsum(0).tolist()
    start = 0
    for row, end in zip(rows, found.ends.tolist(), strict=True):
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states
        expected = hidden[-1 if layer == -1 else 1][0]
        torch.testing.assert_close(found.tokens[start:end], expected, atol=1e-5, rtol=1e-5)
        start = end
    picked = found.select(torch.tensor([4, 0]))
    assert picked.ends.tolist() == [7, 10] and torch.equal(picked.tokens[7:], found.tokens[:3])


def test_layers_that_are_not_there_and_several_functions_are_refused(model, rows):
    with pytest.raises(ValueError, match="has 2 blocks, so there is no layer 2"):
        token_states(model, rows, layer=2, **OPTIONS)
    with pytest.raises(ValueError, match="one function and one item a row"):
        token_states(model, rows, num_samples=2, dropout=0.1, **OPTIONS)


def test_an_attention_probe_finds_a_token_that_an_average_drowns():
    """One of many tokens is marked where the prediction is wrong, in a direction of its own."""
    generator = torch.Generator().manual_seed(0)

    def drawn(size: int) -> SequenceFeatures:
        lengths = torch.randint(20, 40, (size,), generator=generator)
        labels = torch.randint(0, 2, (size,), generator=generator)
        ends = lengths.cumsum(0)
        tokens = 0.5 * torch.randn(int(ends[-1]), 8, generator=generator)
        tokens[ends - 1, 0] = 6.0
        tokens[ends - 1, 1] = 2.0 * labels - 1.0
        plain = FeatureSet(torch.zeros(1, size, 1), torch.tensor([1.0, 0.0]).expand(1, size, 2), labels=labels)
        return with_tokens(plain, tokens.half(), ends)

    train, validation, new = drawn(300), drawn(100), drawn(200)
    training = ProbeTraining(learning_rates=(0.02,), epochs=25)
    probe = AttentionProbe(training).fit(train, validation)
    scores = probe.score(new)
    assert error_auroc(rank(scores, new.errors)) > 0.95
    with pytest.raises(ValueError, match="token_states"):
        probe.score(FeatureSet(new.features, new.logits))


def test_dropout_passes_are_functions_that_disagree(model, rows):
    passes = extract_features(model, rows, num_samples=4, dropout=0.3, seed=1, **OPTIONS)
    assert passes.logits.shape == (4, 7, 3)
    other = extract_features(model, rows, num_samples=4, dropout=0.3, seed=2, **OPTIONS)
    assert not torch.allclose(other.logits, passes.logits)
    assert (Bald().fit(passes).score(passes) > 0).all()
