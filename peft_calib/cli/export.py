"""`peft-calib export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .command import PREDICTION, PUBLISHING, command, main_console, option, say
from .options import AsJson, RunDir, Seed


@command(
    "export",
    panel=PUBLISHING,
    examples=("run plain-lora", "run draws --num-samples 8"),
    after_interrupt="Interrupted. Nothing was written; run the same command again.",
)
def export(
    run: RunDir,
    output_dir: Annotated[Path, typer.Argument(help="Folder to write.")],
    num_samples: Annotated[
        int | None,
        option(PREDICTION, "Write this many draws. Default: the mean adapter.", min=1),
    ] = None,
    t: Annotated[float | None, option(PREDICTION, "Point of a curve.")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> dict[str, str]:
    """Write a finished run as ordinary LoRA folders, which stock PEFT and inference servers load."""
    from ..runs.exporting import export_run

    where = export_run(run, output_dir, num_samples=num_samples, t=t, seed=seed)
    if not as_json:
        say(main_console(), [f"Written to {where}"])
    return {"folder": str(where)}
