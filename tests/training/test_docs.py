"""The code on the training page is Python, and every name it imports exists."""

import ast
import importlib
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_there_is_code():
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("block", BLOCKS)
def test_imports_exist(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name), f"{node.module}.{name.name}"


def test_places_named_on_the_page_exist():
    root = Path(__file__).parents[2]
    for place in re.findall(r"`((?:benchmarks|tests|hub_examples)/[\w./]+)`", PAGE):
        assert (root / place).exists(), place
    for name in re.findall(r"`(\w+\.yaml)`", PAGE):
        assert (root / "hub_examples" / "accelerate" / name).exists(), name
