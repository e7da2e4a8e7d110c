"""`peft-calib evaluate`."""

from __future__ import annotations

from typing import Annotated, Any

from ..runs.flags import with_flags
from .command import MEASURING, ROWS, command, main_console, option, say
from .options import MEASURED_ON, OUTSIDE, AsJson, RunDir, Seed

#: What says which group a row belongs to.
GROUPS = {
    "group_column": Annotated[
        str | None, option(ROWS, "Column of the rows' groups: scores, and what a decision rule reaches, in each.")
    ],
}


@command(
    "evaluate",
    panel=MEASURING,
    examples=("run --data held_out.csv", "run --data held_out.csv --metric ece --json"),
    after_interrupt="Interrupted. No report was written; run the same command again.",
)
@with_flags(MEASURED_ON | OUTSIDE | GROUPS)
def evaluate(run: RunDir, seed: Seed = 0, as_json: AsJson = False, **how: Any) -> dict[str, Any]:
    """Measure a finished run on rows it has not seen: scores with intervals, before and after its temperature.

    Of an uncertainty head and of decision rules beside the adapter it says what they are worth on these rows.
    """
    from ..runs.evaluation import evaluate_run
    from ..runs.tables import (
        decisions_told,
        evaluation_table,
        head_table,
        verdict_of_baseline,
        verdict_of_entities,
        verdict_of_head,
    )

    console = main_console()
    found = evaluate_run(run, seed=seed, progress=console.is_terminal, **how)
    if not as_json:
        console.print(evaluation_table(found.content, how["metrics"] or found.content["metrics"]))
        head = head_table(found.content)
        if head is not None:
            console.print(head)
        say(console, [f"{title}: {text}\n" for title, text in decisions_told(found.content).items()])
        say(console, [verdict_of_entities(found.content)])
        say(console, [verdict_of_head(found.content), verdict_of_baseline(found.content)])
        say(console, [f"Written to {found.folder}: report.json, report.md, report.html"])
    return {"folder": str(found.folder), **found.content}
