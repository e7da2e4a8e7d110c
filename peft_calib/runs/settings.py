"""The configuration of a run: one list of settings for Python, YAML and the command line."""
# ruff: noqa: RUF009 - `_setting` is `field` with a line of help; mutable defaults are made anew by it

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ..calibration.scores.kinds import PANELS
from ..calibration.scores.table import TABLED
from ..whole_numbers import plain_whole

TASKS = ("seq-cls", "multiple-choice", "token-cls", "causal-lm", "multi-label", "rerank", "regression")
#: The kind of answer of tasks that answer with labels, or with a number.
ANSWERED = {"multi-label": "labels", "rerank": "labels", "regression": "numbers"}
#: Tasks of single texts or of pairs.
OF_PAIRS = ("seq-cls", "multi-label", "rerank", "regression")
#: Each method's configuration, named as methods from outside are.
METHODS = {
    "lora": "peft:LoraConfig",
    "hyper-lora": "peft_calib.tuners:HyperLoraConfig",
    "bayesian-lora": "peft_calib.tuners:BayesianLoraConfig",
    "curve-lora": "peft_calib.tuners:CurveLoraConfig",
    "ensemble-lora": "peft_calib.tuners:EnsembleLoraConfig",
    "ensemble": "peft:LoraConfig",
}
MODES = ("anchored", "free")
#: Recalibrations of labels: one temperature, one for each, or one and a bias for each.
SCALINGS = ("joint", "label", "platt")
#: A method from outside: its configuration's module and class.
_FROM_OUTSIDE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
# YAML 1.1 reads 1e-3 as text, because it has no dot
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


#: What a demonstration takes otherwise than a run.
DEMONSTRATION = {"epochs": 8.0, "batch_size": 32, "max_length": 128, "num_samples": 8, "warmup": 0.0}


