"""`peft-calib compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..runs.flags import with_flags
from .command import MEASURING, OUTPUT, PREDICTION, command, main_console, option, say
from .options import MEASURED_ON, AsJson, Seed


@command(
    "compare",
    panel=MEASURING,
    examples=("lora bayes --data held_out.csv", "lora-0 lora-1 bayes-0 bayes-1 --output compared.json"),
    after_interrupt="Interrupted. Runs that were evaluated stay so; the same command goes on with the others.",
)
@with_flags(MEASURED_ON)
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs; the first is the baseline.")],
    before: Annotated[
        bool,
        option(PREDICTION, "Compare without the runs' temperatures.", "--before"),
    ] = False,
    every_pair: Annotated[bool, option(PREDICTION, "Compare each run with each.", "--every-pair")] = False,
    output: Annotated[Path | None, option(OUTPUT, "JSON file to write; must not exist.")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    **how: Any,
) -> dict[str, Any]:
    """Compare finished runs on the rows none of them has seen, by a paired bootstrap with Holm's correction."""
    from ..runs.comparison import compare_runs, write_comparison

    if output is not None and output.exists():
        raise FileExistsError(f"{output} exists; name another file")
    console = main_console()
    how |= {"after_temperature": not before, "every_pair": every_pair, "seed": seed}
    found = compare_runs(runs, progress=console.is_terminal, **how)
    if not as_json:
        console.print(found.to_table())
        say(console, [*(pair.verdict for pair in found.comparisons), *found.verdicts])
    if output is not None:
        write_comparison(found, output)
    return found.to_dict()
