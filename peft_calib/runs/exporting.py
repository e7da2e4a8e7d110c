"""`peft-calib export`: a finished run as ordinary LoRA folders, for software that has never heard of this package."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..console import quiet
from ..draws_index import write_draws_index
from ..export import export_lora
from ..files import replace_folder
from .folder import STAGE, RunFolder
from .loading import FinishedRun, adapter_names, load_task
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
        return _copied([folder.adapter(ADAPTER)], Path(output_dir))
    if method == "ensemble":
        return _members(folder, adapter_names(task.config), Path(output_dir), num_samples)
    options: dict[str, Any] = {"num_samples": num_samples, "seed": seed}
    if t is not None:
        options["t"] = t
    with quiet():
        run = FinishedRun.assemble(folder, task)
        return export_lora(run.model, output_dir, adapter_name=ADAPTER, **options)


def _members(folder: RunFolder, names: tuple[str, ...], out: Path, num_samples: int | None) -> Path:
    """Members as draws, in the layout that `load_frozen` reads."""
    count = len(names) if num_samples is None else num_samples
    if not 1 <= count <= len(names):
        raise ValueError(f"the ensemble has {len(names)} members, {count} were asked for")
    return _copied([folder.adapter(name) for name in names[:count]], out, draws=True)


def _copied(sources: list[Path], out: Path, draws: bool = False) -> Path:
    """Copy adapters to a folder that appears whole or not at all."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty; choose another folder")

    def write(folder: Path) -> None:
        ours = shutil.ignore_patterns(STAGE)
        if not draws:
            shutil.copytree(sources[0], folder, ignore=ours, dirs_exist_ok=True)
            return
        names = [f"draw-{k}" for k in range(len(sources))]
        for source, name in zip(sources, names, strict=True):
            shutil.copytree(source, folder / name, ignore=ours)
        write_draws_index(folder, names, None, seed=None)

    return replace_folder(out, write)
