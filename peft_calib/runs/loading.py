"""A finished run, ready to predict."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..artefact import DECISION_FILES, Artefact
from ..base_models import base_fingerprint
from ..calibration import TemperatureScaling
from ..calibration.recalibrate import FittedMethod, load_state
from ..calibration.recalibrate.temperature import POSSIBLE
from ..console import own_random_state
from ..files import file_hash
from ..identity import folder_digest
from ..json_files import Fields
from ..prediction import predict_dataset
from ..prediction.members import predict_members
from ..provenance.run_temperatures import check_temperatures
from ..provenance.splits import SplitRecord, read_split
from ..uncertainty_head.stored import file_names
from .folder import RunFolder, read_fields, read_json
from .methods import ADAPTER, config_class, member_names, prediction_variants
from .processes import processes
from .settings import RunConfig
from .stage import load_base, load_tokenizer
from .tasks import Task, task_class

#: Of `config.json` and `run.json`.
FORMAT_VERSION = 1


@dataclass(frozen=True)
class FinishedRun:
    """A run's adapters on their base model."""

    folder: RunFolder
    task: Task
    tokenizer: PreTrainedTokenizerBase
    model: PeftModel
    adapter_names: tuple[str, ...]

    @classmethod
    def load(cls, path: str | Path) -> FinishedRun:
        folder = RunFolder(Path(path).absolute())
        return cls.assemble(folder, load_task(folder))

    @classmethod
    def assemble(cls, folder: RunFolder, task: Task) -> FinishedRun:
        """Put the adapters of complete stages onto a fresh base model."""
        names = adapter_names(task.config)
        tokenizer = load_tokenizer(task.config)
        with own_random_state():
            base = load_base(task, tokenizer)
            model = PeftModel.from_pretrained(base, folder.adapter(names[0]), adapter_name=names[0])
            for name in names[1:]:
                model.load_adapter(folder.adapter(name), adapter_name=name)
        return cls(folder, task, tokenizer, model.eval().to(processes().device), names)

    @property
    def variants(self) -> dict[str, int]:
        """How the run predicts: variant to number of draws."""
        return prediction_variants(self.task.config)

    def _stored(self, variant: str) -> Fields:
        """What is stored of a variant's fit; a `ValueError` where it was changed by hand."""
        check_temperatures(self.folder.path)
        return read_fields(self.folder.temperature).mapping(variant)

    def temperature(self, variant: str) -> TemperatureScaling:
        return TemperatureScaling.from_state(self._stored(variant))

    def temperature_fit(self, variant: str) -> dict[str, Any] | None:
        """What the calibration rows say of the temperature: interval, and whether it is used; `None` in old runs."""
        fit = self._stored(variant).mapping("fit", None)
        return None if fit is None else dict(fit.content)

    def text_temperature(self, variant: str) -> float:
        parameters = self._stored(variant).mapping("parameters")
        return float(parameters.number("temperature", least=POSSIBLE[0], most=POSSIBLE[1]))

    def method(self, variant: str) -> FittedMethod | None:
        """What was fitted to a way of predicting labels or numbers; None where there were too few rows."""
        fields = self._stored(variant)
        return load_state(fields) if "method" in fields else None

    def predict(self, rows: Dataset, variant: str, num_samples: int, seed: int = 0, progress: bool = True) -> Any:
        """Predict canonical rows; `num_samples` are grid points of a curve, members of an ensemble."""
        encoded = self.task.encode_prediction(rows, self.tokenizer)
        options: dict[str, Any] = {
            "batch_size": self.task.inputs().batch_size,
            "processing_class": self.tokenizer,
            "task": self.task.predict_task,
            "label_tokens": self.task.answer_tokens(self.tokenizer),
            "progress": progress,
        }
        if len(self.adapter_names) > 1:
            return predict_members(self.model, encoded, self.adapter_names[:num_samples], **options)
        return predict_dataset(self.model, encoded, how=variant, num_samples=num_samples, seed=seed, **options)  # type: ignore[arg-type]

    def artefact(self) -> Artefact:
        """What a prediction needs of the run, for the folders of its adapters as the run names them."""
        check_temperatures(self.folder.path)
        described = self.task.described(self.tokenizer, base_fingerprint(self.model))
        adapters = adapter_digests(self.folder, self.task.config)
        return described.with_temperatures(read_fields(self.folder.temperature), adapters)


