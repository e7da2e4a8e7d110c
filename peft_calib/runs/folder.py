"""The folder of a run: what lies where, and when it may be written to."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_calib.files import write_atomically

__all__ = ["RunFolder"]

CONFIG, FINISHED, TEMPERATURE, STAGE = "config.json", "run.json", "temperature.json", "stage.json"


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run.

    `config.json` (the resolved configuration) comes first, a folder for each trained adapter appears when it is
    complete, and `run.json` comes last.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / CONFIG

    @property
    def finished(self) -> Path:
        """The mark of a finished run."""
        return self.path / FINISHED

    @property
    def temperature(self) -> Path:
        """Temperatures fitted on the calibration rows."""
        return self.path / TEMPERATURE

    @property
    def plain_lora(self) -> Path:
        """The adapter as a plain LoRA."""
        return self.path / "lora"

    def adapter(self, stage: str) -> Path:
        """The adapter that a stage trained; there once it is complete."""
        return self.path / stage

    def training(self, stage: str) -> Path:
        """Checkpoints of a stage, and what was measured while it was trained."""
        return self.path / "training" / stage

    def stage_facts(self, stage: str) -> dict[str, Any] | None:
        """What a complete stage says of itself, `None` for one that is not complete."""
        file = self.adapter(stage) / STAGE
        return read_json(file) if file.is_file() else None

    def check_unfinished(self, overwrite: bool = False) -> None:
        """Raise unless a run may be made or continued here; nothing is touched.

        Raises:
            FileExistsError: if the folder is a file, holds a finished run, or something that is no run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"{self.path} is a file; name a folder")
        if self.finished.exists() and not overwrite:
            raise FileExistsError(
                f"{self.path} holds a finished run; name another folder, or pass --overwrite to replace it"
            )
        if self.path.is_dir() and any(self.path.iterdir()) and not self.config.exists():
            raise FileExistsError(f"{self.path} holds something that is no run of peft-calib; name another folder")

    def check_same_configuration(self, resolved: Mapping[str, Any]) -> None:
        """Raise `ValueError` if the folder was begun with another configuration; the message names what differs."""
        if not self.config.exists():
            return
        before, now = _flat(read_json(self.config)), _flat(json.loads(json.dumps(resolved)))
        differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if differing:
            listed = "; ".join(f"{name}: {before.get(name)!r} there, {now.get(name)!r} now" for name in differing)
            raise ValueError(
                f"{self.path} was begun with another configuration ({listed}). Use the same to continue it, name "
                "another folder, or pass --overwrite to begin anew"
            )

    def begin(self, resolved: Mapping[str, Any], overwrite: bool = False) -> None:
        """Write the configuration; with `overwrite`, what an earlier run left is removed first."""
        if overwrite and self.config.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.config.exists():
            write_json(self.config, resolved)


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file of ours.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no mapping")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that a reader finds all of it or nothing."""
    write_atomically(path, json.dumps(without_nan(content), indent=2, allow_nan=False) + "\n")


def without_nan(value: Any) -> Any:
    """NaN, where a score is not defined, as null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under one name each; those of `settings` without a prefix."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            flat |= _flat(value, "" if path == "settings" else f"{path}.")
            if not value:
                flat[path] = value
        else:
            flat[path] = value
    return flat
