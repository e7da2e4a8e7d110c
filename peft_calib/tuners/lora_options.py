"""Options of `LoraConfig` that a law has no use for: refused by name, with the reason or the name they have here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from peft import LoraConfig

_FIRST = "the start of one pair of factors, which a law makes itself"
_INSTEAD = {
    "use_dora": "DoRA's magnitudes belong to one pair of factors, and a law has many",
    "target_parameters": "a law adapts linear modules; target_parameters is not supported. Train such a parameter "
    "whole, by its module in modules_to_save",
    "init_lora_weights": "it is called init_weights here, True or False",
    "layer_replication": "replicate the layers of the base model first",
    "lora_bias": "bias='all' trains the biases of the base model",
    "alora_invocation_tokens": "a law answers for all tokens of a row alike",
    "loftq_config": f"it is {_FIRST}",
    "eva_config": f"it is {_FIRST}",
    "corda_config": f"it is {_FIRST}",
    "lora_ga_config": f"it is {_FIRST}",
}
_DEFAULT = "it is LoRA's own; train a LoRA, and give it draws with peft_calib.bayesianize"


def check_no_options_of_lora(owner: str, own: Iterable[str], given: Iterable[str]) -> None:
    """Raise `TypeError` for the first argument that is a field of `LoraConfig` and none of this configuration."""
    foreign = {field.name for field in fields(LoraConfig)} - set(own)
    for name in given:
        if name in foreign:
            raise TypeError(f"{owner} takes no {name}: {_INSTEAD.get(name, _DEFAULT)}.")
