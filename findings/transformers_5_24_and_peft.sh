#!/usr/bin/env bash
# transformers 5.24.0 beside PEFT 0.21.2, each the newest of its kind in November 2026.
#
# What one expects: two newest releases that install together without a word from pip work together.
# What was seen: everything that goes through transformers' own adapter methods (add_adapter, load_adapter,
# set_adapter ...) raises a ValueError that asks for PEFT 0.22.0, of which there is no release. The same model
# through PEFT's own get_peft_model works. transformers 5.23.0 beside the same PEFT adds the adapter.
#
# Exit status 0 while this is so; 1 when it has changed.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
pip() { "$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" 2>&1 | grep -v "is ignored" || true; }

cat > "$scratch/look.py" <<'PYTHON'
import sys

import peft
import transformers
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel

sizes = dict(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
config = LoraConfig(target_modules=["query"])
try:
    BertModel(BertConfig(**sizes)).add_adapter(config)
    found = "added"
except ValueError as error:
    found = f"ValueError: {error}"
wrapped = type(get_peft_model(BertModel(BertConfig(**sizes)), config)).__name__
print(f"transformers {transformers.__version__}, peft {peft.__version__}: add_adapter: {found}; get_peft_model: {wrapped}")
wanted = sys.argv[1]
sys.exit(0 if wanted in found and wrapped == "PeftModel" else 1)
PYTHON

pip torch==2.13.0 transformers==5.24.0 peft==0.21.2
"$scratch/venv/bin/python" -W ignore "$scratch/look.py" "0.22.0"
pip transformers==5.23.0
"$scratch/venv/bin/python" -W ignore "$scratch/look.py" "added"
