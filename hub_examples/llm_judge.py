"""A language model as a judge, with a threshold: verdicts that are kept are right at a rate you chose beforehand.

    python hub_examples/llm_judge.py --train judged.jsonl --held-out more.jsonl --new answers.jsonl --risk 0.05
    python hub_examples/llm_judge.py --offline

`judged.jsonl` and `more.jsonl` have a `prompt` for the judge (question, answer, criterion) and a `label`, what a
person said: one of the `--verdicts`. The judge is a LoRA that answers with the letter of a verdict; its temperature is
fitted on rows cut out of the first file, its threshold on the second. Prompts below the threshold go to a person.
"""

import argparse
from pathlib import Path

from datasets import Dataset, load_dataset

import peft_calib
from peft_calib.calibration import NoGuaranteeError
from peft_calib.demo import offline_sentences, tiny_language_model
from peft_calib.runs.deciding import decide
from peft_calib.runs.settings import RunConfig
from peft_calib.runs.training import train_run

ASKED = "{question}\nDoes the answer help?\n{choices}\nVerdict:"


def offline_answers(each: int = 200) -> Dataset:
    """Answers that say something, and answers that refuse."""
    rows = offline_sentences("scipy", "transformers", each=each)["text"][:]
    refused = [f"sorry , i cannot help with {text[-30:]}" if i % 2 else text for i, text in enumerate(rows)]
    return Dataset.from_dict({"prompt": refused, "label": ["no" if i % 2 else "yes" for i in range(len(rows))]})


def main() -> None:
    """Train the judge, find the threshold, and judge new answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "held-out", "new"):
        parser.add_argument(f"--{name}", default=f"{name}.jsonl")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--verdicts", nargs="+", default=["no", "yes"])
    parser.add_argument("--risk", type=float, default=0.05)
    parser.add_argument("--output-dir", type=Path, default=Path("out"))
    parser.add_argument("--offline", action="store_true")
    args = parser.parse_args()
    options = {}
    if args.offline:
        args.model = tiny_language_model(args.output_dir / "tiny")
        options = {"epochs": 2, "learning_rate": 1e-2, "max_length": 64}
        parts = offline_answers().train_test_split(test_size=0.6, seed=0)
        held = parts["test"].train_test_split(test_size=0.3, seed=0)
        files = {"train": parts["train"], "held_out": held["train"], "new": held["test"]}
    else:
        paths = {"train": args.train, "held_out": args.held_out, "new": args.new}
        files = {name: load_dataset("json", data_files=path, split="train") for name, path in paths.items()}

    def questions(rows: Dataset) -> Dataset:
        """Each verdict is a choice; what a person said is its position."""

        def one(row: dict) -> dict:
            choices = {"question": row["prompt"], "choices": args.verdicts}
            return choices | ({"label": args.verdicts.index(row["label"])} if "label" in row else {})

        return rows.map(one, remove_columns=[name for name in rows.column_names if name != "label"])

    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name in ("train", "held_out"):
        questions(files[name]).to_json(args.output_dir / f"{name}.jsonl")
    train, held_out, judge = (args.output_dir / name for name in ("train.jsonl", "held_out.jsonl", "judge"))
    train_run(RunConfig(data=str(train), model=args.model, task="multiple-choice", prompt=ASKED, **options), judge)
    try:
        print("\n".join(decide(judge, str(held_out), risk=args.risk).lines()))
    except NoGuaranteeError as error:
        raise SystemExit(f"No verdict can be promised: {error}") from None

    found = peft_calib.load(judge).predict(questions(files["new"]))
    for prompt, p, kept in list(zip(files["new"]["prompt"], found.probabilities, found.answered, strict=True))[:5]:
        print(f"{args.verdicts[p.argmax()] if kept else 'a person':>9} ({p.max():.2f})  {prompt[:80]}")
    print(f"{found.answered.sum()} of {len(found)} verdicts are kept")


if __name__ == "__main__":
    main()
