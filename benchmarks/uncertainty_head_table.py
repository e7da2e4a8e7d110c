"""The table of the study: every method on every set of rows, paired with another, and the papers' claims."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from peft_calib.calibration.scores.selective import aurc, error_auroc, rank

#: Scores of a method: ranking by its score, price by P(error); `own` is a score that is a probability as it is.
SCORES = ("auroc", "aurc", "ece", "ece_own", "brier")
HIGHER = {"auroc"}
#: Fits by cell, run and seed.
Fits = dict[str, dict[int, dict[int, dict[str, Any]]]]
#: `(runs, seeds, 1 + resamples)` of a score on a cell; the first is of the rows as they are.
Values = np.ndarray


def ece_of_errors(p: np.ndarray, errors: np.ndarray, num_bins: int = 15) -> float:
    """Expected calibration error of `1 - P(error)` against being right, bins of equal width."""
    bins = np.minimum((p * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bins, weights=p - errors, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(p))


def scores_of(method: dict[str, np.ndarray], errors: np.ndarray, index: np.ndarray, num_bins: int) -> list[float]:
    """In the order of `SCORES`; NaN where a method has no such probability, or the rows no error."""
    wrong = errors[index]
    ranking = rank(method["score"][index], wrong)
    found = [error_auroc(ranking), aurc(ranking)]
    for key in ("mapped", "own"):
        p = method.get(key)
        found.append(np.nan if p is None else ece_of_errors(p[index], wrong, num_bins))
    mapped = method.get("mapped")
    return [*found, np.nan if mapped is None else float(np.square(mapped[index] - wrong).mean())]


def read_fits(place: Path, protocol: dict[str, Any], sampled: Callable[..., dict[str, Any]]) -> Fits:
    """Finished fits, with the scores of several functions where all runs of a cell have been extracted."""
    fits: Fits = {}
    for cell in protocol["cells"]:
        whole = all((place / f"{cell}-{run}" / "head.safetensors").is_file() for run in range(protocol["members"]))
        for run in range(protocol["runs"]):
            files = {seed: place / "fits" / f"{cell}-{run}-{seed}.json" for seed in range(protocol["seeds"])}
            if not all(file.is_file() for file in files.values()):
                continue
            functions = sampled(cell, run, protocol, place) if whole else {}
            for seed, file in files.items():
                found = json.loads(file.read_text(encoding="utf-8"))
                of_seed = functions.get(seed, {"methods": {}})
                found["methods"] |= of_seed["methods"]
                found["accuracy_of_ensemble"] = of_seed.get("accuracy_of_ensemble")
                fits.setdefault(cell, {}).setdefault(run, {})[seed] = found
    return fits


def measured(fits: dict[int, dict[int, dict[str, Any]]], part: str, protocol: dict[str, Any]) -> dict[str, Values]:
    """`(runs, seeds, 1 + resamples, scores)` of every method on one set of rows of a cell.

    All runs, seeds and methods see the same resamples of the rows.
    """
    first = next(iter(next(iter(fits.values())).values()))
    size = len(first["errors"][part])
    generator = np.random.default_rng(0)
    draws = [np.arange(size), *(generator.integers(0, size, size) for _ in range(protocol["num_resamples"]))]
    names = [name for name, of in first["methods"].items() if part in of]
    found: dict[str, Values] = {}
    for name in names:
        table = np.full((len(fits), len(next(iter(fits.values()))), len(draws), len(SCORES)), np.nan)
        for place, (run, seed) in zip(np.ndindex(table.shape[:2]), pairs(fits), strict=True):
            if name not in fits[run][seed]["methods"]:
                continue
            errors = np.array(fits[run][seed]["errors"][part])
            method = {key: np.array(values) for key, values in fits[run][seed]["methods"][name][part].items()}
            for number, index in enumerate(draws):
                table[(*place, number)] = scores_of(method, errors, index, protocol["num_bins"])
        found[name] = table
    return found


def pairs(fits: dict[int, dict[int, Any]]) -> list[tuple[int, int]]:
    return [(run, seed) for run, seeds in fits.items() for seed in seeds]


def difference(cells: list[tuple[Values, Values]], score: int) -> dict[str, float]:
    """A method less another, the mean over cells, with a 95 % interval over rows and runs.

    The error of a cell has two parts, as in `calibration.compare_groups`: the variance of the mean over runs and seeds
    under resampled rows, and that of the runs' differences over their number. Student's t by Welch and Satterthwaite.
    """
    means, variances, freedoms = [], [], []
    for a, b in cells:
        gaps = np.nanmean((a - b)[..., score], axis=1)  # over seeds: (runs, 1 + resamples)
        means.append(gaps[:, 0].mean())
        rows = float(np.nanvar(gaps[:, 1:].mean(axis=0), ddof=1))
        runs = float(np.var(gaps[:, 0], ddof=1) / len(gaps)) if len(gaps) > 1 else 0.0
        variances += [rows, runs]
        freedoms += [gaps.shape[1] - 2, max(len(gaps) - 1, 1)]
    total = sum(variances)
    df = total**2 / sum(v**2 / f for v, f in zip(variances, freedoms, strict=True)) if total else np.inf
    half = float(stats.t.ppf(0.975, df) * np.sqrt(total) / len(cells)) if total else 0.0
    mean = float(np.mean(means))
    return {"difference": round(mean, 5), "low": round(mean - half, 5), "high": round(mean + half, 5)}


def mean_of(values: np.ndarray) -> np.ndarray:
    """`(scores,)` means over the runs and seeds that have a score; NaN where none has."""
    flat = values.reshape(-1, values.shape[-1])
    count = np.isfinite(flat).sum(axis=0)
    return np.divide(np.nansum(flat, axis=0), count, out=np.full(len(count), np.nan), where=count > 0)


def ranks(cells: list[dict[str, Values]], names: list[str], score: int) -> dict[str, float]:
    """Mean rank of methods over cells, runs and seeds; 1 is best, ties share.
    The ranks of a run and seed are among the methods that were fitted there.
    """
    found = []
    for cell in cells:
        values = np.stack([cell[name][:, :, 0, score] for name in names], axis=-1).reshape(-1, len(names))
        found.append(stats.rankdata(-values if SCORES[score] in HIGHER else values, axis=1, nan_policy="omit"))
    return dict(zip(names, np.nanmean(np.concatenate(found), axis=0).round(2).tolist(), strict=True))


def summary(cells: dict[str, dict[str, Values]], reference: str) -> dict[str, Any]:
    """Means, differences to the reference and ranks of all methods that every cell has."""
    tables = list(cells.values())
    names = [name for name in tables[0] if all(name in table for table in tables)]
    found: dict[str, Any] = {}
    for name in names:
        points = np.mean([mean_of(table[name][:, :, 0]) for table in tables], axis=0)
        entry: dict[str, Any] = {s: round(float(v), 4) for s, v in zip(SCORES, points, strict=True) if np.isfinite(v)}
        for number, score in enumerate(SCORES):
            if score in entry and name != reference and score != "ece_own":
                both = [(table[name], table[reference]) for table in tables]
                entry[f"{score} against {reference}"] = difference(both, number)
        if "ece_own" in entry and name != reference:
            own = SCORES.index("ece_own")
            entry[f"ece_own against {reference}"] = difference(
                [(table[name], table[reference]) for table in tables], own
            )
        found[name] = entry
    for score in ("auroc", "aurc"):
        for name, value in ranks(tables, names, SCORES.index(score)).items():
            found[name][f"rank by {score}"] = value
    return found


def table(place: Path, protocol: dict[str, Any], sampled: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What all finished fits say, in distribution, by cell, and under shift."""
    fits = read_fits(place, protocol, sampled)
    reference = protocol["reference"].replace("_", " ")
    test = {cell: measured(runs, "test", protocol) for cell, runs in fits.items()}
    shifted = {}
    for cell, runs in fits.items():
        for part in next(iter(runs[0].values()))["errors"]:
            if part != "test":
                shifted[f"{cell} {part}"] = measured(runs, part, protocol)
    results = {
        "protocol": protocol,
        "fits": {cell: {"runs": len(runs), "seeds": len(next(iter(runs.values())))} for cell, runs in fits.items()},
        "rows": {cell: about(runs) for cell, runs in fits.items()},
        "in distribution": summary(test, reference),
        "cells": {name: summary({name: values}, reference) for name, values in {**test, **shifted}.items()},
        "seconds": seconds(fits),
        "base score stayed": stayed(fits),
    }
    if shifted:
        results["shifted"] = summary(shifted, reference)
    whole = all(name in results["in distribution"] for name in ("head v2, own rows", "RDE, normalised"))
    return results | ({"claims": claims(results, test)} if whole else {})


