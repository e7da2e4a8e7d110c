"""What every method costs, from the results of the other benchmarks: docs/cost.md.

python benchmarks/cost_page.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft_calib.files import write_atomically

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "cost.md"
SOURCES = ("train_step", "curve_train_step", "members", "predict", "uncertainty_head_cost")
MODELS = ("minilm", "encoder-12x768")
#: Of members, by what the page calls them; those that were measured.
WIDTHS = {"minilm": "MiniLM", "bert-12x768": "12 x 768"}

HEAD = """# What it costs

<!-- written by benchmarks/cost_page.py; change that, or the results -->

Everything is a ratio to a LoRA (PEFT's own, rank 8 in all attention and dense layers), measured in turns with it in
one run on one CPU thread; medians. MiniLM has 6 layers of width 384, the other encoder 12 of width 768. Figures are
from `benchmarks/results/`, each made by the benchmark of its name. What the cost buys is [another page](evidence.md).
On an accelerator nothing of this has been measured; `make gpu` measures it there.
"""

STEP = """
## A training step

"floor" is the base with a gradient to its inputs and no adapter; "from floor" is how far a step lies from it, as a
share of LoRA's distance. Two points a step are two functions of every row.

| method | parameters, MiniLM | step, MiniLM | step, 12 x 768 | from floor | from floor | memory | memory |
|---|---:|---:|---:|---:|---:|---:|---:|
"""

WHOLE = """
## A whole training of members

Process CPU time of {epochs} epochs over {rows} in the stock Trainer, and the peak memory of a process of its own.
"Kept" is with the trunk's states kept from epoch to epoch, their computing counted.

"""

PREDICT = """
## A prediction with {draws} draws

In forwards of the mean (which costs what a LoRA costs: an exported one {exported:.2f}). "In one pass" is what
`predict` does; "one by one" a loop over the draws.

| rows | in one pass | one by one | in one pass, last two layers alone vary |
|---|---:|---:|---:|
"""


def table(rows: Iterable[Iterable[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def steps(stored: dict[str, dict[str, Any]]) -> str:
    """A row for each method whose step was measured on both models."""
    of_model = {model: dict(stored["train_step"][model]["methods"]) for model in MODELS}
    for model in MODELS:
        for arm, found in stored["curve_train_step"][model]["arms"].items():
            if arm not in ("lora", "floor", "one point"):
                of_model[model][f"curve-lora, {arm}"] = found
    small, large = (of_model[model] for model in MODELS)
    lora = small["lora"]["trainable_parameters"]
    return table(
        (
            method,
            f"{small[method]['trainable_parameters'] / lora:.2f}",
            *(f"{of[method]['median_ratio']:.2f}" for of in (small, large)),
            *(f"{of[method]['distance_from_floor']:.2f}" for of in (small, large)),
            *(f"{of[method]['peak_memory_ratio']:.2f}" for of in (small, large)),
        )
        for method in small
    )


def trainings(members: dict[str, Any]) -> str:
    """A row for each way to train members."""
    found = {told: members[model]["arms"] for model, told in WIDTHS.items() if model in members}
    figures = {"CPU time": "median_ratio", "peak memory": "peak_ratio"}
    head = ["method", *(f"{figure}, {told}" for figure in figures for told in found)]
    lines = ["---", *["---:"] * (len(head) - 1)]
    arms = next(iter(found.values()))
    rows = ([arm, *(f"{of[arm][key]:.2f}" for key in figures.values() for of in found.values())] for arm in arms)
    return table([head]) + "|" + "|".join(lines) + "|\n" + table(rows)


def predictions(predict: dict[str, Any]) -> str:
    """A row for each shape of input."""
    ways = ("sample", "sequential, all logits", "sample, last 2 layers")
    cases = {name: case for name, case in predict.items() if isinstance(case, dict) and "sample" in case}
    return table((name, *(f"{case[way]['ratio']:.2f}" for way in ways)) for name, case in cases.items())


def page(stored: dict[str, dict[str, Any]]) -> str:
    """The page in Markdown."""
    members, predict, head = stored["members"], stored["predict"], stored["uncertainty_head_cost"]
    case = members["minilm"]
    sizes = " and ".join(f"{members[key]['rows']} rows ({told})" for key, told in WIDTHS.items() if key in members)
    exported = predict["exported mean"]["exported mean"]["ratio"]
    trials, one = (head["fit"][name]["median_ratio"] for name in ("fit_27_trials", "training"))
    return (
        HEAD
        + STEP
        + steps(stored)
        + WHOLE.format(rows=sizes, epochs=case["epochs"])
        + trainings(members)
        + PREDICT.format(draws=predict["draws"], exported=exported)
        + predictions(predict)
        + "\nK members of which a share rho of the layers differs take (1 - rho) + K rho forwards: two in the last "
        "half 1.5.\n\n## The uncertainty head\n\n"
        f"Its 27 trials take {trials / one:.3f} of one epoch of the adapter's training, a prediction with it "
        f"{head['predict_128_rows']['with']['median_ratio']:.2f} of one without.\n"
    )


def stored_results() -> dict[str, dict[str, Any]]:
    """What the page is made of."""
    return {name: json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8")) for name in SOURCES}


def main() -> None:
    write_atomically(PAGE, page(stored_results()))


if __name__ == "__main__":
    main()
