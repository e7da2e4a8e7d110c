#!/usr/bin/env bash
# peft 0.21.2 (with torch 2.13.0 and transformers 5.23.0), November 2026: `LoraConfig(lora_bias=True)`, a bias beside B.
#
# What one expects: a warning at saving that tensors have an "invalid shape", are "incomplete", and that shards of ZeRO-3
# or FSDP were not gathered, says that the file is broken.
# What was seen: the check takes every tensor of one dimension with "lora_B" in its name for a shard, and a bias has one
# dimension. So the warning comes at each saving of such an adapter, in one process without DeepSpeed or FSDP, and counts
# one tensor for each adapted layer. The file is whole: loaded again it gives the same output to the last bit.
#
# Exit status 0 while this is so; 1 when it has changed.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
	peft==0.21.2 2>&1 | grep -v "is ignored" || true

cat > "$scratch/look.py" <<'PYTHON'
import copy
import sys
import warnings

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

torch.manual_seed(0)
base, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)


def saved(bias: bool) -> tuple[list[str], float]:
    """The warnings of saving, and how far the loaded adapter is from the saved one."""
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["0", "1"], lora_bias=bias))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    folder = f"{sys.argv[1]}/{bias}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(folder)
    again = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    off = (again.eval()(x) - model.eval()(x)).abs().max().item()
    return [str(w.message) for w in caught if "shards were not gathered" in str(w.message)], off


(told, off), (plain, _) = saved(True), saved(False)
print(f"peft {peft.__version__}: {told[0][:110] if told else 'no warning'}... loaded again: off by {off}; without a bias {plain}")
sys.exit(0 if len(told) == 1 and "lora_B.bias" in told[0] and off == 0 and not plain else 1)
PYTHON

"$scratch/venv/bin/python" -W ignore "$scratch/look.py" "$scratch"