def about(runs: dict[int, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """Errors of a cell: the rate on test rows, and how many there are to learn from."""
    every = [fit for seeds in runs.values() for fit in seeds.values()]
    rates = {part: np.mean([np.mean(fit["errors"][part]) for fit in every]) for part in every[0]["errors"]}
    counts = {name: float(np.mean([fit["fit_errors"][name] for fit in every])) for name in every[0]["fit_errors"]}
    found: dict[str, Any] = {
        "error_rate": {part: round(float(rate), 4) for part, rate in rates.items()},
        "errors_to_learn_from": {name: round(count, 1) for name, count in counts.items()},
    }
    if every[0].get("accuracy_of_ensemble") is not None:
        found["error_rate_of_ensemble"] = round(1 - every[0]["accuracy_of_ensemble"], 4)
    return found


def every_fit(fits: Fits) -> list[dict[str, Any]]:
    return [fit for runs in fits.values() for seeds in runs.values() for fit in seeds.values()]


def seconds(fits: Fits) -> dict[str, float]:
    """Of CPU, the mean of a fit and its scores of all test rows."""
    every = every_fit(fits)
    spent = {name: [fit["seconds"][name] for fit in every if name in fit["seconds"]] for name in every[0]["seconds"]}
    return {name: round(float(np.mean(values)), 2) for name, values in spent.items()}


def stayed(fits: Fits) -> dict[str, float]:
    """Share of fits in which a head was not trained or not taken, and the frozen model's score stayed."""
    every = every_fit(fits)
    heads = [name for name, of in every[0]["methods"].items() if "about" in of]
    return {
        name: float(np.mean([f["methods"][name]["about"]["why_base"] is not None for f in every])) for name in heads
    }


def said(d: dict[str, float], scale: float) -> str:
    digits = 1 if scale > 1 else 3
    low, mean, high = (f"{scale * d[key]:+.{digits}f}" for key in ("low", "difference", "high"))
    return f"{mean} [{low}, {high}]"


def claims(results: dict[str, Any], test: dict[str, dict[str, Values]]) -> dict[str, dict[str, Any]]:
    """The five claims of the specification, each with what was found and whether it held here."""
    pooled = results["in distribution"]
    tables = list(test.values())
    auroc, own = SCORES.index("auroc"), SCORES.index("ece_own")

    def against(a: str, b: str, score: int = auroc) -> dict[str, float]:
        return difference([(table[a], table[b]) for table in tables], score)

    v1, v2, response = "head v1 (AdUE)", "head v2 (ALIEN)", "softmax response"
    distances = [name for name in pooled if name.startswith(("MD", "RMD", "RDE"))]
    among = ranks(tables, [v1, response, *distances], auroc)
    first = {name: against(v1, name) for name in (response, *distances)}
    second = against(v1, response, own)
    tempered = against(v1, "softmax response, tempered", own)
    third = {
        "all terms over BCE only": against(v2, "head v2, BCE only"),
        "BCE only over random": against("head v2, BCE only", "head v2, random, BCE only"),
    }
    others = [name for name in pooled if not name.startswith("head")]
    fourth = {name: against(v2, name) for name in others}
    by_rank = ranks(tables, [v2, *others], auroc)
    eces = {name: entry["ece"] for name, entry in pooled.items() if "ece" in entry and not name.startswith("head")}
    eces[v2] = pooled[v2]["ece_own"]
    fifth = {name: against(name, "entropy") for name in (v2, "head v2, few rows", "head v2, own rows")}
    place = sorted(by_rank, key=by_rank.__getitem__).index("entropy") + 1
    first_note = f"best mean rank of these: {min(among, key=among.__getitem__)}; {v1} has {among[v1]}"
    second_note = f"ECE as it is {said(second, 1)}; against the response with a temperature {said(tempered, 1)}"
    fourth_note = f"best mean rank: {min(by_rank, key=by_rank.__getitem__)}; lowest ECE: "
    fourth_note += f"{min(eces, key=eces.__getitem__)}, {min(eces.values()):.3f} against {eces[v2]:.3f}"
    few = said(fifth["head v2, few rows"], 100)
    return {
        "1 AdUE beats the softmax response and the distances": {
            "held": min(among, key=among.__getitem__) == v1 and all(d["low"] > 0 for d in first.values()),
            "note": first_note,
            "mean ranks": among,
            "differences": first,
        },
        "2 AdUE is better calibrated than the softmax response": {
            "held": second["high"] < 0,
            "note": second_note,
            "ece as it is": second,
            "ece against the tempered response": tempered,
        },
        "3 both regularisers beat BCE only, which beats a random head": {
            "held": all(d["low"] > 0 for d in third.values()),
            "note": "; ".join(f"{name} {said(d, 100)} points" for name, d in third.items()),
            "differences": third,
        },
        "4 ALIEN is best, and has the lowest ECE": {
            "held": all(d["low"] > 0 for d in fourth.values()) and min(eces, key=eces.__getitem__) == v2,
            "note": fourth_note,
            "mean ranks": by_rank,
            "differences": fourth,
            "ece": eces,
        },
        "5 entropy is second, and beats the head on the smallest sets": {
            "held": place == 2 and fifth["head v2, own rows"]["difference"] < 0,
            "note": f"entropy has place {place} of {len(by_rank)}; the head on few rows less entropy {few} points",
            "rank of entropy": place,
            "head less entropy": fifth,
        },
    }
