"""Each headline claim of the methods' papers: our protocol, our number, our verdict.

Most numbers are those of other benchmarks (`bayesian_calibration.json`, `curve_minilm.json`, `train_step.json`). Two
claims have runs of their own, with `evidence.py` and its protocol `benchmarks/evidence/claims.json`:

    python benchmarks/evidence.py run --protocol benchmarks/evidence/claims.json --data DIR --runs DIR
    python benchmarks/claims.py table --runs DIR --output benchmarks/results/claims.json
    python benchmarks/claims.py page --output benchmarks/results/claims.json    # docs/claims.md
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from harness import describe_machine, parser, write

from peft_calib.calibration import calibration_report
from peft_calib.files import write_atomically

HERE = Path(__file__).parent
PROTOCOL = HERE / "evidence" / "claims.json"
PAGE = HERE.parent / "docs" / "claims.md"
SCORES = ("accuracy", "nll", "ece")
HELD, FAILED, OPEN = "reproduced", "not reproduced", "not tested here"
SEEN = "so in these runs"  # too few of them for an interval

HEAD = """# What the papers claim, and what was found here

<!-- written by benchmarks/claims.py page; change that, or the results -->

A small encoder and a few hundred training rows are not a 7B model on a cluster: "not reproduced" says that it was not
found here, not that it is false there, and "so in these runs" that two runs a cell went that way. Figures are from
`benchmarks/results/`; whether a method is better than a LoRA with a temperature is [another question](evidence.md),
and the one that counts.

| claim | here | verdict |
|---|---|---|
"""


class Claim(NamedTuple):
    """What a paper says, what was measured, and the verdict."""

    says: str
    found: str
    verdict: str


def raw(p: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities as they were before a temperature."""
    logits = temperature * np.log(np.maximum(p, 1e-12))
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def of_run(file: Path) -> dict[str, dict[str, float]]:
    """Scores of a run's test rows before and after its temperature."""
    found = json.loads(file.read_text(encoding="utf-8"))
    p, labels = np.array(found["test"]["p"]), np.array(found["test"]["labels"])
    p /= p.sum(axis=1, keepdims=True)
    parts = {"before": raw(p, found["temperature"]), "after": p}
    reports = {part: calibration_report(q, labels, confidence_level=None) for part, q in parts.items()}
    return {part: {score: round(report[score], 4) for score in SCORES} for part, report in reports.items()}


def table(runs: Path, protocol: dict[str, Any]) -> dict[str, Any]:
    """Scores of every cell and method, one entry a run."""
    found: dict[str, Any] = {}
    for cell in protocol["cells"]:
        for method in protocol["methods"]:
            files = [runs / "probabilities" / cell / f"{method}-{seed}.json" for seed in range(protocol["seeds"])]
            found.setdefault(cell, {})[method] = [of_run(file) for file in files]
    return {"protocol": protocol, "machine": describe_machine(), "runs": found}


def mean(runs: list[dict[str, Any]], part: str, score: str) -> float:
    return float(np.mean([run[part][score] for run in runs]))


def longer(results: dict[str, Any]) -> Claim:
    """ECE by epochs, each the mean over a cell's runs."""
    names = ("lora, 2 epochs", "lora, 8 epochs", "lora, 32 epochs")
    cells, told = [], []
    for cell, methods in results["runs"].items():
        before, after = ([mean(methods[name], part, "ece") for name in names] for part in ("before", "after"))
        cells.append((before, after))
        told.append(
            f"{cell.partition('-')[0]}: ECE {' / '.join(f'{e:.3f}' for e in before)} after 2 / 8 / 32 epochs, with a "
            f"temperature {' / '.join(f'{e:.3f}' for e in after)}"
        )
    worse = all(before[2] > before[1] and before[2] > before[0] for before, _ in cells)
    return Claim("HypeLoRA: longer training degrades calibration", "; ".join(told), SEEN if worse else FAILED)


def frozen(results: dict[str, Any]) -> Claim:
    """A generated A and a fixed one, by the same recipe."""
    told, holds = [], True
    for cell, methods in results["runs"].items():
        a, b = methods["hyper-lora"], methods["hyper-lora, fixed A"]
        accuracy, ece = ([mean(runs, "before", score) for runs in (a, b)] for score in ("accuracy", "ece"))
        told.append(
            f"{cell.partition('-')[0]}: accuracy {accuracy[0]:.3f} with a generated A, {accuracy[1]:.3f} with a fixed "
            f"one, ECE {ece[0]:.3f} and {ece[1]:.3f}"
        )
        holds = holds and accuracy[1] < accuracy[0] and ece[1] < ece[0]
    return Claim("HypeLoRA: a frozen A gives up accuracy for calibration", "; ".join(told), SEEN if holds else FAILED)


