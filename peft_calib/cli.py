"""The command line: `peft-calib`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from .files import disk_is_full
from .runs.flags import given, resolve, setting_flags, with_flags
from .runs.settings import DEMONSTRATION

#: Exit code of a command that was stopped by hand, as shells have it.
INTERRUPTED = 130


class Command(TyperCommand):
    """A command that has the libraries loaded once its arguments are known to be right."""

    def invoke(self, ctx: Any) -> Any:
        if ctx.find_root().obj is not None:
            with Console().status("loading libraries"):
                ctx.find_root().obj()
        return super().invoke(ctx)


app = typer.Typer(
    name="peft-calib",
    help="Calibrated LoRA fine-tuning: train, and learn how far to trust the probabilities.\n\n"
    "With --debug an error is shown with its traceback.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


RunDir = Annotated[Path, typer.Argument(help="Folder of a finished run.")]
Outside = Annotated[
    str | None, typer.Option(help="Texts of other origin: a file, a folder or a Hub id with the same text column.")
]
Seed = Annotated[int, typer.Option(help="Key of the draws and of the intervals.")]
#: Groups of options of a head.
ROWS, FIT, GRID = "Rows and predictions", "How it is fitted", "Grid, of which the best trial is chosen"
#: Settings that the demonstration's runs can be given.
DEMO = (
    "subset", "encoding", "delimiter", "drop_missing", "text_column", "label_column", "max_length", "max_train_rows",
    "rank", "target_modules", "epochs", "learning_rate", "batch_size", "seed",
)  # fmt: skip
#: What a finished run is measured on, and how.
MEASURING = {
    "data": Annotated[
        str | None,
        typer.Option(help="Rows to test on: a file, a folder or a Hub id. Default: the run's own test rows."),
    ],
    **setting_flags(("subset", "encoding", "delimiter", "drop_missing")),
    "split": Annotated[str | None, typer.Option(help="Split of the data. Default: test, or else validation.")],
    "num_samples": Annotated[int | None, typer.Option(help="Draws of a stochastic prediction. Default: as trained.")],
    "metrics": Annotated[
        list[str] | None, typer.Option("--metric", "--metrics", help="A score to show. May be repeated.")
    ],
}
#: What rows are predicted, and how.
PREDICTING = {
    **setting_flags(("subset", "encoding", "delimiter", "drop_missing")),
    "text_column": Annotated[
        list[str] | None, typer.Option(help="Column of the text; two for pairs. Default: as in training.")
    ],
    "split": Annotated[str | None, typer.Option(help="Split of the data. Default: test, or the only one.")],
    "how": Annotated[str | None, typer.Option(help="mean, sample, late or linear. Default: draws where there are.")],
    "num_samples": Annotated[int | None, typer.Option(min=1, help="Draws. Default: as the temperature was fitted.")],
    "batch_size": Annotated[int | None, typer.Option(min=1, help="Rows of a forward. Default: as in training.")],
    "max_length": Annotated[int | None, typer.Option(min=1, help="Tokens a row is cut to. Default: as in training.")],
    "base_model": Annotated[str | None, typer.Option(help="Where the base model lies now, if it has moved.")],
    "label_tokens": Annotated[
        list[str] | None,
        typer.Option("--label-token", help="A token that stands for a class, of a language model. May be repeated."),
    ],
}
#: What only whoever trained can say of an adapter, see `peft_calib.hub.Subject`.
ABOUT = {
    "base_model": Annotated[str | None, typer.Option(help="Hub id of the base model, if the adapter names a folder.")],
    "dataset": Annotated[str | None, typer.Option(help="Hub id or name of the data it was measured on.")],
    "dataset_config": Annotated[str | None, typer.Option(help="Configuration of that data set.")],
    "dataset_revision": Annotated[str | None, typer.Option(help="Commit of that data set.")],
    "benchmark_task": Annotated[str | None, typer.Option(help="Task id, where that is a benchmark of the Hub.")],
    "license": Annotated[str | None, typer.Option(help="Licence of the adapter, such as mit or apache-2.0.")],
    "language": Annotated[list[str] | None, typer.Option(help="Language code. May be repeated.")],
    "training_datasets": Annotated[
        list[str] | None, typer.Option("--training-dataset", help="Hub id of training data. May be repeated.")
    ],
    "examples": Annotated[
        list[str] | None, typer.Option("--example", help="A text for the Hub's widget. May be repeated.")
    ],
    "intended_use": Annotated[str | None, typer.Option(help="What it predicts and for whom, in words.")],
}
Source = Annotated[Path, typer.Argument(help="Folder of a finished run, or of an adapter.")]


@app.command(cls=Command)
@with_flags(setting_flags(DEMO, DEMONSTRATION))
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
    outside: Outside = None,
    model: Annotated[
        str | None, typer.Option(help="A Hub id or a folder. Default: the embedded all-MiniLM-L6-v2.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished run in the folder.")] = False,
    **settings: Any,
) -> None:
    """Fine-tune with plain LoRA, HyperLoRA and BayesianLoRA, and print how calibrated each is.

    With no option: the embedded encoder on real sentences from the documentation of installed libraries ("which
    library does this sentence document?"), in a few minutes on two cores and without a network.
    """
    console = Console()
    start = time.perf_counter()
    from .demo.run import check_output_dir, demo_config, run_demo

    check_output_dir(output_dir, overwrite)
    with console.status("reading the data"):
        config, other = demo_config(data, model, **given(settings))
    run_demo(config, output_dir, outside=outside or other, overwrite=overwrite, console=console)
    console.print(f"Done in {time.perf_counter() - start:.0f} s.")


@app.command(cls=Command)
@with_flags(setting_flags())
def train(
    output_dir: Annotated[Path, typer.Option(help="Folder of the run.")],
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; flags override it.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the folder holds of a run.")] = False,
    **flags: Any,
) -> None:
    """Fine-tune a model on your own data, with a calibration split held out and a temperature fitted on it.

    A run that was interrupted is continued by the same command. With several processes: accelerate launch -m
    peft_calib.cli train ...
    """
    settings = resolve(config, flags, lambda line: _main_console().print(line, markup=False, highlight=False))
    from .runs.training import train_run

    try:
        train_run(settings, output_dir, overwrite=overwrite)
    except KeyboardInterrupt:
        _main_console().print(_interrupted(output_dir), markup=False, highlight=False)
        raise typer.Exit(INTERRUPTED) from None


@app.command(cls=Command)
@with_flags(MEASURING)
def evaluate(run: RunDir, outside: Outside = None, seed: Seed = 0, **how: Any) -> None:
    """Measure a finished run on rows it has not seen: scores with intervals, before and after its temperature."""
    from .runs.evaluation import evaluate_run
    from .runs.tables import evaluation_table, head_table, verdict_of_baseline, verdict_of_head

    console = _main_console()
    found = evaluate_run(run, seed=seed, progress=console.is_terminal, outside=outside, **how)
    console.print(evaluation_table(found.content, how["metrics"] or found.content["metrics"]))
    head = head_table(found.content)
    if head is not None:
        console.print(head)
    for told in (verdict_of_head(found.content), verdict_of_baseline(found.content)):
        if told is not None:
            console.print(told, markup=False, highlight=False)
    console.print(f"Written to {found.folder}: report.json, report.md, report.html")


@app.command("train-head", cls=Command)
def train_head(
    run: RunDir,
    fit_on: Annotated[
        str | None,
        typer.Option(
            help="cross (folds of the calibration rows), validation (a part of them), or train (the training rows, "
            "as in the papers). Default: cross, or the paper's.",
            rich_help_panel=ROWS,
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Where the run's rows lie now, if they have moved.", rich_help_panel=ROWS)
    ] = None,
    how: Annotated[
        str | None,
        typer.Option(
            help="Which prediction it is for: mean or sample. Default: draws where there are.", rich_help_panel=ROWS
        ),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(min=2, help="Draws. Default: as trained.", rich_help_panel=ROWS)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows of a forward. Default: as in training.", rich_help_panel=ROWS)
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="entropy, sr_norm or sr_raw. Default: entropy.", rich_help_panel=FIT)
    ] = None,
    paper: Annotated[
        str | None, typer.Option(help="Settings of a paper: v1 (AdUE) or v2 (ALIEN).", rich_help_panel=FIT)
    ] = None,
    calibrate: Annotated[
        str | None, typer.Option(help="Map to P(error): platt, isotonic or none.", rich_help_panel=FIT)
    ] = None,
    balance: Annotated[
        bool, typer.Option("--balance", help="Draw errors as often as the rest.", rich_help_panel=FIT)
    ] = False,
    lr: Annotated[
        list[float] | None, typer.Option(help="Learning rate of the grid. May be repeated.", rich_help_panel=GRID)
    ] = None,
    epochs: Annotated[
        list[int] | None, typer.Option(help="Epochs of the grid. May be repeated.", rich_help_panel=GRID)
    ] = None,
    alpha: Annotated[
        list[float] | None,
        typer.Option(help="Weight of staying near the model's own score. May be repeated.", rich_help_panel=GRID),
    ] = None,
    beta: Annotated[
        list[float] | None,
        typer.Option(help="Weight of staying near the model's own head. May be repeated.", rich_help_panel=GRID),
    ] = None,
    seed: Annotated[int, typer.Option(help="Key of the draws and of the fit.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a head that lies there.")] = False,
) -> None:
    """Fit a head to a finished run that says how likely each prediction is wrong; no prediction changes.

    It is written beside the adapter, where evaluate, predict and peft_calib.load find it. It says at once whether it
    ranks errors better than the model's own score; where there are too few errors to learn from, that score stays.

    peft-calib train-head runs/lora

    peft-calib train-head runs/lora --fit-on train --paper v2
    """
    from .runs.error_head import train_head as fit

    console = _main_console()
    grid = {"lr": lr, "epochs": epochs, "alpha": alpha, "beta": beta}
    asked = {"fit_on": fit_on, "data": data, "how": how, "num_samples": num_samples, "batch_size": batch_size}
    asked |= {"score": score, "paper": paper, "calibrate": calibrate, "balance": balance or None}
    progress = console.is_terminal
    found = fit(run, seed=seed, overwrite=overwrite, progress=progress, **given(asked), **given(grid))
    for line in found.lines():
        console.print(line, markup=False, highlight=False)


@app.command(cls=Command)
@with_flags(MEASURING)
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs; the first is the baseline.")],
    before: Annotated[bool, typer.Option("--before", help="Compare without the runs' temperatures.")] = False,
    every_pair: Annotated[bool, typer.Option("--every-pair", help="Compare each run with each.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file to write; must not exist.")] = None,
    seed: Seed = 0,
    **how: Any,
) -> None:
    """Compare finished runs on the rows none of them has seen, by a paired bootstrap with Holm's correction."""
    from .runs.comparison import compare_runs, write_comparison

    if output is not None and output.exists():
        raise FileExistsError(f"{output} exists; name another file")
    console = _main_console()
    how |= {"after_temperature": not before, "every_pair": every_pair, "seed": seed}
    found = compare_runs(runs, progress=console.is_terminal, **how)
    console.print(found.to_table())
    for line in [*(pair.verdict for pair in found.comparisons), *found.verdicts]:
        console.print(line, markup=False, highlight=False)
    if output is not None:
        write_comparison(found, output)


@app.command(cls=Command)
@with_flags(PREDICTING)
def predict(
    adapter: Annotated[str, typer.Argument(help="A finished run, the folder of an adapter, or a Hub id.")],
    data: Annotated[str, typer.Option(help="The rows: a file, a folder or a Hub id. Labels are not needed.")],
    output: Annotated[Path, typer.Option(help="A .csv, .tsv, .json, .jsonl or .parquet file to write.")],
    seed: Annotated[int, typer.Option(help="Key of the draws.")] = 0,
    prefix: Annotated[str, typer.Option(help="What to put before the names of the added columns.")] = "",
    all_probabilities: Annotated[
        bool, typer.Option("--all-probabilities", help="Add the probability of every class.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it is there.")] = False,
    **how: Any,
) -> None:
    """Predict the rows of a table: label, calibrated probability, entropy and mutual information for each.

    All columns are kept, in their order, and what was predicted stands behind them. The temperature that was stored
    with the adapter is applied.
    """
    from .runs.predicting import predict_table

    console = _main_console()
    options: dict[str, Any] = {
        "seed": seed,
        "prefix": prefix,
        "all_probabilities": all_probabilities,
        "overwrite": overwrite,
    }
    found = predict_table(adapter, data, output, progress=console.is_terminal, **options, **given(how))
    for line in found.lines():
        console.print(line, markup=False, highlight=False)


@app.command(cls=Command)
def export(
    run: RunDir,
    output_dir: Annotated[Path, typer.Argument(help="Folder to write.")],
    num_samples: Annotated[
        int | None, typer.Option(min=1, help="Write this many draws. Default: the mean adapter.")
    ] = None,
    t: Annotated[float | None, typer.Option(help="Point of a curve.")] = None,
    seed: Seed = 0,
) -> None:
    """Write a finished run as ordinary LoRA folders, which stock PEFT and inference servers load."""
    from .runs.exporting import export_run

    where = export_run(run, output_dir, num_samples=num_samples, t=t, seed=seed)
    Console().print(f"Written to {where}")


@app.command(cls=Command)
@with_flags(ABOUT)
def card(
    source: Source,
    output_dir: Annotated[Path, typer.Option(help="Folder to write; must be new or empty.")],
    repo_id: Annotated[str, typer.Option(help="Name that the card gives.")] = "user/name",
    **about: Any,
) -> None:
    """Write what `push` would upload into a folder, to look at first: adapter, plain LoRA, report, pictures, card."""
    from .hub import write_card

    where = write_card(source, output_dir, repo_id=repo_id, **given(about))
    Console().print(f"Written to {where}")


@app.command(cls=Command)
@with_flags(ABOUT)
def push(
    source: Source,
    repo_id: Annotated[str, typer.Argument(help="user/name on the Hub; made if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made if it does not exist.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    **about: Any,
) -> None:
    """Upload a run's adapter to the Hub, with a card that says how calibrated it is and how that was measured.

    One commit or none. The token is that of `hf auth login`, or HF_TOKEN.
    """
    from .hub import push_to_hub

    options: dict[str, Any] = {"revision": revision, "create_pr": create_pr, "commit_message": message}
    told = push_to_hub(source, repo_id, private=private or None, **options, **given(about))
    Console().print(f"Pushed: {told.pr_url or told.commit_url}", soft_wrap=True)


def _main_console() -> Console:
    """Speaks on the main process only."""
    from .runs.processes import processes

    return Console(quiet=not processes().is_main_process)


def _interrupted(output_dir: Path) -> str:
    """What becomes of a training that was stopped by hand."""
    if not (output_dir / "config.json").is_file():
        return f"Interrupted before anything was written to {output_dir}."
    done = [path.parent.name for path in sorted(output_dir.glob("*/stage.json"))]
    steps = [path.name.rpartition("-")[2] for path in output_dir.glob("training/*/checkpoint-*")]
    kept = [f"{', '.join(done)} (complete)"] if done else []
    if steps:
        kept.append(f"what was trained up to step {max(map(int, steps))}")
    begin = f"It keeps {' and '.join(kept)}" if kept else "No checkpoint was written yet, so it begins anew"
    return f"Interrupted. The same command continues the run in {output_dir}. {begin}."


def main(arguments: list[str] | None = None, load: Callable[[], None] | None = None) -> None:
    """Run a command; an error is one line, with `--debug` a traceback.

    `load` is called once the words are known to make sense, before the command runs.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        app([word for word in words if word != "--debug"], obj=load)
    except (ValueError, OSError, ImportError) as error:  # written for the user
        if debug:
            raise
        sys.exit(f"peft-calib: {_full_disk(error) or error}")
    except Exception as error:
        if debug:
            raise
        first = str(error).strip().partition("\n")[0]
        fault = f"{type(error).__name__}: {first} (--debug shows where)"
        sys.exit(f"peft-calib: {_full_disk(error) or fault}")


def _full_disk(error: Exception) -> str | None:
    """What a user can do where there was no room to write; None for other errors."""
    if not disk_is_full(error):
        return None
    where = getattr(error, "filename", None)
    return (
        f"the disk is full, or a limit for the size of files is reached{f' ({where})' if where else ''}. What was "
        "complete is as it was; make room, and run the same command again"
    )


if __name__ == "__main__":
    main()
