"""HyperLoRA's configuration: presets, and every wrong value refused with a way out."""

import pytest

from peft_calib import HyperLoraConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "rank of 'r' must be a whole number of at least 1"),
        ({"r": 2.5}, "rank of 'r' must be a whole number of at least 1"),
        ({"rank_pattern": {"query": -1}}, "rank of 'query' must be a whole number of at least 1"),
        ({"lora_dropout": 1.0}, "lora_dropout is a probability"),
        ({"layers_pattern": "layers"}, "no effect without layers_to_transform"),
        ({"target_modules": ".*q", "layers_to_transform": 1}, "cannot be combined with target_modules given as a reg"),
        ({"bias": "some"}, "bias must be 'none', 'all' or"),
        ({"hyper_arch": "cnn"}, r"hyper_arch must be one of \('mlp', 'transformer'\), got 'cnn'"),
        ({"embed_mode": "one-hot"}, "embed_mode must be one of"),
        ({"head": "wide"}, "head must be one of"),
        ({"a_mode": "frozen"}, "a_mode must be one of"),
        ({"noise_mode_a": "mul"}, "noise_mode_a must be one of"),
        ({"regenerate": "epoch"}, "regenerate must be one of"),
        ({"gen_dtype": "float16"}, "gen_dtype must be one of"),
        ({"hyper_hidden": [64]}, r"hyper_hidden is \[64\], but must be a whole number"),
        ({"hyper_depth": 0}, "hyper_depth must be a positive integer"),
        ({"hyper_dropout": -0.1}, "hyper_dropout is a probability"),
        ({"noise_alpha": 1.5}, "noise_alpha is a weight"),
        ({"noise_anneal_steps": 0}, "noise_anneal_steps must be a positive integer"),
        ({"hyper_arch": "transformer", "hyper_hidden": 100, "hyper_nhead": 16}, "not divisible by hyper_nhead"),
        ({"noise_mode_b": "multiply"}, "the anchor of a fresh LoRA is 0"),
        ({"noise_mode_a": "add", "noise_mode_b": "add", "noise_alpha": 1.0}, "gives the generator no gradient"),
        ({"task_type": "SEQ"}, "Invalid task type"),
    ],
)
def test_wrong_values_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        HyperLoraConfig(**fields)


def test_defaults_make_no_noise(recwarn):
    HyperLoraConfig()
    assert not recwarn.list


def test_presets_are_the_papers():
    mlp = HyperLoraConfig.paper_mlp("fixed")
    assert (mlp.hyper_hidden, mlp.hyper_depth, mlp.embed_dim, mlp.lora_alpha, mlp.r) == (2048, 3, 128, 8, 8)
    assert (mlp.noise_mode_a, mlp.noise_mode_b, mlp.noise_anneal) == ("replace", "replace", False)
    transformer = HyperLoraConfig.paper_transformer("random", r=4)
    assert (transformer.hyper_hidden, transformer.hyper_depth, transformer.hyper_nhead) == (256, 2, 16)
    assert (transformer.hyper_ffn, transformer.hyper_dropout, transformer.embed_dim) == (2048, 0.1, 64)
    assert (transformer.noise_alpha, transformer.noise_anneal, transformer.authors_horizon) == (0.99, True, False)
    assert (transformer.a_mode, transformer.r, transformer.lora_alpha) == ("random", 4, 16)
