"""One style over all packages, where ruff has no rule for it."""

import ast
import re
from pathlib import Path

import pytest
from import_graph import modules

FILES = {name: file.read_text() for name, file in modules().items()}
GIVEN = re.compile(r"from hypothesis import .*\bgiven\b")
SECTIONS = re.compile(r"^( *)(?:Args|Attributes|Raises):\n((?:\1 +.*\n|\n)+)", re.MULTILINE)


def docstrings(text: str) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(text)) if isinstance(node, kinds))
    return [docstring + "\n" for docstring in found if docstring]


def lower_case(docstring: str) -> list[str]:
    """Descriptions in Args, Attributes and Raises that begin with a small letter, but for names of types."""
    entries = (line for _, body in SECTIONS.findall(docstring) for line in body.splitlines())
    found = [re.match(r" {4}\w[\w*, ]*: ([a-z]\w*)", line) for line in entries]
    return [m.string.strip() for m in found if m and not re.search(r"[\d_]|numpy", m.group(1))]


@pytest.mark.parametrize("name", FILES)
def test_style(name):
    text = FILES[name]
    assert "SPDX" not in text  # LICENSE and pyproject.toml say it
    if name.split(".")[1:2] not in (["trainer_callbacks"], ["metrics"]):  # those two lie beside the package
        assert not re.search(r"^\s*from peft_calib\b", re.sub(r">>>.*", "", text), re.MULTILINE), "import relatively"
    for docstring in docstrings(text):
        assert "``" not in docstring
        assert lower_case(docstring) == []


def test_no_example_is_given_a_time():
    """Hypothesis lets an example take 200 ms unless told otherwise; a busy machine takes longer."""
    files = [file for file in Path(__file__).parent.rglob("*.py") if GIVEN.search(file.read_text())]
    assert len(files) > 4
    for file in files:
        assert "deadline=None" in file.read_text(), file
