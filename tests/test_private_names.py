"""No private name of PEFT or torch stands outside its door in `peft_calib/internals`."""

import ast
import functools
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

import peft_calib

ROOT = Path(__file__).parents[1]
ROOMS = ("peft_calib", "trainer_callbacks", "metrics")
DOOR = ROOT / "peft_calib" / "internals"
FOREIGN = (nn.Module, nn.Linear, torch.Tensor, torch.optim.Optimizer, BaseTuner, BaseTunerLayer, PeftConfig, PeftModel)
#: What stands in no class: attributes that wrappers of torch and PEFT give to modules.
WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_is_replica", "_execution_engine")
#: Of Python itself.
PYTHON = ("_getframe", "_asdict", "_context")
#: What metaclasses put into a class by themselves.
METACLASSES = ("_abc_", "_backward_cls", "_compiled_")
PRIVATE = re.compile(r"_[A-Za-z]\w*")


def modules() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")) if DOOR not in path.parents]


@functools.cache
def foreign_names() -> set[str]:
    """Private attributes of the classes of torch and PEFT that our objects are or hold."""
    found = {*WRAPPED, *vars(nn.Module())}
    for kind in FOREIGN:
        found |= set(dir(kind))
    return {name for name in found if PRIVATE.fullmatch(name)}


@functools.cache
def own_names() -> set[str]:
    """Private names that our own code defines."""
    found = set()
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_stay_behind_their_door(path):
    wrong = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("torch", "peft"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            wrong += [(node.lineno, name) for name in names if PRIVATE.fullmatch(name)]
        elif isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr) and node.attr not in PYTHON:
            if node.attr in foreign_names() or node.attr not in own_names():
                wrong.append((node.lineno, node.attr))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # as an argument of getattr, a key of __dict__, or a part of a tensor's name
            parts = [part for part in node.value.split(".") if part in foreign_names()]
            wrong += [(node.lineno, part) for part in parts]
    assert wrong == []


def test_no_class_overrides_a_private_method_outside_the_door():
    wrong = []
    for found in pkgutil.walk_packages(peft_calib.__path__, "peft_calib."):
        module = importlib.import_module(found.name)
        for kind in vars(module).values():
            if not isinstance(kind, type) or kind.__module__ != found.name or ".internals." in found.name:
                continue
            foreign = [base for base in kind.__mro__ if base.__module__.partition(".")[0] in ("torch", "peft")]
            own = [name for name in vars(kind) if PRIVATE.fullmatch(name) and not name.startswith(METACLASSES)]
            wrong += [(kind.__qualname__, name) for name in own if any(name in vars(base) for base in foreign)]
    assert wrong == []
