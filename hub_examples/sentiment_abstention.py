"""Classify reviews, and pass on those where the answer could not be trusted: a threshold with a guarantee.

    python hub_examples/sentiment_abstention.py --data reviews.csv --model roberta-base --risk 0.05
    python hub_examples/sentiment_abstention.py --offline

Four kinds of rows, none used twice: trained on, calibrated on (the temperature; cut out of the training rows), decided
on (the threshold), and new ones. The promise: of what is answered at most `--risk` is wrong, with 95 % confidence.
"""

from pathlib import Path

import typer
from rich.console import Console

import peft_calib
from peft_calib.demo import embedded_model, load_text_data, offline_sentences
from peft_calib.runs.deciding import decide
from peft_calib.runs.evaluation import evaluate_run
from peft_calib.runs.settings import RunConfig
from peft_calib.runs.tables import evaluation_table
from peft_calib.runs.training import train_run


def main(
    data: str = "reviews.csv",
    model: str = "roberta-base",
    text_column: str = "text",
    label_column: str = "label",
    risk: float = 0.05,
    output_dir: Path = Path("out"),
    offline: bool = False,
) -> None:
    """Train, fit a threshold on held-out rows, store it beside the adapter, and answer new rows with it."""
    source, options = data, {}
    if offline:  # which of two libraries does a sentence document?
        source, model, risk = offline_sentences("transformers", "scipy", each=300), embedded_model(), 0.2
        options = {"epochs": 2, "max_length": 32, "batch_size": 8, "max_train_rows": 120}

    rows = load_text_data(
        source, text_column=text_column, label_column=label_column, calibration_fraction=0.5, test_fraction=0.3
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    files = {name: output_dir / f"{name}.jsonl" for name in ("train", "calibration", "test")}
    for name, file in files.items():
        getattr(rows, name).to_json(file)
    names, run = list(rows.label_names), output_dir / "run"
    train_run(RunConfig(data=str(files["train"]), model=model, label_names=names, **options), run)
    print("\n".join(decide(run, str(files["calibration"]), risk=risk).lines()))
    found = evaluate_run(run, data=str(files["test"]))  # what the rule reaches on rows that decided nothing
    Console().print(evaluation_table(found.content, found.content["metrics"]))

    # From here on as in another process: the folder is all it takes.
    new = peft_calib.load(run).predict(rows.test["text"][:5])
    for text, label, answered in zip(rows.test["text"][:5], new.labels_predicted, new.answered, strict=True):
        print(f"{label if answered else 'passed on':>14}  {text[:90]}")


if __name__ == "__main__":
    typer.run(main)
