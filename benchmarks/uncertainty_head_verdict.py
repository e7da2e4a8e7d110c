"""How often an uncertainty head is said to help where it does not, and where it does.

Gaussian features under a linear head of four classes. Either labels are drawn from the frozen head itself, so that no
score ranks its errors better than `1 - max p`, or from directions of which the frozen head's are a noisy copy. Each
fit, of `sr_norm`, has 400 fresh rows; what a head is worth is its error AUROC less that of the base score on 20,000
further ones.

    python benchmarks/uncertainty_head_verdict.py --output benchmarks/results/uncertainty_head_verdict.json
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from harness import describe_machine, parser, write
from torch import nn

from peft_calib import UncertaintyHead
from peft_calib.uncertainty_head import CopiedHead, FeatureSet
from peft_calib.uncertainty_head.selection import aurocs

WIDTH, CLASSES = 16, 4


def linear(noise: float) -> nn.Linear:
    """The true directions with so much of other ones."""
    true, off = (torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    head = nn.Linear(WIDTH, CLASSES, bias=False).requires_grad_(False)
    head.weight.copy_((true + noise * off) / 2)
    return head.eval()


def rows(head: nn.Linear, truth: nn.Linear, count: int, seed: int) -> FeatureSet:
    """Features, what a head answers, and labels drawn from the truth."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1, count, WIDTH, generator=generator)
    labels = torch.multinomial(truth(features[0]).softmax(-1), 1, generator=generator)[:, 0]
    return FeatureSet(features, head(features), labels)


def fits(noise: float, split: str, count: int, num_fits: int) -> dict[str, Any]:
    """What verdicts say and what is true, over fits to fresh rows."""
    head, truth = linear(noise), linear(0.0)
    copied, new = CopiedHead(head, [dict(head.named_parameters())]), rows(head, truth, 20_000, 10**6)
    helps, harms, kept, gains, said, apparent = 0, 0, 0, [], [], []
    for fit in range(num_fits):
        train, held = (rows(head, truth, count, 2 * fit + part) for part in range(2))
        found = UncertaintyHead.fit_features(train, held, copied, score="sr_norm", split=split)
        verdict = found.report.verdict
        if verdict is None:
            kept += 1
            continue
        answer = found.predict_features(new)
        base, own = aurocs(torch.stack([answer.base_uncertainty, answer.uncertainty]).numpy(), new.errors.numpy())
        gains.append(float(own - base))
        said.append(verdict.difference)
        apparent.append(verdict.head - verdict.base)
        helps, harms = helps + verdict.helps, harms + verdict.harms
    return {
        "fits": num_fits,
        "base_score_kept": kept,
        "said_to_help": helps,
        "said_to_harm": harms,
        "mean_gain_on_new_rows": float(np.mean(gains)),
        "mean_difference_said": float(np.mean(said)),
        "mean_difference_uncorrected": float(np.mean(apparent)),
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=400)
    options.add_argument("--fits", type=int, default=60)
    args = options.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": describe_machine(), "rows": args.rows}
    for name, noise in (("no head can help", 0.0), ("a head can help", 0.7)):
        for split in ("cross", "train"):
            found = results[f"{name}, {split}"] = fits(noise, split, args.rows, args.fits)
            print(name, split, found, flush=True)
            write(args.output, results)


if __name__ == "__main__":
    main()
