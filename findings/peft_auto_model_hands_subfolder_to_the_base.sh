#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0, November 2026.
#
# What one expects: an adapter that lies in a folder of a repository loads with the same keyword through both doors,
# PeftModel.from_pretrained(base, name, subfolder="lora") and AutoPeftModelFor...from_pretrained(name, subfolder="lora").
# What was seen: the first works. The second reads the adapter's configuration in that folder, and then hands the same
# keyword on to the loading of the base model, whose files are looked for in a folder of that name, too. A base that lies
# at the top of its repository, as nearly all do, ends in "Unrecognized model ... Should have a `model_type` key in its
# config.json", which speaks of the base and not of the keyword.
#
# Exit status 0 while this is so; 1 when it has changed.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
	peft==0.21.2 2>&1 | grep -v "is ignored" || true

cat > "$scratch/look.py" <<'PYTHON'
import os
import sys

import peft
import transformers
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification


def adapter_on(base: str, repository: str) -> None:
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), config)
    model.save_pretrained(os.path.join(repository, "lora"))


def through_auto(repository: str) -> str:
    try:
        return type(AutoPeftModelForSequenceClassification.from_pretrained(repository, subfolder="lora")).__name__
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {str(error)[:70]}"


os.chdir(sys.argv[1])
sizes = dict(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
model = BertForSequenceClassification(BertConfig(**sizes))
model.save_pretrained("base")
adapter_on("base", "usual")
base = AutoModelForSequenceClassification.from_pretrained("base")
by_hand = type(PeftModel.from_pretrained(base, "usual", subfolder="lora")).__name__
usual = through_auto("usual")
print(f"peft {peft.__version__}, transformers {transformers.__version__}: by hand {by_hand}; AutoPeftModel {usual}")
sys.exit(0 if by_hand == "PeftModelForSequenceClassification" and "rror" in usual else 1)
PYTHON

"$scratch/venv/bin/python" -W ignore "$scratch/look.py" "$scratch"
