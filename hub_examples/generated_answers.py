"""Answers of a language model with the probability that each is right, and a threshold that keeps its promise.

    python hub_examples/generated_answers.py --train train.jsonl --labelled more.jsonl --new questions.jsonl
    python hub_examples/generated_answers.py --offline

The files have a `prompt` that ends where the answer begins, and an `answer`, which is right where it is equal to what
the model writes, but for case, articles and punctuation. A BayesianLoRA is trained on the first file; half of the
second gives P(correct), the other half a threshold: of what is answered at most `--risk` is wrong.
"""

import argparse
import random
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from peft_calib import BayesianLoraConfig, generate_answers
from peft_calib.calibration import AnswerCalibration, NoGuaranteeError, SelectiveThreshold, answers_match
from peft_calib.demo import tiny_language_model

NAMES = (
    "array axis class config data default dtype file filter function index input list mask matrix model name output"
)
KINDS = ["sparse", "dense", "random", "linear"]


def offline_questions(count: int, seed: int) -> Dataset:
    """Questions about words, each of which has one answer nearly always, or less than half of the time."""
    chance, names = random.Random(seed), NAMES.split()
    asked = [chance.randrange(len(names)) for _ in range(count)]
    kinds = [n if chance.random() < (0.99 if n % 2 else 0.4) else chance.randrange(4) for n in asked]
    fillers = [
        " ".join(chance.choices(("as", "if", "so", "to", "or"), k=4)) for _ in asked
    ]  # few questions come twice
    prompts = [f"{filler} the {names[n]} is" for filler, n in zip(fillers, asked, strict=True)]
    return Dataset.from_dict({"prompt": prompts, "answer": [KINDS[kind % 4] for kind in kinds]})


def examples(rows: Dataset, tokenizer) -> list[dict]:
    """Prompt and answer as tokens; the answer alone is learnt, with the dot that ends it."""
    found = []
    for prompt, answer in zip(rows["prompt"], rows["answer"], strict=True):
        asked = tokenizer(prompt)["input_ids"]
        said = tokenizer(f" {answer}.", add_special_tokens=False)["input_ids"]
        found.append({"input_ids": asked + said, "labels": [-100] * len(asked) + said})
    return found


def padded(rows: list[dict]) -> dict[str, torch.Tensor]:
    """A batch of rows of unequal length."""
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100}
    batch = {k: torch.tensor([row[k] + [v] * (longest - len(row[k])) for row in rows]) for k, v in fill.items()}
    lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
    return {**batch, "attention_mask": (torch.arange(longest) < lengths).long()}


def main() -> None:
    """Train, calibrate, decide, and answer new questions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "labelled", "new"):
        parser.add_argument(f"--{name}", default=f"{name}.jsonl")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--risk", type=float, default=0.2)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--output-dir", type=Path, default=Path("out"))
    parser.add_argument("--offline", action="store_true")
    args = parser.parse_args()
    learning_rate = 2e-4
    if args.offline:
        args.model, args.epochs, learning_rate = tiny_language_model(args.output_dir / "tiny"), 10, 1e-2
        files = [offline_questions(count, seed) for seed, count in enumerate((400, 400, 60))]
    else:
        paths = (args.train, args.labelled, args.new)
        files = [load_dataset("json", data_files=path, split="train") for path in paths]
    train, labelled, new = files

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = examples(train, tokenizer)
    tokens = sum(label != -100 for row in rows for label in row["labels"])
    config = BayesianLoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear", num_train_examples=tokens)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(args.model), config)
    settings = TrainingArguments(
        str(args.output_dir / "training"), num_train_epochs=args.epochs, learning_rate=learning_rate,
        per_device_train_batch_size=16, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        use_cpu=args.offline,
    )  # fmt: skip
    Trainer(model, settings, train_dataset=rows, data_collator=padded).train()
    model.eval().save_pretrained(args.output_dir / "adapter")

    asked = {"num_samples": 6, "max_new_tokens": 6, "until": [".", "\n"], "batch_size": 64, "progress": False}
    found = generate_answers(model, tokenizer, labelled["prompt"], **asked)
    scores, right = found.scores(), answers_match(found.answers, labelled["answer"])
    half = len(right) // 2
    calibration = AnswerCalibration().fit(scores.take(slice(half)), right[:half])
    calibration.save(args.output_dir / "p_correct.json")
    print(calibration.to_markdown())
    rest = scores.take(slice(half, None))
    report = calibration.evaluate(rest, right[half:], num_resamples=200)
    print(f"On other answers: AUROC {report['error_auroc']:.2f}, ECE {report['ece']:.3f}")
    try:
        rule = SelectiveThreshold(risk=args.risk).fit(calibration.transform(rest), right[half:], input="confidence")
    except NoGuaranteeError as error:
        raise SystemExit(f"No answer can be promised: {error}") from None
    rule.save(args.output_dir / "decision.json")
    print(rule.promise())

    answered = generate_answers(model, tokenizer, new["prompt"], **asked)
    p = calibration.transform(answered.scores())
    kept = rule.accept(p, input="confidence")
    for prompt, text, sure, keep in list(zip(new["prompt"], answered.answers, p, kept, strict=True))[:5]:
        print(f"{sure:.2f}  {text if keep else 'a person':>10}  {prompt[-60:]}")
    print(f"{kept.sum()} of {len(kept)} are answered")


if __name__ == "__main__":
    main()
