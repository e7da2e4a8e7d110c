"""Every example in a documentation string gives what it says."""

import doctest
import importlib
import pkgutil

import pytest

import peft_calib
import peft_calib.metrics
import peft_calib.trainer_callbacks

PACKAGES = (peft_calib, peft_calib.trainer_callbacks, peft_calib.metrics)
MODULES = sorted(
    {package.__name__ for package in PACKAGES}
    | {found.name for package in PACKAGES for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")}
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    failures, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert failures == 0, "see the captured output"


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    count = sum(bool(test.examples) for name in MODULES for test in finder.find(importlib.import_module(name)))
    assert count > 20
