"""`push_to_hub`: an adapter, its report and its card, in one commit or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from torch import nn

from ..files import replace_folder
from .commit import MESSAGE, Destination
from .facts import Measurement, Report, Subject
from .staging import CARD, MANAGED, stage


def push_to_hub(
    source: nn.Module | str | Path,
    repo_id: str,
    *,
    report: Report | Mapping[str, Report] | Measurement | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
    **about: Any,
) -> CommitInfo:
    """Upload an adapter that others can use with or without this package, with a card of its calibration.

    One commit holds the adapter with what a prediction needs (`predictor.json`), `lora/` with its deterministic
    function as a plain LoRA, every score as JSON, pictures, and a card: what it predicts, scores before and after the
    recalibration with intervals and noise floor, how it is used, which rows, seeds and versions that rests on. The
    card is read back with the Hub's own library and compared before anything is sent. Files of an earlier push that
    this one does not have are taken away; what others put there stays.

    Args:
        source: A `PeftModel`, the folder of a saved adapter, or that of a finished run, whose evaluations are then on
            the card.
        repo_id: `"user/name"`; made if it does not exist.
        report: What was measured of it: a report of `calibration_report`, `labels_report`, `numbers_report` or
            `entities_report`, or two as `{"before": ..., "after": ...}` a recalibration; a
            `peft_calib.hub.Measurement` says the name of the rows and the temperature, too.
        private: Whether a repository that is made is private.
        revision: Branch; made from the main one if it does not exist.
        create_pr: Open a pull request instead of committing to the branch.
        commit_message: By default it names this package.
        token: For the Hub; by default the one that `huggingface_hub` knows. It is neither kept nor shown.
        about: Fields of `peft_calib.hub.Subject`: `base_model`, `dataset`, `license`, `language`, `intended_use`, ...

    Returns:
        What `huggingface_hub` says of the commit: `.commit_url`, `.oid`, `.pr_url`.

    Raises:
        ValueError: If the base model is a folder of this machine and no `base_model` is given, the card would not be
            read as it is meant, or somebody else pushed meanwhile.
        TypeError: For another source, or unknown fields.

    Example:
        >>> push_to_hub("nowhere", "user/name")
        Traceback (most recent call last):
        ...
        FileNotFoundError: nowhere holds neither an adapter (adapter_config.json) nor a finished run (run.json). ...
    """
    subject, measured = _subject(about), _measured(report)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "push"
        folder.mkdir()
        stage(source, folder, repo_id, measured, subject)
        where = Destination(repo_id, revision=revision, private=private, create_pr=create_pr, token=token)
        return where.commit(folder, commit_message or MESSAGE, MANAGED)


def write_card(
    source: nn.Module | str | Path,
    folder: str | Path,
    *,
    repo_id: str = "user/name",
    report: Report | Mapping[str, Report] | Measurement | None = None,
    **about: Any,
) -> Path:
    """Write what `push_to_hub` would push into a folder, to look at it first.

    Args:
        source: As for `push_to_hub`.
        folder: Folder to write; it must not hold anything yet. It appears complete or not at all.
        repo_id: Name that the card gives.
        report: As for `push_to_hub`.
        about: As for `push_to_hub`.

    Returns:
        The card, `README.md` in the folder.

    Raises:
        FileExistsError: If the folder holds something.
        ValueError: As `push_to_hub`.
    """
    out = Path(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty; choose another folder.")
    subject, measured = _subject(about), _measured(report)
    return replace_folder(out, lambda place: stage(source, place, repo_id, measured, subject)) / CARD


def _subject(about: dict[str, Any]) -> Subject:
    known = [field.name for field in fields(Subject)]
    unknown = sorted(set(about) - set(known))
    if unknown:
        raise TypeError(f"Unknown: {', '.join(unknown)}. A card tells {', '.join(known)}.")
    return Subject(**about)


def _measured(report: Any) -> tuple[Measurement, ...]:
    if report is None:
        return ()
    if isinstance(report, Measurement):
        return (report,)
    if isinstance(report, Report):
        return (Measurement.of(report),)
    if isinstance(report, Mapping) and set(report) == {"before", "after"}:
        return (Measurement.of(report["after"], report["before"]),)
    raise TypeError(
        "report must be what calibration_report (or labels_report, numbers_report, entities_report) returned, or "
        "{'before': ..., 'after': ...} of two; got "
        f"{type(report).__name__}."
    )
