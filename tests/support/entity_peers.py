"""Entities that seqeval finds in random tags: `python tests/support/entity_peers.py`, where seqeval is installed.

seqeval is no dependency, not even of the tests: its answers lie beside them.
"""

import json
import random
from pathlib import Path

FILE = Path(__file__).parents[1] / "data" / "entity_peers.json"
TAGS = ["O", "O", *(f"{mark}-{kind}" for mark in "BIES" for kind in ("PER", "LOC"))]


def sentences(count: int = 300, seed: int = 0) -> list[list[str]]:
    """Random tags of the schemes IOB2 and IOBES, valid or not."""
    chosen = random.Random(seed)
    return [chosen.choices(TAGS if number % 2 else TAGS[:6], k=chosen.randint(0, 8)) for number in range(count)]


def truth(seed: int = 1) -> list[list[str]]:
    """The same tags with a fifth of them drawn anew."""
    chosen = random.Random(seed)
    return [[tag if chosen.random() < 0.8 else chosen.choice(TAGS) for tag in tags] for tags in sentences()]


def main() -> None:
    """Ask seqeval."""
    from seqeval.metrics import f1_score, precision_score, recall_score
    from seqeval.metrics.sequence_labeling import get_entities

    found = [[(kind, first, last + 1) for kind, first, last in get_entities(tags)] for tags in sentences()]
    scores = {
        "precision": precision_score(truth(), sentences()),
        "recall": recall_score(truth(), sentences()),
        "f1": f1_score(truth(), sentences()),
        "f1_macro": f1_score(truth(), sentences(), average="macro"),
    }
    FILE.write_text(json.dumps({"seqeval 1.2.2": found, "scores": {k: float(v) for k, v in scores.items()}}) + "\n")


if __name__ == "__main__":
    main()
