"""The flags of `peft-calib train`, made from the settings, so that a setting is written down once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from ..calibration.scores.table import KEYS
from .settings import METHODS, MODES, SCALINGS, TASKS, RunConfig, default_of, parse_assignments, read_yaml

#: Names of flags where a mapping is given piece by piece.
PIECES = {"adapter": "adapter-option", "trainer": "trainer-option"}
#: Headings of the help, with the settings below each.
PANELS = {
    "Rows": (
        "data", "subset", "encoding", "delimiter", "drop_missing", "train_split", "max_train_rows",
        "calibration_fraction", "test_fraction",
    ),
    "Columns": (
        "text_column", "label_column", "label_columns", "label_separator", "label_names", "question_column",
        "choices_column", "prompt", "tokens_column",
        "tags_column",
    ),
    "Model and method": (
        "model", "revision", "task", "method", "max_length", "rank", "lora_alpha", "lora_dropout", "target_modules",
        "adapter",
    ),
    "Of one method": ("num_samples", "members", "anchors", "handles", "mode"),
    "Training": (
        "epochs", "learning_rate", "batch_size", "gradient_accumulation_steps", "weight_decay", "warmup",
        "label_scaling", "save_steps", "trainer", "best_metric", "metrics", "seed",
    ),
}  # fmt: skip
#: What a shell completes.
CHOICES = {"task": TASKS, "method": METHODS, "mode": MODES, "best_metric": ("nll", "brier"), "metrics": KEYS}
CHOICES["label_scaling"] = SCALINGS


def with_flags(annotations: Mapping[str, Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command, in the place of its `**flags`, one flag each; what the user did not give arrives as `None`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        kind = inspect.Parameter.KEYWORD_ONLY
        flags = [inspect.Parameter(n, kind, default=None, annotation=hint) for n, hint in annotations.items()]

        def command(**arguments: Any) -> Any:
            return function(**arguments)

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        parameters = [p.replace(kind=kind) for p in own] + flags
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def resolve(config_file: Path | None, flags: dict[str, Any], tell: Callable[[str], None] | None = None) -> RunConfig:
    """The configuration: a YAML file, overridden by flags, mappings field by field.

    One file serves several methods: `tell` gets a line for each field that is left out, as another method's.
    """
    values = {} if config_file is None else read_yaml(config_file)
    method = flags.get("method") or values.get("method") or "lora"
    if isinstance(values.get("adapter"), dict) and (method in METHODS or ":" in str(method)):
        from .methods import without_foreign_fields  # PEFT is imported only where a file asks for it

        values["adapter"], left_out = without_foreign_fields(method, values["adapter"])
        for name, methods in left_out.items():
            if tell is not None:
                tell(f"{config_file}: {name} is for {' and '.join(methods)}; left out, since this is {method}")
    for name, value in given(flags).items():
        if name in PIECES:
            value = {**(values.get(name) or {}), **parse_assignments(PIECES[name], value)}
        values[name] = value
    try:
        return RunConfig.from_mapping(values)
    except TypeError as error:  # a user's slip, told like the others
        raise ValueError(str(error)) from error


def given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What the user said of the flags."""
    return {name: value for name, value in flags.items() if value is not None and value != []}


def setting_flags(
    names: Sequence[str] = (), defaults: Mapping[str, Any] | None = None, panel: str | None = None
) -> dict[str, Any]:
    """A flag for each setting of a run; or for some, with their bounds, and perhaps with other defaults."""
    heading = {name: title for title, under in PANELS.items() for name in under}
    hints = get_type_hints(RunConfig)
    found = {}
    for item in fields(RunConfig):
        if names and item.name not in names:
            continue
        hint = hints[item.name]
        optional = type(None) in get_args(hint)
        kind = next((arg for arg in get_args(hint) if arg is not type(None)), hint) if optional else hint
        several = get_origin(kind) in (list, dict)
        name = PIECES.get(item.name, item.name.replace("_", "-"))
        low = (item.metadata["least"] or item.metadata["above"]) if names else None
        text = _help(item, (defaults or {}).get(item.name, default_of(item)))
        option = typer.Option(
            f"--{name}", help=text, show_default=False, min=low, metavar=f"<{'str' if several else kind.__name__}>",
            rich_help_panel=panel or heading[item.name], autocompletion=_completed(item.name),
        )  # fmt: skip
        found[item.name] = Annotated[list[str] | None if several else kind | None, option]
    return found


def _help(item: Any, default: Any) -> str:
    text = item.metadata["help"]
    if item.name in PIECES:
        return f"{text} As name=value; may be repeated."
    if isinstance(default, list):
        return f"{text} May be repeated." + (f" Default: {', '.join(default)}." if default else "")
    if "\n" in str(default):
        return f"{text} Default: {item.metadata['unset']}."
    if default is None or default is False or default == "":  # a 0 is told
        return f"{text} Default: {item.metadata['unset']}." if item.metadata["unset"] else text
    return f"{text} Default: {default!r}."


def _completed(name: str) -> Callable[[str], list[str]] | None:
    """What a shell offers for a flag; None for what it cannot know."""
    known = CHOICES.get(name)
    return None if known is None else lambda incomplete: [word for word in known if word.startswith(incomplete)]
