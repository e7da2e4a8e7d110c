"""Classify reviews, and pass on those where the answer could not be trusted: a threshold with a guarantee.

    python hub_examples/sentiment_abstention.py --data reviews.csv --model roberta-base --risk 0.05
    python hub_examples/sentiment_abstention.py --offline

Four kinds of rows, none used twice: trained on, calibrated on (the temperature; cut out of the training rows), decided
on (the threshold), and new ones. The promise: of what is answered at most `--risk` is wrong, with 95 % confidence.
"""

from pathlib import Path

import typer

import peft_calib
from peft_calib.calibration import SelectiveThreshold, load_decision
from peft_calib.demo import embedded_model, load_text_data, offline_sentences
from peft_calib.runs.settings import RunConfig
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
    rows.train.to_json(output_dir / "train.jsonl")
    names = list(rows.label_names)
    config = RunConfig(data=str(output_dir / "train.jsonl"), model=model, label_names=names, **options)
    train_run(config, output_dir / "run")

    predictor = peft_calib.load(output_dir / "run")
    decided_on = predictor.predict(rows.calibration["text"][:])
    rule = SelectiveThreshold(risk=risk).fit(decided_on.probabilities, rows.calibration["label"][:])
    rule.save(output_dir / "run" / "decision.json")

    # From here on as in another process: the run and its rule, and texts nobody has seen.
    rule = load_decision(output_dir / "run" / "decision.json")
    new = predictor.predict(rows.test["text"][:])
    answered = rule.accept(new.probabilities)
    for text, label, sure in list(zip(rows.test["text"], new.labels_predicted, answered, strict=True))[:5]:
        print(f"{label if sure else 'passed on':>14}  {text[:90]}")
    print(f"\n{rule}\n\nOn new rows: {rule.evaluate(new.probabilities, rows.test['label'][:])}")


if __name__ == "__main__":
    typer.run(main)
