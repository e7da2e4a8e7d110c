"""`peft-calib train-head`."""

from __future__ import annotations

from typing import Annotated, Any

from ..runs.flags import given
from .command import PREDICTION, ROWS, TRAINING, command, main_console, option, say
from .options import AsJson, Overwrite, RunDir

FIT, GRID = "How it is fitted", "Grid, of which the best trial is chosen"


@command(
    "train-head",
    panel=TRAINING,
    examples=("run", "run --fit-on train --paper v2"),
    after_interrupt="Interrupted. The run is as it was; the same command fits the head anew.",
)
def train_head(
    run: RunDir,
    fit_on: Annotated[
        str | None,
        option(
            ROWS,
            "cross (folds of the calibration rows), validation (a part of them), or train (the training rows, as in "
            "the papers). Default: cross, or the paper's.",
        ),
    ] = None,
    data: Annotated[str | None, option(ROWS, "Where the run's rows lie now, if they have moved.")] = None,
    how: Annotated[
        str | None, option(PREDICTION, "Which prediction it is for: mean or sample. Default: draws where there are.")
    ] = None,
    num_samples: Annotated[int | None, option(PREDICTION, "Draws. Default: as trained.", min=2)] = None,
    batch_size: Annotated[int | None, option(PREDICTION, "Rows of a forward. Default: as in training.", min=1)] = None,
    score: Annotated[str | None, option(FIT, "entropy, sr_norm or sr_raw. Default: entropy.")] = None,
    paper: Annotated[str | None, option(FIT, "Settings of a paper: v1 (AdUE) or v2 (ALIEN).")] = None,
    calibrate: Annotated[str | None, option(FIT, "Map to P(error): platt, isotonic or none.")] = None,
    balance: Annotated[bool, option(FIT, "Draw errors as often as the rest.", "--balance")] = False,
    lr: Annotated[list[float] | None, option(GRID, "Learning rate of the grid. May be repeated.")] = None,
    epochs: Annotated[list[int] | None, option(GRID, "Epochs of the grid. May be repeated.")] = None,
    alpha: Annotated[
        list[float] | None, option(GRID, "Weight of staying near the model's own score. May be repeated.")
    ] = None,
    beta: Annotated[
        list[float] | None, option(GRID, "Weight of staying near the model's own head. May be repeated.")
    ] = None,
    seed: Annotated[int, option(FIT, "Key of the draws and of the fit.")] = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> dict[str, Any]:
    """Fit a head to a finished run that says how likely each prediction is wrong; no prediction changes.

    It is written beside the adapter, where evaluate, predict and peft_calib.load find it. It says at once whether it
    ranks errors better than the model's own score; where there are too few errors to learn from, that score stays.
    """
    from ..runs.error_head import train_head as fit

    console = main_console()
    grid = {"lr": lr, "epochs": epochs, "alpha": alpha, "beta": beta}
    asked = {"fit_on": fit_on, "data": data, "how": how, "num_samples": num_samples, "batch_size": batch_size}
    asked |= {"score": score, "paper": paper, "calibrate": calibrate, "balance": balance or None}
    progress = console.is_terminal
    found = fit(run, seed=seed, overwrite=overwrite, progress=progress, **given(asked), **given(grid))
    if not as_json:
        say(console, found.lines())
    return {"folder": str(found.folder), "variant": found.variant, **found.head.report.to_dict()}
