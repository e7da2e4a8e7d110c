"""`peft-calib demo`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from ..runs.flags import given, setting_flags, with_flags
from ..runs.settings import DEMONSTRATION
from .command import OUTPUT, ROWS, TRAINING, command, option
from .options import OUTSIDE, AsJson, Overwrite

#: Settings that the demonstration's runs can be given.
SETTINGS = (
    "subset", "encoding", "delimiter", "drop_missing", "text_column", "label_column", "max_length", "max_train_rows",
    "rank", "target_modules", "epochs", "learning_rate", "batch_size", "seed",
)  # fmt: skip


@command(
    "demo",
    panel=TRAINING,
    examples=("--output-dir demo-out", "--data reviews.csv --label-column mood --model roberta-base"),
    after_interrupt="Interrupted. Nothing is left of it; the same command begins anew.",
)
@with_flags(OUTSIDE | setting_flags(SETTINGS, DEMONSTRATION))
def demo(
    output_dir: Annotated[Path, option(OUTPUT, "Folder for the report, the picture and the adapters.")] = Path(
        "demo-out"
    ),
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    data: Annotated[
        str,
        option(ROWS, "'documentation' (embedded), a .csv/.tsv/.json/.jsonl/.parquet file, a folder, or a Hub id."),
    ] = "documentation",
    model: Annotated[
        str | None,
        option("Model and method", "A Hub id or a folder. Default: the embedded all-MiniLM-L6-v2."),
    ] = None,
    **settings: Any,
) -> dict[str, Any]:
    """Fine-tune with plain LoRA, HyperLoRA, BayesianLoRA and EnsembleLoRA, and print how calibrated each is.

    With no option: the embedded encoder on real sentences from the documentation of installed libraries ("which
    library does this sentence document?"), in a few minutes on two cores and without a network.
    """
    console = Console()
    start = time.perf_counter()
    from ..demo.run import check_output_dir, demo_config, run_demo

    check_output_dir(output_dir, overwrite)
    outside = settings.pop("outside")
    with console.status("reading the data"):
        config, other = demo_config(data, model, **given(settings))
    report = run_demo(config, output_dir, outside=outside or other, overwrite=overwrite, console=console)
    console.print(f"Done in {time.perf_counter() - start:.0f} s.")
    return report
