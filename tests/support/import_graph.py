"""Who imports whom in the package, imports inside functions and for type checkers included, in rooms and on floors.

python tests/support/import_graph.py    # the table of docs/architecture.md
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "peft_calib": ROOT / "peft_calib",
    "peft_calib.trainer_callbacks": ROOT / "trainer_callbacks",
    "peft_calib.metrics": ROOT / "metrics",
}


def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for name, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join([name, *(part for part in parts if part != "__init__")])] = file
    return found


def imports(name: str, file: Path, known: Iterable[str]) -> set[str]:
    """Modules of the package that a module imports, wherever in it and even for type checkers alone."""
    tree = ast.parse(file.read_text())
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from package import module` imports the module; `from module import name` the module alone
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
    return {other for other in found if other in known and other != name}


def graph() -> dict[str, set[str]]:
    """Module to the modules it imports."""
    known = modules()
    return {name: imports(name, file, known) for name, file in known.items()}


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of two or more that reach each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in arrows[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for node in arrows:
        if node not in index:
            visit(node)
    return found


#: Rooms from the ground up: an arrow goes to a room further up in this list, that is, down in the house.
FLOORS = {
    "ground": (
        "versions",
        "internals",
        "files",
        "json_files",
        "whole_numbers",
        "fetching",
        "registry",
        "identity",
        "artefact",
        "base_models",
        "classes",
        "console",
    ),
    "foundations": ("tuners", "calibration"),
    "what lies on one of them": ("provenance", "splits", "draws_index", "edits", "items", "prediction"),
    "tools": (
        "with_peft",
        "export",
        "llama_cpp",
        "methods",
        "metrics",
        "uncertainty_head",
        "predictor",
        "trainer_callbacks",
    ),
    "roads": ("runs", "hub", "demo", "cli"),
}


def room(module: str) -> str:
    """The folder or file at the top of the package that a module lies in; the package's own names are `""`."""
    return module.partition(".")[2].partition(".")[0]


def rooms(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """Room to the rooms it imports."""
    found: dict[str, set[str]] = {}
    for name, others in arrows.items():
        found.setdefault(room(name), set()).update(room(other) for other in others if room(other) != room(name))
    return found


def table() -> str:
    """Rooms by floor, the highest first, and what each imports, as Markdown."""
    found = rooms(graph())
    lines = ["| floor | room | imports |", "|---|---|---|"]
    for floor, members in reversed(FLOORS.items()):
        for member in reversed(members):
            below = [other for floor_ in FLOORS.values() for other in floor_ if other in found[member]]
            lines.append(f"| {floor} | `{member}` | {', '.join(f'`{other}`' for other in below) or '-'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
