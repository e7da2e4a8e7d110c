"""Checkpoints that were written to the end, told from those a crash cut short."""

from __future__ import annotations

import json
import warnings
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peft_calib.files import file_hash, write_atomically

from .adapter_state import barrier, check_readable, write_adapter

#: Written last: names, sizes and hashes of everything in a checkpoint.
MANIFEST = "checkpoint_manifest.json"
FORMAT_VERSION = 1
WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json", "adapter_model.bin")


class CheckpointGuardCallback(TrainerCallback):
    """Seals every checkpoint of the Trainer once all of it is written, and refuses to resume from a damaged one.

    The Trainer writes a checkpoint file by file, and `resume_from_checkpoint=True` takes the newest folder, whole or
    not. With this callback the last file of a checkpoint is a list of all others with their hashes; resuming from a
    folder that does not agree with its list, or is plainly incomplete, is refused before the first step. Resume with

        trainer.train(resume_from_checkpoint=last_complete_checkpoint(output_dir))

    Put it last in `callbacks=[...]`, so that what other callbacks add to a checkpoint is sealed too.

    Example:
        >>> callback = CheckpointGuardCallback()  # Trainer(..., callbacks=[callback])
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        barrier()
        folder = checkpoint_folder(args, state)
        if args.should_save and folder.is_dir():
            seal_checkpoint(folder)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        folder = checkpoint_folder(args, state)
        if state.global_step == 0 or not folder.is_dir():
            return
        problems = checkpoint_problems(folder)
        if problems:
            raise ValueError(
                f"The checkpoint {folder} is not complete: {'; '.join(problems)}. It was probably being written when "
                "the run was stopped. Resume from the one before: trainer.train(resume_from_checkpoint="
                "last_complete_checkpoint(output_dir))."
            )


class ConsolidatedAdapterCallback(TrainerCallback):
    """Writes the adapter whole beside sharded checkpoints, so that it loads anywhere.

    With FSDP's `SHARDED_STATE_DICT` the Trainer writes shards only, which need the same kind of launch to be read.
    This callback gathers the adapter, which is small, into `<checkpoint>/adapter` at every save and into
    `<output_dir>/adapter` when training ends: folders that `PeftModel.from_pretrained` loads in one process. Put it
    before `CheckpointGuardCallback`, and after `BestCalibrationCallback`.

    Example:
        >>> callback = ConsolidatedAdapterCallback()  # Trainer(..., callbacks=[callback])
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        check_readable(kwargs["model"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        write_adapter(kwargs["model"], checkpoint_folder(args, state) / "adapter")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        write_adapter(kwargs["model"], Path(args.output_dir) / "adapter")


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint below a folder that was written to the end.

    Works with and without `CheckpointGuardCallback`: sealed checkpoints are compared with their list, others are
    checked for missing and truncated files. Incomplete ones are skipped with a warning that says why.

    Args:
        output_dir: Of the Trainer.

    Returns:
        Its path, for `trainer.train(resume_from_checkpoint=...)`; None where there is none, which starts afresh.

    Example:
        >>> import tempfile
        >>> print(last_complete_checkpoint(tempfile.mkdtemp()))
        None
    """
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/")
    found = [folder for folder in folders if folder.name.rpartition("-")[2].isdigit()]
    for folder in sorted(found, key=lambda folder: -int(folder.name.rpartition("-")[2])):
        problems = checkpoint_problems(folder)
        if not problems:
            return str(folder)
        warnings.warn(
            f"{folder} is skipped, because it is not complete: {'; '.join(problems)}.", UserWarning, stacklevel=2
        )
    return None


def seal_checkpoint(folder: str | Path) -> None:
    """Write the list of a checkpoint's files, with sizes and hashes."""
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    listed = {}
    for path in files:
        listed[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": file_hash(path)}
    text = json.dumps({"format_version": FORMAT_VERSION, "files": listed}, indent=1)
    write_atomically(folder / MANIFEST, text + "\n")


def checkpoint_problems(folder: str | Path) -> list[str]:
    """What is wrong with a checkpoint, in words; empty if it is complete."""
    folder = Path(folder)
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return _visible_problems(folder)
    except (ValueError, KeyError, TypeError):
        return [f"{MANIFEST} cannot be read"]
    problems = []
    for name, entry in listed.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry["size"]:
            problems.append(f"{name} has {path.stat().st_size} of {entry['size']} bytes")
        elif file_hash(path) != entry["sha256"]:
            problems.append(f"{name} has changed")
    return problems


def _visible_problems(folder: Path) -> list[str]:
    """Problems that show without a list: missing files, and files that end too early."""
    entries = [path.name for path in folder.iterdir()]
    # sharded checkpoints have folders instead of some files
    sharded = any(path.is_dir() and any(path.iterdir()) for path in folder.iterdir())
    needed = ["trainer_state.json"] if sharded else ["trainer_state.json", "scheduler.pt", "optimizer.pt"]
    problems = [f"{name} is missing" for name in needed if name not in entries]
    if not sharded and not any(name in entries for name in WEIGHTS):
        problems.append(f"{WEIGHTS[0]} is missing")
    if not any(name.startswith("rng_state") for name in entries):
        problems.append("rng_state.pth is missing")
    ranks = sorted(int(n[10:-4]) for n in entries if n.startswith("rng_state_") and n[10:-4].isdigit())
    if ranks and ranks != list(range(len(ranks))):
        problems.append("the random state of a process is missing")
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not _is_whole(path):
            problems.append(f"{path.relative_to(folder).as_posix()} is cut short")
    return problems


def _is_whole(path: Path) -> bool:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):  # holds the header against the size
                return True
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, SafetensorError):
        return False
    return path.suffix not in (".pt", ".pth", ".bin") or zipfile.is_zipfile(path)


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer writes the checkpoint of this step."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
