"""`push_metric`: a bundled `evaluate` module as a Space, whose page starts with a measured example and its picture."""

from __future__ import annotations

import html
import importlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo

from ..files import replace_folder
from ..metrics import metric_path
from ..metrics.page import parse_rows
from .commit import MESSAGE, Destination
from .staging import CARD

PICTURE, APP, REQUIREMENTS = "example.png", "app.py", "requirements.txt"
#: Lines of the example that the card shows.
SHOWN = 5


def push_metric(
    name: str,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Push a bundled metric to the Hub as a Space: a page to try it on, and a module for `evaluate.load`.

    Args:
        name: `"calibration"`, `"decision"`, `"selective_prediction"` or `"uncertainty"`.
        repo_id: `"user/name"`; made if it does not exist. `evaluate.load("user/name")` finds the module in it.
        private: Whether a Space that is made is private.
        revision: Branch; made from the main one if it does not exist.
        create_pr: Open a pull request instead of committing to the branch.
        commit_message: By default it names this package.
        token: For the Hub; by default the one that `huggingface_hub` knows. It is neither kept nor shown.

    Returns:
        What `huggingface_hub` says of the commit: `.commit_url`, `.oid`, `.pr_url`.

    Raises:
        ValueError: For an unknown name, or if somebody else pushed meanwhile.

    Example:
        >>> push_metric("accuracy", "user/accuracy")
        Traceback (most recent call last):
        ...
        ValueError: No bundled metric is called 'accuracy'; there are calibration, decision, ...
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_space(name, Path(scratch) / "space", repo_id=repo_id)
        where = Destination(
            repo_id, revision=revision, private=private, create_pr=create_pr, token=token, repo_type="space",
            sdk="gradio",
        )  # fmt: skip
        return where.commit(folder, commit_message or MESSAGE, (APP, REQUIREMENTS, PICTURE))


def write_space(name: str, folder: str | Path, *, repo_id: str = "user/name") -> Path:
    """Write what `push_metric` would push into a folder, to look at it first.

    Args:
        name: As for `push_metric`.
        folder: Folder to write; it must not hold anything yet.
        repo_id: As for `push_metric`: `evaluate` expects the module under the name of the repository.

    Returns:
        The folder.

    Raises:
        FileExistsError: If the folder holds something.
        ValueError: As `push_metric`.
    """
    source, out = Path(metric_path(name)), Path(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty; choose another folder.")
    page = importlib.import_module(f"{__package__.rpartition('.')[0]}.metrics.{name}.app")

    def write(place: Path) -> None:
        for file in (APP, REQUIREMENTS):
            shutil.copyfile(source / file, place / file)
        shutil.copyfile(source / f"{name}.py", place / f"{repo_id.rpartition('/')[2]}.py")
        text, rows = _example(page)
        page.figure(*rows).savefig(place / PICTURE, dpi=110)
        heading, _ = page.measure(*rows, {"input": "probabilities"})
        card = (source / CARD).read_text(encoding="utf-8")
        (place / CARD).write_text(_with_example(card, text, heading), encoding="utf-8")

    replace_folder(out, write)
    return out


def _example(page: Any) -> tuple[str, Any]:
    """The rows that a page opens with: as text, and as predictions and references."""
    text = page.EXAMPLE if hasattr(page, "EXAMPLE") else page.example()
    return text, parse_rows(text)


def _with_example(card: str, text: str, heading: str) -> str:
    """The card, its title followed by the example."""
    _, meta, body = card.split("---\n", 2)
    lead, title, rest = body.partition("\n## ")
    lines = text.splitlines()
    shown = [line if len(line) <= 100 else f"{line[:100]} ..." for line in lines[:SHOWN]]
    more = f"\n... {len(lines)} rows" if len(lines) > SHOWN else ""
    told = html.unescape(heading).removeprefix("### ")
    example = f"**An example.** {told}\n\n![{told}]({PICTURE})\n\n```\n" + "\n".join(shown) + f"{more}\n```\n"
    return f"---\n{meta}---\n{lead.rstrip()}\n\n{example}{title}{rest}"