def _setting(default: Any, help_text: str, unset: str = "", least: float | None = None, above: Any = None) -> Any:
    """A field with its line of help, what stands for None in words, and its bounds."""
    metadata = {"help": help_text, "unset": unset, "least": least, "above": above}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on; each field is a key of the YAML file and a flag of `peft-calib train`."""

    data: str = _setting("", "A .csv, .tsv, .json(l) or .parquet file (or .gz of it), a folder of such, or a Hub id.")
    model: str = _setting("", "Base model: a Hub id or a folder.")
    task: str = _setting("seq-cls", f"One of {', '.join(TASKS)}, or module:Class of a task of your own.")
    method: str = _setting("lora", f"One of {', '.join(METHODS)}, or module:Class of a configuration of your own.")
    # the data
    subset: str | None = _setting(None, "Configuration name of a Hub data set.")
    encoding: str | None = _setting(None, "Of text files that are not UTF-8, such as cp1252, latin-1 or utf-16.")
    delimiter: str | None = _setting(None, "Of CSV files, where the rows do not show it; also tab or semicolon.")
    drop_missing: bool = _setting(False, "Leave out rows without a text or a label instead of refusing them.")
    train_split: str = _setting("train", "Split of the data to train on.")
    revision: str | None = _setting(None, "Revision of a Hub model.")
    text_column: list[str] = _setting(["text"], "Column of the text; two for sentence pairs.")
    label_column: str = _setting(
        "label", "Column of the label; multi-label: of all labels of a row, rerank: 1 or 0, regression: a number."
    )
    label_columns: list[str] = _setting(
        [], "Multi-label: a column of 1 and 0 for each label, also separated by commas, instead of one column of all."
    )
    label_separator: str | None = _setting(
        None, "Multi-label: what stands between the labels of a row.", "the first of | ; and , that there is"
    )
    label_scaling: str | None = _setting(
        None, "Temperatures of labels: joint, label (one each) or platt.", "joint; platt for one label"
    )
    label_names: list[str] | None = _setting(None, "Names of the classes in order, where the labels need a mapping.")
    question_column: str = _setting("question", "Column of a multiple-choice question.")
    choices_column: list[str] = _setting(["choices"], "Column with the list of choices, or one column a choice.")
    prompt: str = _setting(
        "{question}\n{choices}\nAnswer:",
        "Multiple-choice prompt; choices come as lettered lines.",
        "the question, the choices, and 'Answer:'",
    )
    tokens_column: str = _setting("tokens", "Column with the words of a text (token-cls).")
    tags_column: str = _setting("tags", "Column with the tag of each word (token-cls).")
    max_length: int = _setting(256, "Tokens a row is cut to.", least=4)
    max_train_rows: int | None = _setting(None, "Train on at most this many rows, chosen at random by class.", least=1)
    calibration_fraction: float = _setting(0.2, "Share of the training rows held out to calibrate on.")
    test_fraction: float = _setting(0.0, "Share of the rows held out to test on, where the data have no test split.")
    # the adapter
    rank: int = _setting(8, "Rank r of the update.", least=1)
    lora_alpha: float | None = _setting(None, "Numerator of the scaling lora_alpha / r.", "twice the rank")
    lora_dropout: float = _setting(0.0, "Dropout on the update's input while training.")
    target_modules: list[str] = _setting(
        ["all-linear"], "'all-linear', or names of linear maps, also separated by commas."
    )
    adapter: dict[str, Any] = _setting({}, "Further fields of the method's PEFT configuration.")
    num_samples: int = _setting(8, "Draws K of a prediction (bayesian-lora, members with moments).", least=1)
    members: int | None = _setting(None, "Members of an ensemble-lora (2 if not given), of an ensemble (5).", least=1)
    anchors: int = _setting(3, "Anchors N of a curve.", least=2)
    handles: int = _setting(2, "Handles m of a segment of a curve.", least=0)
    mode: str = _setting("anchored", "Curve: 'anchored' trains N LoRAs and joins them, 'free' trains all at once.")
    # the training
    epochs: float | None = _setting(None, "Passes over the training rows.", "3 to 10 by their number", above=0)
    learning_rate: float = _setting(1e-3, "Of AdamW.", above=0)
    batch_size: int = _setting(16, "Rows of a forward on one device.", least=1)
    gradient_accumulation_steps: int = _setting(1, "Forwards of an optimiser step.", least=1)
    weight_decay: float = _setting(0.0, "Of AdamW.")
    warmup: float = _setting(0.06, "Share of the steps with a rising learning rate.")
    save_steps: float = _setting(0.2, "Steps between two checkpoints; below 1 a share of the training.", above=0)
    trainer: dict[str, Any] = _setting({}, "Further TrainingArguments of transformers, such as bf16.")
    metrics: list[str] = _setting(
        list(TABLED), "Scores shown while training and in tables, also separated by commas; files hold all."
    )
    best_metric: str | None = _setting(None, "Keep the evaluation of least 'nll' or 'brier' instead of the last.")
    seed: int = _setting(0, "Of the splits, a fresh head, the adapters and the order of the rows.")

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):
            object.__setattr__(self, item.name, _checked(item.name, getattr(self, item.name), hints[item.name]))
        for name in (
            "target_modules",
            "metrics",
            "label_columns",
        ):  # names that hold no comma: one string may list several
            split = [part.strip() for item in getattr(self, name) for part in item.split(",")]
            object.__setattr__(self, name, [part for part in split if part])
        for name in ("data", "model"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: give --{name}, or `{name}:` in the configuration file")
        for name, choices in (("task", TASKS), ("method", METHODS), ("mode", MODES)):
            of_ones_own = name != "mode" and _FROM_OUTSIDE.fullmatch(getattr(self, name))
            if getattr(self, name) not in choices and not of_ones_own:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        if self.task in ANSWERED and self.metrics == list(TABLED):
            object.__setattr__(self, "metrics", list(PANELS[ANSWERED[self.task]].shown))
        check_metrics(self.metrics, self.task)
        if self.label_scaling not in (None, *SCALINGS):
            raise ValueError(f"label_scaling must be one of {', '.join(SCALINGS)}; got {self.label_scaling!r}")
        if self.members is None:
            object.__setattr__(self, "members", 5 if self.method == "ensemble" else 2)
        self._check_ranges()
        if self.lora_alpha is None:
            object.__setattr__(self, "lora_alpha", float(2 * self.rank))

    def _check_ranges(self) -> None:
        for item in fields(self):
            value, least, above = getattr(self, item.name), item.metadata["least"], item.metadata["above"]
            if least is not None and value is not None and value < least:
                raise ValueError(f"{item.name} must be at least {least}, got {value}")
            if above is not None and value is not None and not value > above:
                raise ValueError(f"{item.name} must be positive, got {value}")
        for name in ("calibration_fraction", "test_fraction", "warmup", "lora_dropout"):
            low_open = name == "calibration_fraction"
            if not (0 < getattr(self, name) < 1 or (getattr(self, name) == 0 and not low_open)):
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        pairs = self.task not in TASKS or self.task in OF_PAIRS
        if not 1 <= len(self.text_column) <= (2 if pairs else 1):
            two = ", or two for sentence pairs" if pairs else ""
            raise ValueError(f"text_column names one column{two}; got {self.text_column}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> RunConfig:
        """A configuration from plain values."""
        known = [item.name for item in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown setting(s) {', '.join(map(str, unknown))}; known are {', '.join(known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the inverse of `from_mapping`."""
        return asdict(self)


