"""Every command that README and docs print runs as printed; local folders stand in for the Hub's models and data."""

import json
import random
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from hub_server import client_of_a_hub
from resamples import few_resamples

from peft_calib.cli import main
from peft_calib.demo import run as demo_run
from peft_calib.runs import limits

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("roberta-base", "bert-base-uncased", "sentence-transformers/all-MiniLM-L6-v2")
DECODER = "HuggingFaceTB/SmolLM2-135M"
PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")), "hub_examples/train.yaml"]
OTHERS = ("make", "pip", "python", "python3", "git", "cd", "torchrun")


def commands(page: str) -> list[list[str]]:
    """What a page says to type, in its order."""
    text = (ROOT / page).read_text()
    if page.endswith(".yaml"):
        lines = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# peft-calib")]
    else:
        blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
        lines = [
            line
            for language, block in blocks
            for line in block.replace("\\\n", " ").splitlines()
            if language in ("bash", "sh", "console") or line.startswith("peft-calib ")
        ]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def test_no_page_prints_a_command_that_this_test_does_not_know():
    known = [words for page in PAGES for words in commands(page)]
    assert sum(words[0] == "peft-calib" for words in known) > 15
    for words in known:
        assert words[0] in ("peft-calib", "accelerate", *OTHERS) or "=" in words[0], words


def rows(count: int, seed: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    words = "the film a long story of two old friends and their dog in the rain".split()
    return [
        (f"{' '.join(rng.choices(words, k=6))} {('dull', 'lovely')[i % 2]} {seed} {i}", ("down", "up")[i % 2])
        for i in range(count)
    ]


def questions(count: int, seed: int) -> list[dict]:
    return [{"question": text, "choices": ["rain", "sunday", text], "answer": "rain"} for text, _ in rows(count, seed)]


def sentences(count: int, seed: int) -> list[dict]:
    words = [text.split() for text, _ in rows(count, seed)]
    return [{"tokens": row, "tags": ["B-PER" if len(word) % 3 == 0 else "O" for word in row]} for row in words]


def write(path: Path, content: list[dict]) -> None:
    path.write_text("\n".join(map(json.dumps, content)))


@pytest.fixture
def place(tmp_path, tiny_model_folder, tiny_decoder_folder, monkeypatch) -> Iterator[Path]:
    """A working folder with the files that the pages name, and models and data under the names of Hub ids."""
    for name in MODELS:
        shutil.copytree(tiny_model_folder, tmp_path / name)
    shutil.copytree(tiny_decoder_folder, tmp_path / DECODER)
    shutil.copytree(ROOT / "hub_examples", tmp_path / "hub_examples")
    for name, seed in (("", 7), ("more_", 8)):
        write(tmp_path / f"{name}questions.jsonl", questions(60, seed))
        write(tmp_path / f"{name}sentences.jsonl", sentences(60, seed))
    for name, seed in (("reviews", 0), ("held_out", 1), ("tweets", 2), ("rows", 3)):
        label = "label" if name == "rows" else "mood"
        lines = [f"text,{label}", *(",".join(row) for row in rows(60, seed))]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
    topics = [f"{text},{label}{'|billing' if i % 3 else ''}" for i, (text, label) in enumerate(rows(60, 8))]
    (tmp_path / "tickets.csv").write_text("\n".join(["text,topics", *topics]) + "\n")
    stars = [f"{text},{5 if label == 'up' else 2}" for text, label in rows(60, 9)]
    (tmp_path / "ratings.csv").write_text("\n".join(["text,stars", *stars]) + "\n")
    pairs = [{"question": text, "answer": text[::-1], "label": label} for text, label in rows(60, 4)]
    write(tmp_path / "pairs.jsonl", pairs)
    (tmp_path / "run.yaml").write_text("data: reviews.csv\nlabel_column: mood\nmodel: roberta-base\n")
    glue = tmp_path / "nyu-mll/glue"
    head = "---\nconfigs:\n"
    for subset in ("sst2", "cola"):
        head += f"- config_name: {subset}\n  data_files:\n"
        for seed, split in enumerate(("train", "validation")):
            head += f"  - split: {split}\n    path: {subset}/{split}.jsonl\n"
            lines = [json.dumps({"sentence": text, "label": int(label == "up")}) for text, label in rows(60, 5 + seed)]
            (glue / subset).mkdir(parents=True, exist_ok=True)
            (glue / subset / f"{split}.jsonl").write_text("\n".join(lines))
    (glue / "README.md").write_text(head + "---\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(limits, "STEPS", 1)
    # in the place of the pretrained encoder, for the time it takes
    monkeypatch.setattr(demo_run, "embedded_model", lambda: str(tiny_model_folder))
    with few_resamples():
        yield tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any("peft-calib" in words for words in commands(page))])
def test_commands_run_as_printed(page, place, monkeypatch):
    for words in commands(page):
        if words[:4] == ["accelerate", "launch", "-m", "peft_calib.cli"]:
            words = ["peft-calib", *words[4:]]  # one process of those it starts
        if words[0] != "peft-calib":
            continue
        with monkeypatch.context() as patch, client_of_a_hub(patch) if words[1].startswith("push") else nullcontext():
            with pytest.raises(SystemExit) as stopped:
                main(words[1:])
        ended = stopped.value.code
        if "--risk" in words:  # a model of random weights keeps no promise, and says how many rows it would take
            assert ended in (None, 0) or "No threshold" in str(ended) or "takes" in str(ended), ended
            continue
        assert ended in (None, 0), f"{shlex.join(words)}: {ended}"
