#!/usr/bin/env bash
# trackio 0.43.0, November 2026, which is offered as a drop-in for wandb: `import trackio as wandb`.
#
# What one expects: what asks "is a run under way?" as it asks wandb, `wandb.run is not None`, is answered the same way.
# What was seen: `trackio.run` is the package's own module of that name, before a run, during one and after it, so the
# question is always answered with yes; what then logs to the run that is not there ends in a RuntimeError that asks for
# trackio.init(). The run itself is told by `trackio.context_vars.current_run.get()`, None where there is none.
#
# Exit status 0 while this is so; 1 when it has changed.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check trackio==0.43.0 2>&1 |
	grep -v "is ignored" || true

cat > "$scratch/look.py" <<'PYTHON'
import inspect
import sys

import trackio as wandb
from trackio.context_vars import current_run

under_way = wandb.run is not None
try:
    wandb.log({"loss": 1.0})
    logged = "logged"
except RuntimeError as error:
    logged = f"RuntimeError: {error}"
print(f"trackio {wandb.__version__}: run is {type(wandb.run).__name__}, current_run {current_run.get()}, log: {logged}")
sys.exit(0 if under_way and inspect.ismodule(wandb.run) and current_run.get() is None and "init" in logged else 1)
PYTHON

TRACKIO_DIR="$scratch/data" "$scratch/venv/bin/python" -W ignore "$scratch/look.py"
