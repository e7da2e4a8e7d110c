"""`peft-calib decide`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..runs.flags import given, with_flags
from .command import MEASURING, PREDICTION, ROWS, command, main_console, option, say
from .options import PREDICTED, READING, WAYS, AsJson, Overwrite, how_option

LABELS = "Several labels a row, beside --risk and --confidence"
ANSWERING, SETS = "A threshold: which rows to answer", "Prediction sets: which classes to name"
#: Which rows a rule is fitted on, and how they are predicted.
FITTED_ON = {
    "data": Annotated[
        str | None, option(ROWS, "Labelled rows that nothing was fitted on, and nothing will be reported on.")
    ],
    **READING,
    "split": Annotated[str | None, option(ROWS, "Split of the data. Without --data: of the run's own.")],
    "text_column": Annotated[list[str] | None, option(ROWS, "Column of the text, of an adapter that is no run.")],
    "label_column": Annotated[str | None, option(ROWS, "Column of the label, of an adapter that is no run.")],
    "how": how_option(tuple(way for way in WAYS if way != "linear")),  # linear has no temperature
    **{name: PREDICTED[name] for name in ("num_samples", "batch_size", "base_model")},
}


@command(
    "decide",
    panel=MEASURING,
    examples=(
        "run --data decide.csv --risk 0.05",
        "run --data decide.csv --alpha 0.1 --score aps --randomized",
    ),
    after_interrupt="Interrupted. No rule was written; run the same command again.",
)
@with_flags(FITTED_ON)
def decide(
    adapter: Annotated[Path, typer.Argument(help="Folder of a finished run, or of an adapter.")],
    risk: Annotated[
        float | None,
        option(ANSWERING, "Of what is answered at most this share is wrong. Default: 0.05, of labels 0.1."),
    ] = None,
    target_coverage: Annotated[
        float | None, option(ANSWERING, "Instead: at least this share of the rows is answered.")
    ] = None,
    costs: Annotated[
        tuple[float, float] | None,
        option(ANSWERING, "Instead: costs of a wrong answer and of a row passed on.", metavar="<wrong> <passed on>"),
    ] = None,
    per_class: Annotated[bool, option(ANSWERING, "The risk holds for each answered class.", "--per-class")] = False,
    confidence: Annotated[
        float | None, option(ANSWERING, "Probability with which the promise holds. Default: 0.95.")
    ] = None,
    miss: Annotated[
        float | None,
        option(LABELS, "Of the rows that have a label at most this share is said not to. Default: none is ruled out."),
    ] = None,
    each_label: Annotated[
        bool, option(LABELS, "The promise is for each label by itself, not for all at once.", "--each-label")
    ] = False,
    by: Annotated[
        str,
        option(ANSWERING, "probability (of the predicted class), or head (1 - P(error) of the uncertainty head)."),
    ] = "probability",
    alpha: Annotated[
        float | None,
        option(SETS, "Highest share of sets that may miss the label: asks for sets. Of numbers: of intervals."),
    ] = None,
    score: Annotated[
        str | None, option(SETS, "lac, aps or raps; of intervals absolute or normalised. Default: the first.")
    ] = None,
    groups: Annotated[str | None, option(SETS, "label or predicted: the coverage holds for each class.")] = None,
    randomized: Annotated[bool, option(SETS, "Chance decides at the edge of a set.", "--randomized")] = False,
    sets_confidence: Annotated[
        float | None, option(SETS, "Probability with which the coverage holds. Default: it holds on average.")
    ] = None,
    seed: Annotated[int, option(PREDICTION, "Key of the draws, and of what is left to chance.")] = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    **rows: Any,
) -> dict[str, Any]:
    """Fit a rule with a guarantee: which rows to answer at a risk, or a set of classes that holds the label.

    It is fitted on rows that the run has not seen and kept beside the adapter, for its temperature and way of
    predicting. predict then adds the columns answered and set, evaluate says what the rule reaches on other rows.
    Of a tagger's run the threshold is over entities.
    """
    from ..runs.deciding import decide as fit

    console = main_console()
    asked = {"risk": risk, "target_coverage": target_coverage, "costs": costs, "alpha": alpha, "score": score}
    asked |= {"groups": groups, "sets_confidence": sets_confidence, "miss": miss}
    flags: dict[str, Any] = {
        "per_class": per_class,
        "each_label": each_label,
        "confidence": confidence,
        "by": by,
        "randomized": randomized,
    }
    flags |= {"seed": seed, "overwrite": overwrite, "progress": console.is_terminal}
    found = fit(adapter, **flags, **given(asked), **given(rows))
    if not as_json:
        say(console, found.lines())
    return found.to_dict()
