"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..runs.flags import setting_flags
from .command import OUTPUT, PREDICTION, ROWS, option

ABOUT_PANEL, COMMIT = "What the card says", "The commit"
WAYS = ("mean", "sample", "late", "linear")


def how_option(ways: tuple[str, ...]) -> Any:
    """The way of predicting, one of these."""
    shown = option(
        PREDICTION,
        f"{', '.join(ways[:-1])} or {ways[-1]}. Default: draws where there are.",
        autocompletion=lambda incomplete: [way for way in ways if way.startswith(incomplete)],
    )
    return Annotated[str | None, shown]


RunDir = Annotated[Path, typer.Argument(help="Folder of a finished run.")]
Source = Annotated[Path, typer.Argument(help="Folder of a finished run, or of an adapter.")]
Seed = Annotated[int, option(PREDICTION, "Key of the draws and of the intervals.")]
AsJson = Annotated[bool, option(OUTPUT, "Print the result as JSON, and nothing else.", "--json")]
Overwrite = Annotated[bool, option(OUTPUT, "Replace what lies there.", "--overwrite")]

#: Of tables that are read, as `train` reads them.
READING = setting_flags(("subset", "encoding", "delimiter", "drop_missing"), panel=ROWS)
#: Rows that belong to no class.
OUTSIDE = {
    "outside": Annotated[
        str | None, option(ROWS, "Texts of other origin: a file, a folder or a Hub id with the same text column.")
    ],
}
#: What a finished run is measured on, and how.
MEASURED_ON = {
    "data": Annotated[
        str | None,
        option(ROWS, "Rows to test on: a file, a folder or a Hub id. Default: the run's own test rows."),
    ],
    **READING,
    "split": Annotated[str | None, option(ROWS, "Split of the data. Default: test, or else validation.")],
    "num_samples": Annotated[int | None, option(PREDICTION, "Draws of a stochastic prediction. Default: as trained.")],
    "metrics": Annotated[
        list[str] | None, option(PREDICTION, "A score to show. May be repeated.", "--metric", "--metrics")
    ],
}
#: What rows are predicted, and how.
PREDICTED = {
    **READING,
    "text_column": Annotated[
        list[str] | None, option(ROWS, "Column of the text; two for pairs. Default: as in training.")
    ],
    "split": Annotated[str | None, option(ROWS, "Split of the data. Default: test, or the only one.")],
    "how": how_option(WAYS),
    "num_samples": Annotated[int | None, option(PREDICTION, "Draws. Default: as the temperature was fitted.", min=1)],
    "batch_size": Annotated[int | None, option(PREDICTION, "Rows of a forward. Default: as in training.", min=1)],
    "max_length": Annotated[int | None, option(PREDICTION, "Tokens a row is cut to. Default: as in training.", min=1)],
    "base_model": Annotated[str | None, option(PREDICTION, "Where the base model lies now, if it has moved.")],
    "label_tokens": Annotated[
        list[str] | None,
        option(PREDICTION, "A token that stands for a class, of a language model. May be repeated.", "--label-token"),
    ],
}


def _about(text: str, *names: str) -> Any:
    return option(ABOUT_PANEL, text, *names)


#: What only whoever trained can say of an adapter, see `peft_calib.hub.Subject`.
ABOUT = {
    "base_model": Annotated[str | None, _about("Hub id of the base model, if the adapter names a folder.")],
    "dataset": Annotated[str | None, _about("Hub id or name of the data it was measured on.")],
    "dataset_config": Annotated[str | None, _about("Configuration of that data set.")],
    "dataset_revision": Annotated[str | None, _about("Commit of that data set.")],
    "benchmark_task": Annotated[str | None, _about("Task id, where that is a benchmark of the Hub.")],
    "license": Annotated[str | None, _about("Licence of the adapter, such as mit or apache-2.0.")],
    "language": Annotated[list[str] | None, _about("Language code. May be repeated.")],
    "training_datasets": Annotated[
        list[str] | None, _about("Hub id of training data. May be repeated.", "--training-dataset")
    ],
    "examples": Annotated[list[str] | None, _about("A text for the Hub's widget. May be repeated.", "--example")],
    "intended_use": Annotated[str | None, _about("What it predicts and for whom, in words.")],
}
