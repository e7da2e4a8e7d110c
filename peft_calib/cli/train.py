"""`peft-calib train`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from ..runs.flags import resolve, setting_flags, with_flags
from .command import OUTPUT, TRAINING, command, main_console, option, say
from .options import AsJson


def _interrupted(arguments: Mapping[str, Any]) -> str:
    """What becomes of a training that was stopped by hand."""
    output_dir = Path(arguments["output_dir"])  # typer 0.20 converts it later
    if not (output_dir / "config.json").is_file():
        return f"Interrupted before anything was written to {output_dir}."
    done = [path.parent.name for path in sorted(output_dir.glob("*/stage.json"))]
    steps = [path.name.rpartition("-")[2] for path in output_dir.glob("training/*/checkpoint-*")]
    kept = [f"{', '.join(done)} (complete)"] if done else []
    if steps:
        kept.append(f"what was trained up to step {max(map(int, steps))}")
    begin = f"It keeps {' and '.join(kept)}" if kept else "No checkpoint was written yet, so it begins anew"
    return f"Interrupted. The same command continues the run in {output_dir}. {begin}."


@command(
    "train",
    panel=TRAINING,
    examples=(
        "--data reviews.csv --model roberta-base --output-dir run",
        "--config run.yaml --method bayesian-lora --output-dir bayes",
        "--task causal-lm --data t.jsonl --model gpt2 --output-dir lm",
    ),
    after_interrupt=_interrupted,
)
@with_flags(setting_flags())
def train(
    output_dir: Annotated[Path, option(OUTPUT, "Folder of the run.")],
    config: Annotated[Path | None, option(OUTPUT, "YAML file of settings; flags override it.")] = None,
    overwrite: Annotated[bool, option(OUTPUT, "Replace what the folder holds of a run.", "--overwrite")] = False,
    as_json: AsJson = False,
    **flags: Any,
) -> dict[str, Any] | None:
    """Fine-tune a model on your own data, with a calibration split held out and a temperature fitted on it.

    A run that was interrupted is continued by the same command. With several processes:
    accelerate launch -m peft_calib.cli train ...
    """
    settings = resolve(config, flags, lambda line: say(main_console(), [line]))
    from ..runs.processes import leave_processes
    from ..runs.training import train_run

    content = train_run(settings, output_dir, overwrite=overwrite)
    leave_processes()
    return {"folder": str(output_dir), **content} if content else None
