"""The index of a folder of draws: which adapters lie in it, where they come from, and what each of them is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS

from .files import file_hash, write_atomically
from .identity import folder_digest
from .json_files import DIGEST, inside, read_json, sealed

#: Name of the index.
DRAWS_INDEX = "draws.json"
_MEND = "Write the folder again with export_lora(..., num_samples=K)"


def write_draws_index(folder: Path, draws: Sequence[str], mean: str | None, **facts: Any) -> None:
    """Write the index of a folder of draws."""
    names = [*draws, *([mean] if mean is not None else [])]
    index = {"num_samples": len(draws), **facts, "draws": list(draws), "mean": mean}
    index["digests"] = {name: _digest(folder / name) for name in names}
    # a server knows no PEFT to make a digest with: it can hash a file
    files = {name: folder / name / WEIGHTS for name in names if (folder / name).is_dir()}
    if files:
        index["weights"] = {name: file_hash(file) for name, file in files.items()}
    write_atomically(folder / DRAWS_INDEX, json.dumps(sealed(index), indent=2) + "\n")


def copy_draws_index(source: Path, folder: Path, suffix: str) -> None:
    """Write the index of the same draws in another form: files with a suffix."""
    draws, mean = read_draws_index(source)
    told = read_json(source / DRAWS_INDEX, _MEND).content
    facts = {
        name: told[name] for name in told if name not in ("num_samples", "draws", "mean", "digests", "weights", DIGEST)
    }
    write_draws_index(folder, [f"{name}{suffix}" for name in draws], mean and f"{mean}{suffix}", **facts)


def _digest(place: Path) -> str:
    return folder_digest(place) if place.is_dir() else file_hash(place)


def read_draws_index(folder: str | Path) -> tuple[list[str], str | None]:
    """The draws that an index names, each held to be the one that was written, and the mean's name, if any."""
    folder = Path(folder)
    place = folder / DRAWS_INDEX
    index = read_json(place, _MEND)
    draws: list[str] = index.listing("draws", str)
    mean: str | None = index.text("mean", default=None)
    count = index.integer("num_samples", least=1, default=len(draws))
    if count != len(draws) or not draws:
        raise index.wrong("draws", f"{count} names, as num_samples says")
    if sorted(draws, key=_number) != draws:
        raise index.wrong("draws", "in the order in which they were written, by number")
    names = [*draws, *([mean] if mean is not None else [])]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{place} names {twice!r} twice. {_MEND}.")
    digests = index.mapping("digests", None)
    for name in names:
        if not inside(folder, name, str(place)).exists():
            raise FileNotFoundError(f"{place} names {name!r}, but there is no such folder. {_MEND}.")
        if digests is not None and digests.text(name) != _digest(folder / name):
            raise ValueError(
                f"{folder / name} is not the draw that was written there: it has changed, or its digest in {place}. "
                f"{_MEND}."
            )
    index.check_seal()
    return draws, mean


def _number(name: str) -> int:
    """Draw k is draw k of a prediction with the same seed: in another order weights would go to the wrong draws."""
    digits = name.rpartition("-")[2].partition(".")[0]
    return int(digits) if digits.isascii() and digits.isdigit() else 0
