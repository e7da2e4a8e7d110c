"""The folder of a run: what lies where, and when it may be written to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import json_files
from ..artefact import RUN_CONFIG, RUN_FINISHED, RUN_TEMPERATURE
from ..files import clear_leftovers, folder_lock, write_atomically
from ..json_files import Fields, without_nan

STAGE = "stage.json"


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run: `config.json` comes first, a folder for each adapter when it is complete, `run.json` last."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / RUN_CONFIG

    @property
    def finished(self) -> Path:
        return self.path / RUN_FINISHED

    @property
    def temperature(self) -> Path:
        return self.path / RUN_TEMPERATURE

    @property
    def plain_lora(self) -> Path:
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
        """Raise unless a run may be made or continued here; nothing is touched."""
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
        differing = self._differing(resolved)
        if differing:
            listed = "; ".join(f"{name}: {before!r} there, {now!r} now" for name, (before, now) in differing.items())
            raise ValueError(
                f"{self.path} was begun with another configuration ({listed}). Use the same to continue it, name "
                "another folder, or pass --overwrite to begin anew"
            )

    def _differing(self, resolved: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Settings that are not those the folder was begun with: there and now."""
        before, now = _flat(read_json(self.config)), _flat(json.loads(json.dumps(resolved)))
        return {n: (before.get(n), now.get(n)) for n in {**before, **now} if before.get(n) != now.get(n)}

    @property
    def successor(self) -> RunFolder:
        """Where the run that replaces this one is made: beside it, so that this one stands until that is finished."""
        return RunFolder(self.path.with_name(f".{self.path.name}.next"))

    @contextmanager
    def written_by_this_process(self) -> Iterator[None]:
        """Keep other processes from writing the folder."""
        clear_leftovers(self.path)  # what a killed process had moved aside comes back
        with folder_lock(self.path):
            yield

    def begin(self, resolved: Mapping[str, Any], anew: bool = False) -> None:
        """Write the configuration, or go on with what was begun; `anew` gives up what had another configuration."""
        if anew and self.config.exists() and self._differing(resolved):
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.config.exists():
            write_json(self.config, resolved)


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file of ours."""
    return dict(read_fields(path).content)


def read_fields(path: Path) -> Fields:
    """The same, to be read field by field, each with its type and range."""
    return json_files.read_json(path, "Restore it from a copy, or train the run again")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that a reader finds all of it or nothing."""
    write_atomically(path, json.dumps(without_nan(content), indent=2, allow_nan=False) + "\n")


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
