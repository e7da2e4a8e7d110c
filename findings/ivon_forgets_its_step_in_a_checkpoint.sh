#!/usr/bin/env bash
# ivon-opt 0.1.3 (with torch 2.13.0), November 2026: the optimiser of variational learning that is used for LoRA.
#
# What one expects: an optimiser whose `state_dict` is loaded goes on as if it had not been interrupted, as torch's do;
# the Trainer's `resume_from_checkpoint` rests on that.
# What was seen: momentum and curvature are in the dictionary, the number of steps (`current_step`) is not. It corrects
# the momentum for its start at zero, so the first step after loading is divided by 1 - beta1 once more: with beta1 = 0.9
# it is ten times as long as the same step without an interruption, the second five times, and so on. Nothing is
# said. Setting `optimizer.current_step` by hand after loading gives the uninterrupted step.
#
# Exit status 0 while this is so; 1 when it has changed.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy ivon-opt==0.1.3 2>&1 |
	grep -v "is ignored" || true

cat > "$scratch/look.py" <<'PYTHON'
import copy
import sys

import torch
from ivon import IVON

STEPS = 50


def optimiser(start: torch.Tensor) -> tuple[torch.nn.Parameter, IVON]:
    weight = torch.nn.Parameter(start.clone())
    return weight, IVON([weight], lr=0.1, ess=1e6, hess_init=1.0, weight_decay=0.0)


def step(weight: torch.nn.Parameter, optimizer: IVON) -> torch.Tensor:
    before = weight.detach().clone()
    torch.manual_seed(0)  # the same noise for every step that is compared
    optimizer.zero_grad()
    with optimizer.sampled_params(train=True):
        weight.sum().backward()
    optimizer.step()
    return (weight.detach() - before).norm()


weight, optimizer = optimiser(torch.zeros(4))
for _ in range(STEPS):
    step(weight, optimizer)
here, state = weight.detach().clone(), copy.deepcopy(optimizer.state_dict())
uninterrupted = step(weight, optimizer)
lengths = {}
for name, known in (("as loaded", None), ("current_step set by hand", STEPS)):
    weight, optimizer = optimiser(here)
    optimizer.load_state_dict(copy.deepcopy(state))
    if known is not None:
        optimizer.current_step = known
    lengths[name] = float(step(weight, optimizer) / uninterrupted)
print(f"the next step after {STEPS}, as a multiple of the uninterrupted one:", lengths)
longer, same = lengths.values()
sys.exit(0 if 9 < longer < 11 and abs(same - 1) < 1e-3 else 1)
PYTHON

"$scratch/venv/bin/python" -W ignore "$scratch/look.py"
