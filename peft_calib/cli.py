"""The command line: ``peft-calib``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["main"]

app = typer.Typer(
    name="peft-calib",
    help="Calibrated LoRA fine-tuning: train, and learn how far to trust the probabilities.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Keeps ``demo`` a sub-command while it is the only one."""


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="Folder for the report, the picture and the adapters.")] = Path(
        "demo-out"
    ),
    data: Annotated[
        str,
        typer.Option(
            help="'documentation' (embedded), a .csv/.tsv/.json/.jsonl/.parquet file, a folder, or a Hub id."
        ),
    ] = "documentation",
    subset: Annotated[str | None, typer.Option(help="Configuration name of a Hub data set.")] = None,
    text_column: Annotated[list[str] | None, typer.Option(help="Column of the text; twice for pairs. [text]")] = None,
    label_column: Annotated[str, typer.Option(help="Column of the label.")] = "label",
    outside: Annotated[
        str | None,
        typer.Option(help="Out-of-distribution texts: a file, a folder or a Hub id with the same text column."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="A Hub id or a folder. [the embedded all-MiniLM-L6-v2]")] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 8,
    target_modules: Annotated[str, typer.Option(help="'all-linear', or names separated by commas.")] = "all-linear",
    epochs: Annotated[float, typer.Option(min=0.0, help="Passes over the training rows.")] = 8,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Of AdamW, with a linear decay.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per optimiser step.")] = 32,
    max_length: Annotated[int, typer.Option(min=4, help="Tokens a text is cut to.")] = 128,
    max_train_rows: Annotated[int | None, typer.Option(min=1, help="Train on at most this many rows.")] = None,
    seed: Annotated[int, typer.Option(help="Of the splits, the head, the adapters and the order of the rows.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished run in the folder.")] = False,
) -> None:
    """Fine-tune with plain LoRA, HyperLoRA and BayesianLoRA, and print how calibrated each is.

    With no option: the embedded encoder on real sentences from the documentation of installed libraries ("which
    library does this sentence document?"), in a few minutes on two cores and without a network.
    """
    console = Console()
    start = time.perf_counter()
    with console.status("loading libraries"):
        from .demo.data import load_text_data
        from .demo.run import check_output_dir, run_demo
        from .demo.training import TrainingSettings

    check_output_dir(output_dir, overwrite)
    columns = text_column or ["text"]
    with console.status("reading the data"):
        rows = load_text_data(
            data,
            text_column=columns,
            label_column=label_column,
            subset=subset,
            outside=outside,
            max_train_rows=max_train_rows,
            seed=seed,
        )
    console.print(
        f"{len(rows.train)} rows to train on, {len(rows.calibration)} to calibrate on, {len(rows.test)} to test on"
        f" ({time.perf_counter() - start:.0f} s)"
    )
    settings = TrainingSettings(model, epochs, learning_rate, batch_size, max_length, seed)
    targets = target_modules if target_modules == "all-linear" else target_modules.split(",")
    run_demo(rows, settings, output_dir, rank=rank, target_modules=targets, overwrite=overwrite, console=console)
    console.print(f"Done in {time.perf_counter() - start:.0f} s.")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``peft-calib``: what a user can mend is said in one line, everything else is a traceback."""
    try:
        app(arguments)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"peft-calib: {error}")


if __name__ == "__main__":
    main()
