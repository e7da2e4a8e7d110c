"""`peft-calib export`: a finished run as ordinary LoRA folders, for software that has never heard of this package."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..artefact import ARTEFACT_FILE, DECISION_FILES, Artefact, read_artefact
from ..console import quiet
from ..draws_index import write_draws_index
from ..export import export_lora
from ..files import replace_folder
from ..provenance.companions import attach_file
from ..provenance.exported_decisions import export_decisions_of_draws
from ..provenance.stored_decision import StoredDecision, read_decisions
from .folder import STAGE, RunFolder
from .loading import FinishedRun, adapter_names, head_folder, load_task
from .methods import ADAPTER


def export_run(
    run_dir: str | Path,
    output_dir: str | Path,
    *,
    num_samples: int | None = None,
    t: float | None = None,
    seed: int = 0,
) -> Path:
    """Write a run's adapter as a plain LoRA, or several of its draws: an ensemble's are its members."""
    folder = RunFolder(Path(run_dir).absolute())
    task = load_task(folder)
    method = task.config.method
    if t is not None and method != "curve-lora":
        raise ValueError(f"t is a point of a curve; a run of {method} has none")
    if num_samples is not None and method in ("lora", "hyper-lora"):
        raise ValueError(f"a run of {method} is deterministic: it has no draws to export")
    if method == "lora":
        return _copied({".": folder.adapter(ADAPTER)}, Path(output_dir))
    if method == "ensemble":
        names = adapter_names(task.config)
        count = len(names) if num_samples is None else num_samples
        if not 1 <= count <= len(names):
            raise ValueError(f"the ensemble has {len(names)} members, {count} were asked for")
        members = {f"draw-{k}": folder.adapter(name) for k, name in enumerate(names[:count])}
        rules = list(read_decisions(head_folder(folder, task.config)).values())
        return _copied(members, Path(output_dir), read_artefact(folder.path), rules)
    options: dict[str, Any] = {"num_samples": num_samples, "seed": seed}
    if t is not None:
        options["t"] = t
    with quiet():
        run = FinishedRun.assemble(folder, task)
        attach_file(run.model, ARTEFACT_FILE, run.artefact().text(), ADAPTER)
        for one in read_decisions(head_folder(folder, task.config)).values():
            attach_file(run.model, DECISION_FILES[one.kind], one.text(), ADAPTER)
        return export_lora(run.model, output_dir, adapter_name=ADAPTER, **options)


def _copied(
    sources: dict[str, Path], out: Path, told: Artefact | None = None, rules: Sequence[StoredDecision] = ()
) -> Path:
    """Copy adapters, by their place in a folder that appears whole or not at all; several as `load_frozen` reads."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty; choose another folder")

    def write(folder: Path) -> None:
        for name, source in sources.items():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns(STAGE), dirs_exist_ok=True)
        if "." not in sources:
            write_draws_index(folder, list(sources), None, seed=None)
            if told is not None:
                told.exported_draws(folder, list(sources))
                left_out.extend(export_decisions_of_draws(rules, told, folder, list(sources), None, None))

    left_out: list[str] = []
    written = replace_folder(out, write)
    for why in left_out:
        warnings.warn(f"{out} holds these members without a decision: {why}.", UserWarning, stacklevel=3)
    return written
