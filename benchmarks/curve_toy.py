"""Low-loss curves on a small problem with known answers: the three directions of the CurveLoRA paper, in minutes.

Digits of scikit-learn: a SiLU network 64-256-256-10 learns 800 images turned by 90 degrees and is frozen; LoRA (r = 8,
scaling 2, all three layers) learns 300 upright images; 697 are tested on. Three LoRA adapters trained by PEFT are the
anchors. A barrier is the largest training loss on 41 points of a curve minus the largest at its anchors, in nats.

- MAP: the anchors, one at a time. DE: the mean of their probabilities.
- Lin: straight lines between the anchors, in factor space; "balanced and aligned" is the gauge control, and "Lin in
  weights" interpolates the updates themselves.
- ALC, FLC: anchored and free curve, trained at one point a step ("one t"), or at two opposite points with the
  diversity term at weight lambda ("pair"; lambda 0 is the control, for a pair sees twice as much data a step).

The exit status is 1 if an expected direction fails in the mean of the seeds. Seeds that the output file holds are not
repeated.

    python benchmarks/curve_toy.py --output benchmarks/results/curve_toy.json
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from harness import describe_machine, kept, parser, point_scores, print_scores, spread_of, write
from peft import LoraConfig, PeftModel, get_peft_model
from sklearn.datasets import load_digits
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

import peft_calib
from peft_calib import CurveLoraConfig

LAYERS = ["layers.0", "layers.2", "layers.4"]
#: A weight of the diversity term that has it computed and changes nothing: the control of the two-point objective.
NO_WEIGHT = 1e-12
ONE, ZERO, FIFTH, FULL = "one t", "pair, lambda 0", "pair, lambda 0.2", "pair, lambda 1"
OBJECTIVES = {ONE: 0.0, ZERO: NO_WEIGHT, FIFTH: 0.2, FULL: 1.0}
POINTS = 41
Rows = tuple[torch.Tensor, torch.Tensor]


class Network(nn.Module):
    """A SiLU network that answers as a transformers classifier does."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 10)]
        self.layers = nn.Sequential(*sizes)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> SequenceClassifierOutput:
        logits = self.layers(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def digits(seed: int) -> tuple[Rows, Rows, Rows]:
    """800 images turned by 90 degrees, 300 upright ones to train on and 697 to test on."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype(np.float32) / 16
    order = np.random.default_rng(seed).permutation(len(labels))
    turned = np.rot90(images, axes=(1, 2))

    def rows(pixels: np.ndarray, chosen: np.ndarray) -> Rows:
        flat = np.ascontiguousarray(pixels[chosen]).reshape(len(chosen), 64)
        return torch.from_numpy(flat), torch.from_numpy(labels[chosen]).long()

    return rows(turned, order[:800]), rows(images, order[800:1100]), rows(images, order[1100:])


def fit(model: nn.Module, rows: Rows, steps: int, seed: int, peak: float = 5e-3) -> None:
    """Adam on batches of 32: 12 % linear warm-up to the peak, then linear decay."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=peak)
    warm_up = 0.12 * steps

    def rate(step: int) -> float:
        return (step + 1) / warm_up if step < warm_up else (steps - step) / (steps - warm_up)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    model.train()
    for _ in range(steps):
        if len(order) < 32:
            order = torch.randperm(len(rows[0]), generator=generator)
        chosen, order = order[:32], order[32:]
        model(x=rows[0][chosen], labels=rows[1][chosen]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def train_anchors(base: Network, rows: Rows, folder: Path, seed: int, steps: int) -> list[str]:
    """Three LoRA adapters that differ in their first A and in the order of the rows, saved by PEFT."""
    folders = []
    for index in range(3):
        torch.manual_seed(1000 * seed + index)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=LAYERS)
        model = get_peft_model(copy.deepcopy(base), config)
        fit(model, rows, steps, 1000 * seed + index)
        folders.append(str(folder / f"anchor-{index}"))
        model.save_pretrained(folders[-1])
    return folders


def build(base: Network, seed: int, folders: list[str] | None, **fields) -> PeftModel:
    """A curve through three anchors; anchored if there are folders."""
    if folders is not None:
        fields |= {"curve_mode": "anchored", "anchor_adapters": folders}
    config = CurveLoraConfig(r=8, lora_alpha=16, target_modules=LAYERS, num_anchors=3, sample_seed=seed, **fields)
    return get_peft_model(copy.deepcopy(base), config)


def measure(model: PeftModel, train: Rows, test: Rows) -> dict[str, float]:
    """Scores of the average over the curve's own grid, and the barrier on the training rows."""
    prediction = peft_calib.predict(model, {"x": test[0]})
    rows = [{"x": x, "labels": label} for x, label in zip(*train, strict=True)]
    profile = peft_calib.loss_profile(model, rows, POINTS, batch_size=len(rows))
    return {**point_scores(prediction.sample_probabilities, test[1]), "barrier": profile.barrier}


@torch.no_grad()
def measure_lines_in_weights(base: Network, line: PeftModel, train: Rows, test: Rows) -> dict[str, float]:
    """Straight lines between the anchors' updates `s B A`, whose rank is that of two anchors together."""
    updates = {}
    for anchor in range(3):
        with peft_calib.curve_at(line, float(anchor)):
            for slot, A, B in line.base_model.get_factors():
                updates.setdefault(slot.name, []).append(slot.scaling * B @ A)
    stacks = {name: torch.stack(found) for name, found in updates.items()}
    shape = line.base_model.get_law().shape

    def logits(points: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        answers = []
        for weights in shape.coefficients(points).float():
            merged = copy.deepcopy(base)
            for name, stack in stacks.items():
                merged.get_submodule(name).weight += torch.tensordot(weights, stack, 1)
            answers.append(merged(x).logits)
        return torch.stack(answers)

    log_p = logits(shape.grid(POINTS), train[0]).double().log_softmax(-1)
    losses = -log_p[:, torch.arange(len(train[1])), train[1]].mean(1)
    barrier = float(losses.max() - losses[:: POINTS // 2].max())  # the anchors are the ends and the middle
    return {**point_scores(logits(shape.grid(), test[0]).softmax(-1), test[1]), "barrier": barrier}


def run(seed: int, anchor_steps: int, curve_steps: int) -> dict[str, dict[str, float]]:
    """All methods with one seed."""
    turned, train, test = digits(seed)
    torch.manual_seed(seed)
    base = Network()
    fit(base, turned, 2000, seed, peak=1e-3)
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folders = train_anchors(base, train, Path(scratch), seed, anchor_steps)
        line = build(base, seed, folders, num_handles=0)
        members = peft_calib.predict(line, {"x": test[0]}, num_samples=3).sample_probabilities
        singles = [point_scores(member.unsqueeze(0), test[1]) for member in members]
        found["MAP"] = {key: statistics.mean(single[key] for single in singles) for key in singles[0]}
        found["DE(3)"] = point_scores(members, test[1])
        found["Lin(3)"] = measure(line, train, test)
        aligned = build(base, seed, folders, num_handles=0, gauge_align="procrustes")
        found["Lin(3), balanced and aligned"] = measure(aligned, train, test)
        found["Lin(3) in weights"] = measure_lines_in_weights(base, line, train, test)
        for objective, weight in OBJECTIVES.items():
            for name, anchors in (("ALC(3,1)", folders), ("FLC(3,1)", None)):
                model = build(base, seed, anchors, num_handles=1, jsd_weight=weight, jsd_margin=0.05)
                fit(model, train, curve_steps, 1000 * seed + 100)
                found[f"{name}, {objective}"] = measure(model, train, test)
    return found


def summarise(runs: dict[str, dict]) -> dict[str, dict]:
    """Mean, least and greatest over the seeds."""
    first = next(iter(runs.values()))
    return {
        method: {
            key: spread_of([run["methods"][method][key] for run in runs.values()]) for key in first["methods"][method]
        }
        for method in first["methods"]
    }


def check(runs: dict[str, dict]) -> dict[str, dict]:
    """The expected directions: mean over the seeds, each seed, and whether the mean holds."""

    def values(method: str, key: str) -> list[float]:
        return [run["methods"][method][key] for run in runs.values()]

    def gains(curve: str, key: str) -> list[float]:
        pairs = zip(values(f"{curve}, {FULL}", key), values(f"{curve}, {ZERO}", key), strict=True)
        return [a - b for a, b in pairs]

    expected = {"barrier of Lin(3) > 1": (values("Lin(3)", "barrier"), lambda mean: mean > 1)}
    for curve in ("ALC(3,1)", "FLC(3,1)"):
        for objective in OBJECTIVES:
            name = f"barrier of {curve}, {objective} < 0.05"
            expected[name] = (values(f"{curve}, {objective}", "barrier"), lambda mean: mean < 0.05)
        name = f"mutual information of {curve}, lambda 1 minus lambda 0 > 0.003"
        expected[name] = (gains(curve, "mutual_information"), lambda mean: mean > 0.003)
        name = f"log-likelihood of {curve}, lambda 1 minus lambda 0 > -0.03"
        expected[name] = (gains(curve, "log_likelihood"), lambda mean: mean > -0.03)
    return {
        name: {"mean": statistics.mean(found), "seeds": found, "holds": bool(holds(statistics.mean(found)))}
        for name, (found, holds) in expected.items()
    }


def show(summary: dict[str, dict], checks: dict[str, dict]) -> None:
    """Print the table and the checks."""
    means = {method: {key: spread[0] for key, spread in found.items()} for method, found in summary.items()}
    print_scores("mean of the seeds", means)
    for name, found in checks.items():
        each = " ".join(f"{value:.4f}" for value in found["seeds"])
        print(f"{'ok  ' if found['holds'] else 'FAIL'} {name}: {found['mean']:.4f}  ({each})")


def main() -> int:
    flags = parser(__doc__)
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    flags.add_argument("--anchor-steps", type=int, default=1500)
    flags.add_argument("--curve-steps", type=int, default=3000)
    args = flags.parse_args()
    steps = {"anchor_steps": args.anchor_steps, "curve_steps": args.curve_steps}
    results = kept(args.output)
    if {key: results[key] for key in steps if key in results} not in ({}, steps):
        raise SystemExit(f"{args.output} holds runs with other numbers of steps; give another --output.")
    results |= {"machine": describe_machine(), **steps}
    runs = results.setdefault("seeds", {})
    for seed in args.seeds:
        if str(seed) not in runs:
            start = time.perf_counter()
            methods = run(seed, args.anchor_steps, args.curve_steps)
            runs[str(seed)] = {"seconds": round(time.perf_counter() - start, 1), "methods": methods}
        results["mean, least and greatest over the seeds"] = summarise(runs)
        results["checks"] = check(runs)
        write(args.output, results)
    show(results["mean, least and greatest over the seeds"], results["checks"])
    return 0 if all(found["holds"] for found in results["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