def load_task(folder: RunFolder) -> Task:
    """Task, settings and classes of a finished run."""
    if not folder.finished.is_file() or not folder.config.is_file():
        begun = ", only one that was begun: continue it with peft-calib train" if folder.config.is_file() else ""
        raise FileNotFoundError(f"{folder.path} holds no finished run{begun}")
    resolved = read_fields(folder.config)
    if not resolved.has_version(FORMAT_VERSION):
        raise resolved.wrong("format_version", f"{FORMAT_VERSION}, which this release reads")
    try:
        config = RunConfig.from_mapping(dict(resolved.mapping("settings").content))
        config_class(config.method)  # one from outside is known to PEFT once it is imported
        stored = resolved.mapping("labels", None)
        kind = task_class(config.task)
        labels = None if stored is None else kind.learned.from_dict(dict(stored.content))
        return kind(config, labels)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder.config} is damaged: {type(error).__name__} {error}. {resolved.mend}.") from error
    except ValueError as error:
        raise error if str(folder.config) in str(error) else ValueError(f"{folder.config}: {error}") from error


def adapter_digests(folder: RunFolder, config: RunConfig) -> dict[str, str]:
    """What the adapters of a run are, by name."""
    return {name: folder_digest(folder.adapter(name)) for name in adapter_names(config)}


def run_identity(folder: RunFolder, config: RunConfig) -> dict[str, Any]:
    """All that an evaluation of a run hangs on: adapters, settings, classes, temperatures, head and decision rules."""
    settings = read_json(folder.config)
    check_temperatures(folder.path)
    temperatures = read_fields(folder.temperature)
    head = head_hash(folder, config)
    rules = decision_hashes(folder, config)
    return {
        "adapters": adapter_digests(folder, config),
        "settings": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "temperatures": {n: _used(temperatures.mapping(n).mapping("parameters")) for n in temperatures},
        **({} if head is None else {"uncertainty_head": head}),
        **({} if not rules else {"decisions": rules}),
    }


def _used(parameters: Fields) -> Any:
    """A temperature, or whatever else was fitted."""
    return parameters.get("temperature", None) or dict(parameters.content)


def head_folder(folder: RunFolder, config: RunConfig) -> Path:
    """Where the uncertainty head of a run lies: beside its adapter, or above the members of an ensemble."""
    names = adapter_names(config)
    return folder.adapter(ADAPTER) if names == (ADAPTER,) else folder.path


def head_hash(folder: RunFolder, config: RunConfig) -> str | None:
    """What the uncertainty head of a run is; None where there is none."""
    place = head_folder(folder, config) / file_names("default")[1]  # it knows the other file
    return file_hash(place) if place.is_file() else None


def decision_hashes(folder: RunFolder, config: RunConfig) -> dict[str, str]:
    """What the decision rules of a run are, by kind."""
    paths = {kind: head_folder(folder, config) / name for kind, name in DECISION_FILES.items()}
    return {kind: file_hash(path) for kind, path in paths.items() if path.is_file()}


def adapter_names(config: RunConfig) -> tuple[str, ...]:
    """The adapters of a run; several for an ensemble."""
    return tuple(member_names(config)) if config.method == "ensemble" else (ADAPTER,)


def read_record(folder: RunFolder, task: Task) -> SplitRecord:
    """Which rows a run was trained and calibrated on."""
    return read_split(folder.adapter(adapter_names(task.config)[0]))
