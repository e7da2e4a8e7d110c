"""Options of `LoraConfig`: those that a law has no use for, and those that make a saved LoRA more than its factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from peft import LoraConfig

from ..identity import STARTS_FROM_BASE, start_from_base

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


#: What makes a LoRA's function another than `W + s B A`, as factors alone say it.
_MORE = {
    "use_dora": "DoRA scales the whole weight",
    "lora_bias": "a trained bias beside B",
    "trainable_token_indices": "trained embeddings of tokens",
    "target_parameters": "it adapts parameters that are no linear map",
    "alora_invocation_tokens": "it acts on the tokens behind its invocation only",
    "use_qalora": "its A takes groups of inputs",
    "use_bdlora": "its factors are blocks of larger ones",
    "arrow_config": "it chooses among several LoRAs for each token",
    "kasa_config": "it takes singular values out of W, and has some of its own between A and B",
    "layer_replication": "its base model repeats layers",
}
_CONVERT = (
    "save it once more as a plain LoRA with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
)


def more_than_factors(options: Mapping[str, Any]) -> str | None:
    """What in the options of a saved LoRA makes it more than factors and a scale on the weights of its base model.

    Args:
        options: Fields of a `LoraConfig`, as attributes or as they stand in `adapter_config.json`.

    Returns:
        The option, with the reason; None of a plain LoRA.
    """
    for name, reason in _MORE.items():
        if options.get(name):
            return f"{name}: {reason}"
    if (bias := options.get("bias", "none")) != "none":
        return f"bias={bias!r}: it trains biases of the base model"
    given = options.get("init_lora_weights")
    if (start := start_from_base(given)) is not None:
        way = f"; {_CONVERT}" if STARTS_FROM_BASE[start] else ""
        told = str(given).lower()
        return f"init_lora_weights={told!r}: its factors belong to a W from which their start was taken{way}"
    return None


def check_no_options_of_lora(owner: str, own: Iterable[str], given: Iterable[str]) -> None:
    """Raise `TypeError` for the first argument that is a field of `LoraConfig` and none of this configuration."""
    foreign = {field.name for field in fields(LoraConfig)} - set(own)
    for name in given:
        if name in foreign:
            raise TypeError(f"{owner} takes no {name}: {_INSTEAD.get(name, _DEFAULT)}.")
