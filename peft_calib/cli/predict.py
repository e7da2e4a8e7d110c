"""`peft-calib predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..runs.flags import given, with_flags
from .command import MEASURING, OUTPUT, PREDICTION, ROWS, command, main_console, option, say
from .options import PREDICTED, AsJson


@command(
    "predict",
    panel=MEASURING,
    examples=("run --data new.csv --output predicted.csv", "user/name --data new.jsonl --output predicted.parquet"),
    after_interrupt="Interrupted. No output was written; run the same command again.",
)
@with_flags(PREDICTED)
def predict(
    adapter: Annotated[str, typer.Argument(help="A finished run, the folder of an adapter, or a Hub id.")],
    data: Annotated[str, option(ROWS, "The rows: a file, a folder or a Hub id. Labels are not needed.")],
    output: Annotated[
        Path,
        option(OUTPUT, "A .csv, .tsv, .json, .jsonl or .parquet file to write."),
    ],
    seed: Annotated[int, option(PREDICTION, "Key of the draws.")] = 0,
    prefix: Annotated[str, option(OUTPUT, "What to put before the names of the added columns.")] = "",
    all_probabilities: Annotated[
        bool,
        option(OUTPUT, "Add the probability of every class.", "--all-probabilities"),
    ] = False,
    overwrite: Annotated[bool, option(OUTPUT, "Replace the output if it is there.", "--overwrite")] = False,
    as_json: AsJson = False,
    **how: Any,
) -> dict[str, Any]:
    """Predict the rows of a table: label, calibrated probability, entropy and mutual information for each.

    All columns are kept, in their order, and what was predicted stands behind them. The temperature that was stored
    with the adapter is applied.
    """
    from ..runs.predicting import predict_table

    console = main_console()
    options: dict[str, Any] = {
        "seed": seed,
        "prefix": prefix,
        "all_probabilities": all_probabilities,
        "overwrite": overwrite,
    }
    found = predict_table(adapter, data, output, progress=console.is_terminal, **options, **given(how))
    if not as_json:
        say(console, found.lines())
    return found.to_dict()