def reductions(found: dict[str, Any]) -> list[Claim]:
    """How much less ECE and NLL BayesianLoRA has than LoRA, at most over the data sets, and after a temperature."""
    claims = []
    for score, says in (("ece", "up to 84 % less ECE"), ("nll", "up to 76 % less NLL")):
        told, best = [], 0.0
        for data, about in found["data"].items():
            means = about["mean, least and greatest over the seeds"]
            lora, ours = means["LoRA"][score][0], means["BayesianLoRA, 8 draws"][score][0]
            tempered = means["LoRA + T"][score][0]
            best = max(best, 1 - ours / lora)
            told.append(f"{data}: {lora:.3f} to {ours:.3f} (LoRA with a temperature {tempered:.3f})")
        verdict = HELD if best >= (0.84 if score == "ece" else 0.76) else FAILED
        claims.append(Claim(f"Bayesian-LoRA: {says} than LoRA", "; ".join(told), verdict))
    return claims


def cost(found: dict[str, Any]) -> Claim:
    ratios = {name: about["methods"]["bayesian-lora"]["median_ratio"] for name, about in found.items()}
    told = ", ".join(f"{ratio:.2f} ({name})" for name, ratio in ratios.items())
    return Claim(
        "Bayesian-LoRA: 1.2 times the cost of LoRA", f"a training step on one CPU thread: {told}",
        HELD if max(ratios.values()) <= 1.2 else FAILED,
    )  # fmt: skip


def curves(found: dict[str, Any]) -> list[Claim]:
    """Barriers, and mutual information at equal likelihood, over the seeds."""
    differences = next(iter(found["data"].values()))["over the seeds"]["differences"]

    def said(name: str) -> str:
        d = differences[name]
        return f"{d['mean']:+.3f} [{d['interval'][0]:+.3f}, {d['interval'][1]:+.3f}]"

    barrier, more = differences["(a) barrier, Lin(3) - ALC(3,2)"], differences["(c) MI, ALC - DE"]
    aligned = said("(a) barrier, Lin(3) - Lin(3), balanced and aligned")
    weight, price = differences["(d) MI, lambda 1 - lambda 0"], differences["(d) LL, lambda 1 - lambda 0"]
    return [
        Claim(
            "LoRA-Curve: straight lines have a barrier, curves have none",
            f"training loss, nats: {said('(a) barrier, Lin(3) - ALC(3,2)')}; of it {aligned} is gone once the anchors "
            "are balanced and aligned",
            HELD if barrier["interval"][0] > 0 else FAILED,
        ),
        Claim(
            "LoRA-Curve: more mutual information than the ensemble of the anchors, without a price",
            f"mutual information {said('(c) MI, ALC - DE')}, log-likelihood {said('(b) LL, ALC - DE')}; against an "
            f"ensemble of equal compute {said('(b) LL, ALC - DE of equal compute')}",
            HELD if more["interval"][0] > 0 and differences["(b) LL, ALC - DE"]["interval"][0] > 0 else FAILED,
        ),
        Claim(
            "LoRA-Curve: the diversity term raises mutual information at equal likelihood",
            f"mutual information {said('(d) MI, lambda 1 - lambda 0')}, log-likelihood "
            f"{said('(d) LL, lambda 1 - lambda 0')}",
            HELD if weight["interval"][0] > 0 > price["interval"][0] else FAILED,
        ),
    ]  # fmt: skip


def heads(found: dict[str, Any]) -> list[Claim]:
    """The claims of AdUE and ALIEN, as their study judged them."""
    return [
        Claim(f"AdUE, ALIEN: {name[2:]}", claim["note"], HELD if claim["held"] else FAILED)
        for name, claim in found["claims"].items()
    ]


def page(results: dict[str, Any], stored: dict[str, dict[str, Any]]) -> str:
    """The page in Markdown."""
    found = [longer(results), frozen(results), *reductions(stored["bayesian_calibration"]), cost(stored["train_step"])]
    found += [*curves(stored["curve_minilm"]), *heads(stored["uncertainty_head"])]
    found.append(Claim("Bayesian-LoRA: models of 30B parameters", "needs accelerators", OPEN))
    lines = [f"| {claim.says} | {claim.found} | {claim.verdict} |" for claim in found]
    protocol = results["protocol"]
    rows = next(iter(protocol["cells"].values()))["rows"]
    tail = (
        f"\nRuns: MiniLM, {rows} training rows, means over {protocol['seeds']} runs (longer "
        "training, frozen A) or three seeds (the others); brackets are 95 % intervals over seeds. The head's "
        "claims have [a page of their own](uncertainty-head.md).\n"
    )
    return HEAD + "\n".join(lines) + "\n" + tail


def stored_results() -> dict[str, dict[str, Any]]:
    """The results of other benchmarks that the page tells."""
    names = ("bayesian_calibration", "train_step", "curve_minilm", "uncertainty_head")
    return {name: json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8")) for name in names}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("what", choices=("table", "page"))
    options.add_argument("--runs", type=Path)
    args = options.parse_args()
    if args.what == "table":
        write(args.output, table(args.runs, json.loads(PROTOCOL.read_text(encoding="utf-8"))))
        return
    write_atomically(PAGE, page(json.loads(args.output.read_text(encoding="utf-8")), stored_results()))


if __name__ == "__main__":
    main()
