"""Pages of the site that are made of what stands elsewhere: reference, commands, contributing, changelog."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent


class Examples(griffe.Extension):
    """Reads the section `Example:` of our docstrings as code that runs."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are generated."""
    pages = {
        "contributing.md": _moved((ROOT / "CONTRIBUTING.md").read_text()),
        "changelog.md": _moved((ROOT / "CHANGELOG.md").read_text()),
        "commands.md": _commands(),
        "reference/peft_calib.md": _reference("peft_calib", _stub_names()),
        "reference/calibration.md": _reference(
            "peft_calib.calibration",
            [f"peft_calib.calibration.{name}" for name in _listed("peft_calib/calibration/__init__.py")],
        ),
        "reference/trainer_callbacks.md": _reference(
            "peft_calib.trainer_callbacks",
            [f"trainer_callbacks.{name}" for name in _listed("trainer_callbacks/__init__.py")],
        ),
    }
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to what lies beside the folder of the pages lead to the page that is made of it."""
    return markdown.replace("](../CONTRIBUTING.md", "](contributing.md")


def _moved(text: str) -> str:
    """A page of the top of the repository, as it stands in the folder of the pages."""
    text = re.sub(r"\]\(docs/", "](", text)
    return re.sub(r"\[([^]]*)\]\(findings/[^)]*\)", r"`\1`", text)


def _stub_names() -> list[str]:
    """What `peft_calib` holds, each where it is defined; modules are none of it."""
    tree = ast.parse((ROOT / "peft_calib/__init__.pyi").read_text())
    return [
        f"peft_calib.{node.module}.{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module and node.module != "metrics"
        for alias in node.names
    ]


def _listed(file: str) -> list[str]:
    """`__all__` of a module."""
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError(f"{file} has no __all__")


def _reference(title: str, names: list[str]) -> str:
    return f"# {title}\n\n" + "\n\n".join(f"::: {name}" for name in names) + "\n"


def _commands() -> str:
    """Every command with its examples and flags, from the command line itself."""
    from typer.main import get_command

    from peft_calib.cli import app

    parts = [
        "# Commands",
        "",
        "What `peft-calib COMMAND --help` tells. [The command line](command-line.md) says how they go together.",
    ]
    for name, command in get_command(app).commands.items():
        examples = [line.strip() for line in command.epilog.splitlines() if line.strip().startswith("peft-calib")]
        parts += [
            "",
            f"## {name}",
            "",
            re.sub(r"\n\s*", " ", command.help.replace("\n\n", "\0")).replace("\0", "\n\n"),
        ]
        parts += ["", "```", *examples, "```", "", "| | | |", "|---|---|---|"]
        for parameter in command.params:
            heading = getattr(parameter, "rich_help_panel", None) or "Arguments"
            flag = max(parameter.opts, key=len) if parameter.opts[0].startswith("-") else parameter.name
            text = " ".join((getattr(parameter, "help", None) or "").split()).replace("|", "\\|")
            parts.append(f"| {heading} | `{flag}`{' (required)' if parameter.required else ''} | {_plain(text)} |")
    return "\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """Text without what Markdown would read in it."""
    return re.sub(r"([<>*_\[\]])", r"\\\1", text)