def check_metrics(metrics: Sequence[str], task: str = "seq-cls") -> None:
    """Raise `ValueError` for the name of a score that a report of a task does not have."""
    known = tuple(PANELS[ANSWERED.get(task, "classes")].meanings)
    unknown = [name for name in metrics if name not in known]
    if unknown or not metrics:
        raise ValueError(f"unknown metric(s) {', '.join(unknown) or '(none given)'}; a report has {', '.join(known)}")


def named_class(name: str, what: str, base: type) -> Any:
    """The class that a setting names as `module:Class`, also from the folder its user is in."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:  # as for a script, whose folder Python looks in by itself
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise ValueError(f"{what} is {name!r}, but {module} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{what} is {name!r}, which names no subclass of {base.__module__}.{base.__name__}")
    return found


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML file."""
    import yaml  # a help does without it

    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no configuration file {path}")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        fault = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ValueError(f"{path} is not valid YAML: {where}{fault}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold settings as `name: value` lines")
    return values


def parse_assignments(name: str, lines: Sequence[str]) -> dict[str, Any]:
    """`["kl_weight=0.1", "posterior=full"]` as a mapping; values are read as YAML."""
    import yaml

    values = {}
    for line in lines:
        key, sign, value = line.partition("=")
        if not sign or not key.strip():
            raise ValueError(f"--{name} takes name=value, got {line!r}")
        values[key.strip()] = yaml.safe_load(value)
    return values


def _checked(name: str, value: Any, hint: Any) -> Any:
    """The value as its type, where nothing is lost by that."""
    optional = type(None) in get_args(hint)
    if value is None:
        if optional:
            return None
        raise TypeError(f"{name} needs a value, got none")
    kind = next(arg for arg in get_args(hint) if arg is not type(None)) if optional else hint
    plain = get_origin(kind) or kind
    if plain is dict:
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} must be a mapping of field names to values, got {value!r}")
        return {str(key): _number(item) for key, item in value.items()}
    if plain is list:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, (str, int)) for item in items):
            raise TypeError(f"{name} must be a name or a list of names, got {value!r}")
        return [str(item) for item in items]
    value = _number(plain_whole(value))
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if plain is bool and isinstance(value, bool):
        return value
    if plain is float and number:
        return float(value)
    if plain is int and number and float(value).is_integer():
        return int(value)
    if plain is str and isinstance(value, (str, Path)):
        return str(value)
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[plain]
    raise TypeError(f"{name} must be {expected}, got {value!r}")


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def default_of(item: Any) -> Any:
    """Default value of a dataclass field."""
    return item.default if item.default is not MISSING else item.default_factory()
