"""Mutate saved adapters a thousand times each, and count how many load with other logits and without a word.

python benchmarks/mutations.py --output benchmarks/results/mutations.json

For each method, and stock LoRA beside it: a mutated copy of the folder (a field of its configuration, its text, a
tensor, bytes of the weights file) is loaded onto a fresh base model, and its logits and three draws are held against
the good folder's. Edits on purpose, followed by `accept_edits`, are counted apart. A Markdown table is written beside
the JSON. Memory is limited to 8 GiB, as stock LoRA believes every size.
"""

from __future__ import annotations

import logging
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from harness import describe_machine, parser, write
from mutation_study import CLEAR, METHODS, OTHER, SAME, UNCLEAR, save_adapter, study
from mutations import mutations

from peft_calib.edits import accept_edits

OUTCOMES = (SAME, CLEAR, UNCLEAR, OTHER)


def of_method(method: str, count: int, edits: int, seed: int) -> dict:
    """One method: outcomes of its mutations, those that ended badly, and what became of edits on purpose."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        good = Path(scratch) / "good"
        save_adapter(method, good)
        counts, bad = study(good, Path(scratch), mutations(good, count, seed))
        result = {"mutations": count, "outcomes": _by_outcome(counts), "bad": bad[:40]}
        if method != "lora":
            wanted = [m for m in mutations(good, 4 * edits, seed + 1) if m.kind in ("config", "tensor")][:edits]
            accepted, _ = study(good, Path(scratch), wanted, then=accept_edits)
            result["edits_on_purpose"] = _by_outcome(accepted)
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def _by_outcome(counts: Counter) -> dict[str, int]:
    return {outcome: sum(n for (_, found), n in counts.items() if found == outcome) for outcome in OUTCOMES}


def to_markdown(methods: dict) -> str:
    """One column a method, one row an outcome."""
    names = list(methods)
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    lines.append("| mutations | " + " | ".join(str(methods[n]["mutations"]) for n in names) + " |")
    for outcome in OUTCOMES:
        lines.append(f"| {outcome} | " + " | ".join(str(methods[n]["outcomes"][outcome]) for n in names) + " |")
    edits = [str(methods[n].get("edits_on_purpose", {}).get(OTHER, "-")) for n in names]
    return "\n".join([*lines, "| edits on purpose, obeyed after `accept_edits` | " + " | ".join(edits) + " |"]) + "\n"


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    flags.add_argument("--count", type=int, default=1000)
    flags.add_argument("--edits", type=int, default=100)
    flags.add_argument("--seed", type=int, default=0)
    options = flags.parse_args()
    logging.disable(logging.WARNING)
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    methods = {}
    for method in options.methods:
        methods[method] = of_method(method, options.count, options.edits, options.seed)
        print(method, methods[method]["outcomes"], flush=True)
    print(to_markdown(methods))
    if options.output is not None:
        results = {"machine": describe_machine(), "seed": options.seed, "methods": methods}
        write(options.output, results)
        options.output.with_suffix(".md").write_text(to_markdown(methods))


if __name__ == "__main__":
    main()
