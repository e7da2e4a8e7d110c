"""The picture of the front page: a LoRA before and after its temperature, from a run that was evaluated.

python benchmarks/front_picture.py evidence-runs/ag_news-0-lora-0 --picture docs/pictures/front.png \
    --output benchmarks/results/front_picture.json
"""

import argparse
import json
from pathlib import Path

from peft_calib.calibration import before_after_diagram
from peft_calib.runs.evaluation import AFTER, BEFORE, Evaluation

SCORES = ("accuracy", "nll", "ece")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    (report,) = sorted(args.run.glob("evaluation/*/report.json"))
    found = Evaluation(report.parent, json.loads(report.read_text()))
    variant, labels = found.main_variant, found.items["labels"]
    before, after = (found.probabilities(variant, stage) for stage in (BEFORE, AFTER))
    before_after_diagram(before, after, labels).savefig(args.picture, dpi=130)
    measured = found.content["variants"][variant]
    content = {
        "run": found.content["run"],
        "method": found.content["method"],
        "rows": found.content["rows"],
        "temperature": measured["temperature"],
        **{stage: {name: measured[stage][name] for name in SCORES} for stage in (BEFORE, AFTER)},
    }
    args.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
