"""The folder that goes to the Hub: the adapter, its mean as a plain LoRA, report, pictures and card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn

from ..artefact import ARTEFACT_FILE, CLASSES_FILE, DECISION_FILES, RECALIBRATION_FILE, RUN_FINISHED
from ..calibration import CalibrationReport, threshold_diagram
from ..calibration.report.plots import reliability_figure, risk_coverage_diagram
from ..export import export_lora
from ..files import write_atomically
from ..identity import belongs_to_folder, read_config
from ..json_files import read_json, without_nan
from ..methods.distillation import DISTILLATION_FILE
from ..predictor.loading import load
from ..provenance.splits import SPLIT_FILE
from ..tuners.laws import laws_of
from ..uncertainty_head.stored import STEM
from .card import DECISION, RELIABILITY, REPORT_FILE, RISK, card_body
from .facts import CardFacts, Measurement, Subject, facts_of, leading
from .metadata import EVAL_RESULTS, benchmark_results, check_card, metadata_of, with_metadata
from .runs import measured_in_run

CARD, LORA = "README.md", "lora"
#: Files of an adapter that others need; what a training keeps beside it is nobody's business.
OURS = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, ARTEFACT_FILE, CLASSES_FILE, RECALIBRATION_FILE, SPLIT_FILE)
OURS += (DISTILLATION_FILE, *DECISION_FILES.values())
#: Of an uncertainty head, whatever its name.
HEADS = (f"{STEM}*.json", f"{STEM}*.safetensors")
TOKENIZER = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.jinja",
)
#: Fields of a configuration that name a folder which training began from, and no prediction asks for.
STARTS = ("init_from",)
#: Fields of a tokenizer's configuration that name a file or a folder of whoever saved it.
PLACES = (
    "name_or_path",
    "_name_or_path",
    "tokenizer_file",
    "special_tokens_map_file",
    "vocab_file",
    "merges_file",
    "cache_dir",
)
#: Files of the pictures of each kind of report, in their order.
PICTURES = {
    "classes": (RELIABILITY, RISK),
    "labels": (RELIABILITY, "reliability_labels.png"),
    "numbers": ("pit.png", "intervals.png"),
    "entities": ("reliability_entities.png",),
}
#: What an earlier push may have left that this one does not write again.
MANAGED = (f"{LORA}/", STEM, EVAL_RESULTS, REPORT_FILE, DECISION, *OURS)
MANAGED += tuple(dict.fromkeys(file for files in PICTURES.values() for file in files))


def stage(
    source: nn.Module | str | Path, folder: Path, repo_id: str, measured: Sequence[Measurement], subject: Subject
) -> CardFacts:
    """Fill a folder with all that is pushed.

    Raises:
        ValueError: If the source has no single adapter, names a base model nobody else has, or the card is not read as
            it was meant.
    """
    if isinstance(source, (str, Path)):
        place, found = _adapter_in(Path(source))
        _copy(place, folder)
        has_lora = _add_lora(Path(source), place, folder)
        measured = (*measured, *found)
    else:
        _check_model(source)
        source.save_pretrained(str(folder), selected_adapters=["default"])
        (folder / CARD).unlink(missing_ok=True)
        has_lora = any(laws_of(source, active=True)) and export_lora(source, folder / LORA).is_dir()
    facts = facts_of(folder, repo_id.rpartition("/")[2], subject, measured, has_lora)
    _name_base(folder, facts)
    pictures = _write_report(folder, facts.measured)
    if "threshold" in facts.decisions:
        threshold_diagram(facts.decisions["threshold"].rule).savefig(folder / DECISION, dpi=110)
    metadata = metadata_of(facts)
    text = with_metadata(metadata, card_body(facts, repo_id, pictures))
    check_card(text, metadata)
    for name, content in {CARD: text, **benchmark_results(facts)}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_atomically(folder / name, content)
    return facts


def _check_model(model: Any) -> None:
    if not isinstance(model, PeftModel):
        raise TypeError(f"Give a PeftModel, or the folder of an adapter or a run; got {type(model).__name__}.")
    if len(model.active_adapters) != 1 or model.active_adapters[0] != "default":
        raise ValueError(
            f"The model's active adapters are {model.active_adapters}. PEFT writes only 'default' to the top of a "
            "folder: save the adapter you mean with save_pretrained(selected_adapters=[name]) and give its folder."
        )


def _adapter_in(source: Path) -> tuple[Path, Sequence[Measurement]]:
    """Where the adapter of a folder lies, and what was measured of it there."""
    if (source / CONFIG_NAME).is_file():
        read_config(source)  # a message about a damaged file names this folder, not the one that is pushed
        return source, ()
    if not (source / RUN_FINISHED).is_file():
        raise FileNotFoundError(
            f"{source} holds neither an adapter ({CONFIG_NAME}) nor a finished run ({RUN_FINISHED}). Give the folder "
            "that peft-calib train or save_pretrained wrote."
        )
    return measured_in_run(source)


def _copy(place: Path, folder: Path) -> None:
    for pattern in (*OURS, *HEADS, *TOKENIZER):
        for file in place.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def _add_lora(source: Path, place: Path, folder: Path) -> bool:
    """The mean as a plain LoRA: that of a run, or else exported; a plain LoRA needs none."""
    if read_config(folder).peft_type == PeftType.LORA:
        return False
    made = source / LORA
    if (made / CONFIG_NAME).is_file() and _is_of_run(source, place):
        (folder / LORA).mkdir()
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
            shutil.copyfile(made / name, folder / LORA / name)
    else:
        export_lora(load(place, recalibrate=False).model, folder / LORA)
    return True


def _is_of_run(source: Path, place: Path) -> bool:
    """Whether an adapter is still the one that the run trained, and wrote as a plain LoRA.

    What lies beside another adapter says of no weights, and these may have been trained on since.
    """
    if not (source / RUN_FINISHED).is_file():
        return False
    known = read_json(source / RUN_FINISHED).mapping("adapter_digests", None)
    return known is not None and belongs_to_folder(known.text(place.name, default=None), place)


def _name_base(folder: Path, facts: CardFacts) -> None:
    """Name the base model as others load it, and leave out paths of this machine."""
    for file in (folder / CONFIG_NAME, folder / LORA / CONFIG_NAME):
        if file.is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            content["base_model_name_or_path"] = facts.base_model
            content.update({name: None for name in STARTS if name in content})
            write_atomically(file, json.dumps(content, indent=2, sort_keys=True))
    file = folder / "tokenizer_config.json"
    if file.is_file():
        content = read_json(file).content
        kept = {name: value for name, value in content.items() if name not in PLACES}
        write_atomically(file, json.dumps(kept, indent=2, ensure_ascii=False))


def _write_report(folder: Path, measured: Sequence[Measurement]) -> Mapping[str, str]:
    """The reports as JSON, and pictures of the leading one of each kind of answer; caption to file."""
    if not measured:
        return {}
    content = [
        {"way": one.way, "split": one.split, "kind": one.kind, "temperature": one.temperature,
         "recalibration": one.recalibration, "rows_digest": one.rows_digest,
         "seed": one.seed, "before": one.before, "after": one.after, "decisions": dict(one.decisions)}
        for one in measured
    ]  # fmt: skip
    text = json.dumps(without_nan(content), indent=2, allow_nan=False, default=float)
    write_atomically(folder / REPORT_FILE, text + "\n")
    pictures = {}
    for kind, one in leading([one for one in measured if one.pictures is not None]).items():
        for file, (caption, figure) in zip(PICTURES[kind], _figures(one.pictures).items(), strict=False):
            figure.savefig(folder / file, dpi=110)
            pictures[f"{caption}, {one.way}"] = file
    return pictures


def _figures(report: Any) -> Mapping[str, Any]:
    """Pictures of a report by their captions."""
    if not isinstance(report, CalibrationReport):
        return report.figures()
    found = {"Reliability diagram": reliability_figure(report.bins)}
    if report.rows is not None:
        found["Risk and coverage"] = risk_coverage_diagram((report.rows.probabilities, report.rows.labels))
    return found
