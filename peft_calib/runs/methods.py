"""What a method trains, as stages: one adapter each, in order, every one resumable on its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

from peft import LoraConfig, PeftConfig

from ..tuners import CalibLoraConfig, CurveLoraConfig
from .folder import RunFolder
from .settings import METHODS, RunConfig, named_class

#: Heads that PEFT trains along and so must not adapt too, and what lies in them. Its own "all-linear" leaves them out
#: for some tasks and not for others, and knows no head whose name only ends like these, as DistilBERT's.
HEADS = r"(.*\.)?\w*(classifier|score)(\..*)?"
#: Name of the stage whose adapter is the run's.
ADAPTER = "adapter"
#: What the settings of a run decide in a PEFT configuration.
COMMON = {"r": "rank", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "target_modules": "target_modules"}


def config_class(method: str) -> type:
    """The configuration class of a method; importing one from outside (`module:Class`) registers it with PEFT."""
    if method not in METHODS:
        return named_class(method, "method", CalibLoraConfig)
    module, _, name = METHODS[method].partition(":")
    return getattr(import_module(module), name)


@dataclass(frozen=True)
class Stage:
    """One adapter to train; `head_of` is the stage whose trained head it takes over and keeps frozen."""

    name: str
    seed: int
    config: PeftConfig
    head_of: str | None = None


def plan(
    config: RunConfig,
    folder: RunFolder,
    task_type: str,
    has_head: bool,
    num_train_items: int,
    answer_tokens: list[int] | None = None,
) -> list[Stage]:
    """The stages of a run; every configuration is built, and so checked, before anything is trained.

    Members of an ensemble and anchors of a curve are plain LoRAs that differ in their seed. All anchors share one
    head: the first trains it, the others and the curve keep it frozen, since a curve joins adapters under one head.
    `num_train_items` is N of the evidence lower bound.
    """
    common = {"task_type": task_type, **_common(config)}
    if has_head and common["target_modules"] == "all-linear":
        common["exclude_modules"] = HEADS
    if task_type == "TOKEN_CLS":
        # PEFT names the head of this task only after the adapter stands, too late for a curve, whose anchors bring one
        common["modules_to_save"] = ["classifier", "score"]

    def lora(name: str, seed: int, head_of: str | None = None, **further: Any) -> Stage:
        return Stage(name, seed, LoraConfig(**common, **further), head_of)

    def single(kind: type, **further: Any) -> list[Stage]:
        values = {**common, **further, **_adapter_fields(config, kind)}
        return [Stage(ADAPTER, config.seed, kind(**values))]

    if config.method not in ("ensemble", "curve-lora"):
        kind = config_class(config.method)
        told = {"seed": config.seed, "sample_seed": config.seed, "num_train_examples": num_train_items}
        told["num_members"] = _members(config)
        return single(kind, **{name: value for name, value in told.items() if name in _fields_of(kind)})
    if config.method == "ensemble":
        further = _adapter_fields(config, LoraConfig)
        return [lora(name, config.seed + k, **further) for k, name in enumerate(member_names(config))]
    curve = {"num_anchors": config.anchors, "num_handles": config.handles, "curve_mode": config.mode}
    curve |= {"sample_seed": config.seed, "jsd_label_tokens": answer_tokens}
    if config.mode == "free":
        return single(CurveLoraConfig, **curve)
    names = [f"anchor-{k}" for k in range(config.anchors)]
    first = names[0] if has_head else None
    anchors = [lora(name, config.seed + k, first if k else None) for k, name in enumerate(names)]
    (joined,) = single(CurveLoraConfig, **curve, anchor_adapters=[str(folder.adapter(name)) for name in names])
    return [*anchors, Stage(joined.name, joined.seed, joined.config, first)]


def member_names(config: RunConfig) -> list[str]:
    """Folders of the members of an ensemble."""
    return [f"member-{k}" for k in range(_members(config))]


def _members(config: RunConfig) -> int:
    assert config.members is not None  # settled with the method
    return config.members


def prediction_variants(config: RunConfig) -> dict[str, int]:
    """Draws of `"mean"` and `"sample"`: a curve's are its grid of `2 N_cp - 1` points, an ensemble's its members.

    Where moments were kept around the members there are `num_samples` draws, and as many around each.
    """
    members = most_draws(config)
    if members is not None:
        return {"sample": members} if config.method == "ensemble" else {"mean": 1, "sample": members}
    if config.method == "ensemble-lora":
        return {"mean": 1, "sample": _members(config) * -(-config.num_samples // _members(config))}
    if config.method != "curve-lora":
        draws_differ = getattr(config_class(config.method), "draws_differ", False)
        return {"mean": 1, "sample": config.num_samples} if draws_differ else {"mean": 1}
    points = 2 * ((config.anchors - 1) * (config.handles + 1) + 1) - 1
    return {"mean": 1, "sample": config.adapter.get("eval_points") or points}


def most_draws(config: RunConfig) -> int | None:
    """How many different draws there are, which are the members of an ensemble; `None` where there is no end."""
    own = config.adapter
    around = config.method == "ensemble-lora" and own.get("moments", 0) > 0 and own.get("posterior_scale", 1) > 0
    return _members(config) if config.method in ("ensemble", "ensemble-lora") and not around else None


def without_foreign_fields(method: str, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Leave out fields that only other methods than the one asked for have; they come with those methods."""
    own = _fields_of(config_class(method))
    homes = {name: [other for other in METHODS if name in _fields_of(config_class(other))] for name in values}
    left_out = {name: methods for name, methods in homes.items() if name not in own and methods}
    return {name: value for name, value in values.items() if name not in left_out}, left_out


def _fields_of(kind: type) -> set[str]:
    return {item.name for item in fields(kind)}


def _common(config: RunConfig) -> dict[str, Any]:
    values = {field: getattr(config, setting) for field, setting in COMMON.items()}
    if values["lora_alpha"] == int(values["lora_alpha"]):
        values["lora_alpha"] = int(values["lora_alpha"])
    if config.target_modules == ["all-linear"]:
        values["target_modules"] = "all-linear"
    return values


def _adapter_fields(config: RunConfig, kind: type) -> dict[str, Any]:
    """The user's further fields, checked against the configuration they are for."""
    known = _fields_of(kind)
    for name in config.adapter:
        setting = COMMON.get(name)
        if setting is not None:
            raise ValueError(f"set {name} with --{setting.replace('_', '-')}, not with --adapter-option")
        if name not in known:
            raise ValueError(f"{kind.__name__} has no field {name!r}; it has {', '.join(sorted(known))}")
    return config.adapter
