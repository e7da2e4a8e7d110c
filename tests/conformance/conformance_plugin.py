"""A pytest plugin that makes PEFT's own test suites run for one method, without changing them.

Each `pytest.mark.parametrize` over one of the lists named in `cases.py` is given our rows instead of PEFT's; literal
lists of configuration classes that contain LoRA are given our class; every test without such a parametrisation belongs
to another method and is left out.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import socket
import sys
from collections import Counter
from collections.abc import Generator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import cases
import pytest
from adapted import ADAPTED
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import peft_calib  # noqa: F401  (registers the methods)

METHOD = os.environ["CONFORMANCE_METHOD"].upper()
EXTRA = json.loads(os.environ.get("CONFORMANCE_EXTRA", "{}"))
CONFIG = PEFT_TYPE_TO_CONFIG_MAPPING[METHOD]
OURS = cases.lists_for(CONFIG, **EXTRA) if METHOD in cases.NEEDED else None
NAMES = cases.lists_for(PEFT_TYPE_TO_CONFIG_MAPPING["HYPERLORA"])
ONLY = json.loads(os.environ.get("CONFORMANCE_ONLY", "[]"))

selected: set[str] = set()
deselected: dict[str, str] = {}
adapted: dict[str, str] = {}
outcomes: dict[str, str] = {}


def pytest_configure(config: pytest.Config) -> None:
    """Make the suites importable, and refuse the network at once: a look-up would wait for its time-out."""
    _stand_in_for_diffusers()

    def refuse(self: socket.socket, address: Any) -> None:
        raise OSError(f"no network in this run: {address}")

    socket.socket.connect = refuse


def _stand_in_for_diffusers() -> None:
    # the suites' common module imports one class of it at the top, for image pipelines that no test here uses
    if importlib.util.find_spec("diffusers") is None:
        module = ModuleType("diffusers")
        module.__spec__ = ModuleSpec("diffusers", None)
        module.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
        sys.modules["diffusers"] = module


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Exchange the rows of the parametrisations that enumerate PEFT methods."""
    module = metafunc.module
    names = NAMES.get(module.__name__.rpartition(".")[2], {})
    rows = _rows(module)
    by_identity = {id(getattr(module, name)): rows[name] for name in names}
    parametrize = metafunc.parametrize

    def exchange(argnames: Any, argvalues: Any, *args: Any, **kwargs: Any) -> None:
        if id(argvalues) in by_identity:
            argvalues = by_identity[id(argvalues)]
            selected.add(metafunc.definition.nodeid)
        elif argnames == "config_cls" and LoraConfig in argvalues:
            argvalues = [CONFIG if OURS is None else cases.with_needed(CONFIG, **EXTRA)]
            selected.add(metafunc.definition.nodeid)
        parametrize(argnames, argvalues, *args, **kwargs)

    metafunc.parametrize = exchange


def _rows(module: Any) -> dict[str, list]:
    if OURS is None:
        return cases.upstream_lists(CONFIG, NAMES)(module)
    return OURS[module.__name__.rpartition(".")[2]]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what belongs to other methods, and what `cases` names with a reason."""
    keep, drop = [], []
    for item in items:
        reason = next((why for part, why in cases.DESELECTED.items() if part in item.nodeid), None)
        if item.nodeid.partition("[")[0] not in selected or (ONLY and _short(item.nodeid) not in ONLY):
            drop.append(item)
        elif reason is not None and OURS is not None:
            deselected[_short(item.nodeid)] = reason
            drop.append(item)
        else:
            keep.append(item)
    items[:] = keep
    config.hook.pytest_deselected(items=drop)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Run a test that looks something up where a law has it elsewhere with that one fact answered."""
    found = next((one for part, one in ADAPTED.items() if part in item.nodeid), None)
    if found is None or OURS is None:
        return (yield)
    adapted[_short(item.nodeid)] = found.how
    with found.context(importlib.import_module(f"{item.module.__package__}.testing_common")):
        return (yield)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note the worst outcome of a test's phases."""
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = (
            "failed" if "failed" in (report.outcome, outcomes.get(report.nodeid)) else report.outcome
        )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the counts for `run.py`."""
    counts = Counter(outcomes.values())
    result = {
        **{name: counts[name] for name in ("passed", "failed", "skipped")},
        "failures": sorted(_short(node) for node, outcome in outcomes.items() if outcome == "failed"),
        "deselected": deselected,
        "adapted": adapted,
    }
    Path(os.environ["CONFORMANCE_RESULT"]).write_text(json.dumps(result))


def _short(nodeid: str) -> str:
    return nodeid.partition("::")[2]
