"""What is put into the parametrisation lists of PEFT's suites for a given method, and which tests are left out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig

sys.path.append(str(Path(__file__).parents[1] / "contract"))
from differences import DIFFERENCES

#: Arguments without which a method's configuration makes no sense in these suites.
NEEDED: dict[str, dict[str, Any]] = {
    "HYPERLORA": {},
    "BAYESIANLORA": {"num_train_examples": 1000},
    "CURVELORA": {},
    "ENSEMBLELORA": {"layers": "all"},
}

#: Test function (or a part of its id): where it stands in `tests/contract/differences.py`.
_LEFT_OUT: dict[str, str] = {
    "test_save_pretrained_pickle": "pickled weights",
    "test_save_pretrained_selected_adapters_pickle": "pickled weights",
}
#: Test function (or a part of its id): the reason why it cannot apply.
DESELECTED = {part: f"to {(d := DIFFERENCES[name]).what}: {d.ours}, for {d.why}" for part, name in _LEFT_OUT.items()}

_CASES = [
    ("MLP", {"target_modules": "lin0"}),
    ("MLP", {"target_modules": ["lin0"]}),
    ("MLP", {"target_modules": ["lin1"]}),
    ("MLP", {"target_modules": ["lin0", "lin1"]}),
    # upstream takes SGD steps of 0.5 on inputs up to 90 and lowers them by class name where that is too much; with
    # another layer trained whole, a small lora_alpha keeps our gradients alive through it
    ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "lora_alpha": 0.1}),
    ("MLP", {"target_modules": ["lin0", "lin1"], "r": 4, "lora_dropout": 0.1, "use_rslora": True}),
    ("EmbConv1D", {"target_modules": ["conv1d"]}),
    ("Conv2d", {"target_modules": ["lin0"]}),
]

# the same trouble with the size of upstream's steps: PEFT lowers them for nine methods of its own
_GENTLER = {"BayesianLora": {5: {"lora_alpha": 1.0}}}

_TWO_ADAPTERS = {
    "same": ({"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    "different": ({"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
    "overlapping": ({"target_modules": ["lin0"]}, {"target_modules": ["lin0", "lin1"], "r": 4}),
}


def with_needed(config_cls: type[PeftConfig], **extra: Any) -> type[PeftConfig]:
    """One of our configurations with what these suites need as defaults: some tests build it of its targets alone."""
    needed = {**NEEDED.get(config_cls.__name__.removesuffix("Config").upper(), {}), **extra}
    fields = [(name, Any, field(default=value)) for name, value in needed.items()]
    return make_dataclass(config_cls.__name__, fields, bases=(config_cls,)) if needed else config_cls


def lists_for(config_cls: type[PeftConfig], **extra: Any) -> dict[str, dict[str, list]]:
    """The lists for one of our methods.

    Args:
        config_cls: Its configuration class.
        extra: Arguments added to each case, to run the suites on another variant of the method.

    Returns:
        Test module name, then list name, then the rows that replace upstream's.
    """
    name = config_cls.__name__.removesuffix("Config")
    needed = {**NEEDED.get(name.upper(), {}), **extra}

    def transformer(task_type: str) -> list:
        return [(config_cls, {"task_type": task_type, "target_modules": None, **needed})]

    custom = [
        (f"{model} {i} {name}", model, config_cls, {**kwargs, **_GENTLER.get(name, {}).get(i, {}), **needed})
        for i, (model, kwargs) in enumerate(_CASES)
    ]
    pairs = [
        (
            f"{name} {kind}",
            name.lower(),
            config_cls,
            *({**k, "init_weights": False, **needed} for k in pair),
        )
        for kind, pair in _TWO_ADAPTERS.items()
    ]
    mixed = [(name, *(config_cls(target_modules=["lin0"], r=r, init_weights=False, **needed) for r in (8, 16)))]
    return {
        "test_config": {
            "ALL_CONFIG_CLASSES": [(config_cls, needed)],
            "LAYER_INDEXING_CONFIG_CLASSES": [(config_cls, needed)],
        },
        "test_custom_models": {
            "TEST_CASES": custom,
            "ALL_PEFT_CONFIG_CLASSES": [with_needed(config_cls, **extra)],
            "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": pairs,
            "MIXED_ADAPTER_TEST_CASES": mixed,
        },
        "test_decoder_models": {"ALL_CONFIGS": transformer("CAUSAL_LM")},
        "test_encoder_decoder_models": {"ALL_CONFIGS": transformer("SEQ_2_SEQ_LM")},
        "test_feature_extraction_models": {"ALL_CONFIGS": transformer("FEATURE_EXTRACTION")},
        "test_quantization": {
            "TEST_CASES": [(config_cls, {"r": 8, "target_modules": ["q_proj", "v_proj"], **needed})]
        },
        "test_seq_classifier": {"ALL_CONFIGS": transformer("SEQ_CLS")},
        "test_token_classification_qa": {
            "TOKEN_CLS_CONFIGS": transformer("TOKEN_CLS"),
            "QA_CONFIGS": transformer("QUESTION_ANS"),
        },
    }


def upstream_lists(config_cls: type[PeftConfig], lists: dict[str, dict[str, list]]) -> Callable[[Any], dict]:
    """For a control run: the rows of the same lists that PEFT itself has for one of its own methods.

    Args:
        config_cls: Configuration class of a built-in method.
        lists: What `lists_for` gave; only its names are used.

    Returns:
        A function from an imported test module to its lists.
    """

    def pick(module: Any) -> dict[str, list]:
        names = lists[module.__name__.rpartition(".")[2]]
        return {name: [row for row in getattr(module, name) if _is_about(row, config_cls)] for name in names}

    return pick


def _is_about(row: Any, config_cls: type[PeftConfig]) -> bool:
    parts = row if isinstance(row, tuple) else (row,)
    return any(part is config_cls or type(part) is config_cls for part in parts)
