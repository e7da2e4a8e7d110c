"""What a run has fitted lies in its own file and beside its adapters; where these differ, one was changed by hand."""

from __future__ import annotations

from pathlib import Path

from ..artefact import ARTEFACT_FILE, MEND, RECALIBRATION_FILE, RUN_CONFIG, RUN_FINISHED, RUN_TEMPERATURE, WAYS
from ..json_files import Fields, describe, read_json


def check_temperatures(folder: str | Path) -> None:
    """Raise `ValueError` where what a run has fitted was changed by hand: it is not that of its fit, or of a copy.

    Predicting reads the copies beside the adapters, an evaluation the run's own file.

    Args:
        folder: Of a run, with `temperature.json`.
    """
    folder = Path(folder)
    ways = read_json(folder / RUN_TEMPERATURE, MEND)
    copies = _copies(folder)
    for how in ways:
        used = ways.mapping(how)
        parameters, fit = used.mapping("parameters"), used.mapping("fit", None)
        if fit is not None and "temperature" in parameters:
            number = parameters.get("temperature")
            fitted = fit.number("fitted") if fit.flag("applied") else 1.0
            if number != fitted:
                raise _changed(ways, f"{how}.parameters.temperature is {number!r}, and its fit says {fitted!r}")
        for copy in copies.get(how, ()):
            _check_copy(copy, used)


def run_of(folder: str | Path) -> Path | None:
    """The finished run that a folder is, or that it is an adapter of; None where there is none with temperatures."""
    said = (RUN_CONFIG, RUN_FINISHED, RUN_TEMPERATURE)
    places = (Path(folder), Path(folder).absolute().parent)
    return next((place for place in places if all((place / name).is_file() for name in said)), None)


def _copies(folder: Path) -> dict[str, list[Fields]]:
    """What lies in a run of each way of predicting beside its own file."""
    found: dict[str, list[Fields]] = {}
    for place in (folder, *sorted(folder.glob("*/"))):
        if (place / ARTEFACT_FILE).is_file():
            ways = read_json(place / ARTEFACT_FILE, MEND).mapping("ways")
            for how in ways:
                found.setdefault(how, []).append(ways.mapping(how))
        elif (place / RECALIBRATION_FILE).is_file():
            fields = read_json(place / RECALIBRATION_FILE, MEND)
            found.setdefault(fields.text("how", among=WAYS, default="mean"), []).append(fields)
    return found


def _check_copy(copy: Fields, used: Fields) -> None:
    """Hold a copy against what it was copied of; another fit, of other rows, is none."""
    fits = [fields.mapping("fitted_on", None) for fields in (copy, used)]
    if None not in fits and fits[0].get("digest", None) != fits[1].get("digest", None):
        return
    there, own = copy.mapping("parameters"), used.mapping("parameters")
    for name in own:
        now, then = there.get(name), own.get(name)
        if now != then:
            told = f"{copy.prefix}parameters.{name} is {describe(now)}, and {used.source}"
            raise _changed(copy, f"{told} says {describe(then)}")


def _changed(fields: Fields, told: str) -> ValueError:
    return ValueError(
        f"{fields.source}: {told}: one of them was changed by hand, and nobody can say which holds for the adapter. "
        f"{fields.mend}; Predictor.calibrate fits another temperature."
    )
