"""`peft-calib watch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..runs.flags import given, with_flags
from .command import MEASURING, OUTPUT, ROWS, command, main_console, option, say
from .options import READING, AsJson, Overwrite

STARTING = "When a watch begins"
#: What a watch begins with.
REFERENCE = {
    "data": Annotated[str | None, option(STARTING, "Labelled rows of the reference. Default: the run's test rows.")],
    "split": Annotated[str | None, option(STARTING, "Split of them. Default: test, or else validation.")],
    "reference": Annotated[
        Path | None, option(STARTING, "Instead: a file that predict wrote of labelled rows the run has not seen.")
    ],
    "how": Annotated[str | None, option(STARTING, "mean or sample. Default: draws where there are.")],
    "false_alarm": Annotated[
        float | None, option(STARTING, "Highest probability of a false alarm, ever. Default: 0.01.")
    ],
    "window": Annotated[int | None, option(STARTING, "Newest rows that estimates are of. Default: 1000.", min=10)],
    "seed": Annotated[int | None, option(STARTING, "Key of what is left to chance. Default: 0.")],
    **READING,
}


@command(
    "watch",
    panel=MEASURING,
    examples=("run", "run --predictions today.csv --metrics-file run.prom"),
    after_interrupt="Interrupted. Files that were read to their end are counted; run the same command again.",
    alarms=lambda found: found["alarmed"],
)
@with_flags(REFERENCE)
def watch(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run, or with --reference an adapter.")],
    predictions: Annotated[
        Path | None, option(ROWS, "What predict or predict_to wrote since: a file, or a folder of shards.")
    ] = None,
    prefix: Annotated[str, option(ROWS, "Of the names of its columns, as it was given to predict.")] = "",
    state: Annotated[Path | None, option(OUTPUT, "Where the watch is kept. Default: watch.json in the run.")] = None,
    metrics_file: Annotated[
        Path | None, option(OUTPUT, "Write the figures for Prometheus's textfile collector.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    **begin: Any,
) -> dict[str, Any]:
    """Watch a run after deployment: from unlabelled predictions, an alarm and the accuracy to be expected.

    The first call begins the watch, with the run's evaluation for its reference; an adapter's folder or Hub id has
    none, and begins with --reference. Ends with 3 once an alarm is raised, which chance alone ever does with the
    probability of --false-alarm at most. It stays raised: see to the model, and begin anew with --overwrite.
    """
    from ..runs.watching import watch_run

    console = main_console()
    asked = {"state": state, "metrics_file": metrics_file, "overwrite": overwrite, "progress": console.is_terminal}
    found = watch_run(run, predictions, prefix=prefix, **given(asked), **given(begin))
    if not as_json:
        say(console, found.lines())
    return found.to_dict()
