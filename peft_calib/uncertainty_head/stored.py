"""An uncertainty head in files beside its adapter: safetensors and JSON, read strictly."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..calibration.recalibrate import load_state
from ..calibration.recalibrate.base import Recalibrator
from ..fetching import local_folder
from ..files import file_hash
from ..json_files import Fields, read_json, sealed
from .asked import Asked, Belonging
from .grid import HeadSettings
from .mapping import PlattScaling
from .report import HeadReport

#: How the files of the head that goes by no other name begin. They lie in the adapter's own folder: what lies in a
#: folder inside it is not taken along by transformers' `push_to_hub`.
STEM = "uncertainty_head"
FORMAT_VERSION = 1
MEND = "Fit the uncertainty head again, or restore the file"


@dataclass(frozen=True, eq=False)
class StoredHead:
    """All that a head is, apart from the frozen one that it starts at.

    Attributes:
        settings: How it was fitted.
        asked: How the model is asked; None where it was fitted to features.
        belongs: What it belongs to; None where that is unknown.
        deltas: How far each trained tensor is from its start; None where the base score stayed.
        prior: Share of errors that balanced scores are corrected for; None where none are.
        calibration: The map to P(error); None for the score itself.
        report: What was fitted, on what, and what it is worth.
    """

    settings: HeadSettings
    asked: Asked | None
    belongs: Belonging | None
    deltas: Mapping[str, torch.Tensor] | None
    prior: float | None
    calibration: Recalibrator | None
    report: HeadReport

    def files(self, name: str = "default") -> dict[str, bytes]:
        """Content of each file; the JSON file knows the other one, since both are not replaced in one step."""
        tensors, content = self._content()
        said = json.dumps(sealed(content), indent=1, allow_nan=False) + "\n"
        return dict(zip(file_names(name), (tensors, said.encode()), strict=True))

    def _content(self) -> tuple[bytes, dict[str, Any]]:
        tensors = save({name: delta.contiguous() for name, delta in (self.deltas or {}).items()})
        content: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "settings": asdict(self.settings),
            "asked": None if self.asked is None else asdict(self.asked),
            "belongs": None if self.belongs is None else asdict(self.belongs),
            "trained": self.deltas is not None,
            "weights": hashlib.sha256(tensors).hexdigest(),
            "prior": self.prior,
            "calibration": None if self.calibration is None else self.calibration.state(),
            "report": self.report.to_dict(),
        }
        return tensors, content

    @property
    def digest(self) -> str:
        """One text for all of the head."""
        tensors, content = self._content()
        said = json.dumps(content, indent=1, allow_nan=False) + "\n"  # as files had it before they were sealed
        return hashlib.sha256(tensors + said.encode()).hexdigest()

    @classmethod
    def read(cls, folder: str | Path, name: str = "default") -> StoredHead:
        """The inverse of `files`, checked.

        Raises:
            FileNotFoundError: If there is no head.
            ValueError: If a file is damaged; the message names it, the field and how to mend it.
        """
        weights, config = (Path(folder) / file for file in file_names(name))
        missing = next((file.name for file in (config, weights) if not file.is_file()), None)
        if missing is not None:
            raise FileNotFoundError(f"{folder} holds no uncertainty head {name!r}: there is no {missing} in it.")
        fields = read_json(config, MEND)
        if not fields.has_version(FORMAT_VERSION):
            raise fields.wrong("format_version", f"{FORMAT_VERSION}, which this release reads")
        if fields.text("weights") != file_hash(weights):
            raise ValueError(f"{weights} is damaged, or is that of another head than {config.name}. {MEND}.")
        asked, belongs = fields.mapping("asked", None), fields.mapping("belongs", None)
        calibration = fields.mapping("calibration", None)
        found = cls(
            settings=_settings(fields.mapping("settings")),
            asked=None if asked is None else Asked.from_fields(asked),
            belongs=None if belongs is None else Belonging.from_fields(belongs),
            deltas=_tensors(weights) if fields.flag("trained") else None,
            prior=fields.number("prior", above=0, most=1, default=None),
            calibration=None if calibration is None else _calibration(calibration),
            report=HeadReport.from_fields(fields.mapping("report")),
        )
        fields.check_seal("the head")
        return found


def file_names(name: str) -> tuple[str, str]:
    """Names of a head's files: tensors, and what they mean."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"The name of a head is letters, digits, - and _, got {name!r}.")
    stem = STEM if name == "default" else f"{STEM}.{name}"
    return f"{stem}.safetensors", f"{stem}.json"


def folder_of_head(folder: str | Path, name: str, **hub: Any) -> Path:
    """Where the files of a head lie, fetched from the Hub if they are not here."""
    return local_folder(folder, [*file_names(name), CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME], "head", **hub)


def adapter_there(repo_id: str, token: str | bool | None, revision: str | None) -> Path | None:
    """The adapter of a repository on the Hub, fetched; None where there is none, or the Hub must not be asked."""
    try:
        if not HfApi(token=token).file_exists(repo_id, SAFETENSORS_WEIGHTS_NAME, revision=revision):
            return None
    except OfflineModeIsEnabled:
        return None  # nothing can be uploaded either
    wanted = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME]
    return Path(snapshot_download(repo_id, allow_patterns=wanted, token=token, revision=revision))


def upload(files: Mapping[str, bytes], repo_id: str, token: str | bool | None, **hub: Any) -> Any:
    """Put files into a repository on the Hub, which is made if it is not there, in one commit."""
    api = HfApi(token=token)
    api.create_repo(repo_id, private=hub.pop("private", None), exist_ok=True)
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    message = hub.pop("commit_message", "Upload uncertainty head")
    return api.create_commit(repo_id, operations, commit_message=message, **hub)


def _settings(fields: Fields) -> HeadSettings:
    try:
        return HeadSettings.of(**fields.content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{fields.source}: settings: {error} {fields.mend}.") from error


def _calibration(fields: Fields) -> Recalibrator:
    if fields.text("method") == PlattScaling.__name__:
        return PlattScaling.from_state(fields)
    return load_state(fields)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        found = load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged and cannot be read ({error}). {MEND}.") from error
    # in memory of their own: what lies where a file put it may round otherwise
    tensors = {name: tensor.clone() for name, tensor in found.items()}
    if not all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ValueError(f"{path} must hold finite float32 tensors. {MEND}.")
    return tensors
