"""The comparison with a LoRA and its temperature: runs, table, decision and page, on an effect whose sign is known."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "evidence.py"


def script(name: str):
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def evidence():
    return script("evidence")


def of(**differences: tuple[float, float, float]) -> dict:
    return {
        score: {"difference": d, "low": low, "high": high, "a": 0.5 + d, "b": 0.5, "run_sd_a": 0.01, "run_sd_b": 0.02}
        for score, (d, low, high) in differences.items()
    }


BETTER = of(
    accuracy=(0.0, -0.01, 0.01), nll=(-0.03, -0.05, -0.01), brier=(-0.01, -0.02, -0.001), ece=(0.0, -0.01, 0.01)
)


ABOUT: dict = {
    "protocol": {
        "baseline": "lora",
        **dict.fromkeys(("question", "decision", "seeds", "excluded", "learning_rate"), "so"),
    },
    "decision": {"b": {"nll lower": True}},
}


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, []),
        (of(nll=(-0.03, -0.07, 0.01)), ["nll lower"]),
        (of(brier=(0.01, 0.001, 0.02)), ["brier lower"]),
        (of(accuracy=(-0.006, -0.01, 0.01)), ["accuracy at most .005 lower"]),
        (of(ece=(0.02, 0.01, 0.03)), ["ece not higher"]),
    ],
)
def test_every_clause_of_the_rule_can_fail(evidence, change, missed):
    results = {"in distribution": {"mean over cells": {"members": BETTER | change}}}
    found = evidence.decided(results)["members"]
    assert [clause for clause, holds in found.items() if not holds] == missed


def test_shifted_rows_are_a_clause_where_there_are_some(evidence):
    worse = {"members": BETTER | of(nll=(0.03, 0.01, 0.05))}
    results = {"in distribution": {"mean over cells": {"members": BETTER}}, "shifted": {"mean over cells": worse}}
    assert evidence.decided(results)["members"]["shifted nll not higher"] is False


def test_the_page_is_what_the_results_say(evidence):
    assert evidence.PAGE.read_text(encoding="utf-8") == evidence.page(evidence.stored_results())


def test_the_page_of_claims_is_what_the_results_say():
    claims = script("claims")
    results = json.loads((SCRIPT.parent / "results" / "claims.json").read_text(encoding="utf-8"))
    assert claims.PAGE.read_text(encoding="utf-8") == claims.page(results, claims.stored_results())


def test_the_page_of_costs_is_what_the_results_say():
    cost = script("cost_page")
    assert cost.PAGE.read_text(encoding="utf-8") == cost.page(cost.stored_results())


def test_cells_of_two_protocols_are_one_mean_by_their_numbers(evidence):
    """Their runs are independent, and their test rows, as far as they are known, may be the same."""
    mine = {score: d | {"error_rows": 0.0, "error_runs": 0.01} for score, d in BETTER.items()}
    first = {"in distribution": {"mean over cells": {"a": mine, "b": mine}, "cells": {key: {} for key in "abc"}}}
    other = mine | {"nll": of(nll=(0.01, -0.02, 0.04))["nll"] | {"error_rows": 3.0, "error_runs": 4.0}}
    second = {"in distribution": {"mean over cells": {"b": other}, "cells": {"x": {}}}}
    found = sys.modules["evidence_page"].together([first, second], "in distribution")
    half = ((0.75 * 0.02) ** 2 + (0.25 * 0.8 * 0.03) ** 2 + (0.25 * 0.6 * 0.03) ** 2) ** 0.5
    assert set(found) == {"b"}
    assert found["b"]["nll"] == pytest.approx((-0.02, -0.02 - half, -0.02 + half))
    first["in distribution"]["mean over cells"]["b"] = BETTER  # of one that is not told in parts, all may be rows
    (mean, _, high) = sys.modules["evidence_page"].together([first, second], "in distribution")["b"]["nll"]
    assert high - mean == pytest.approx(((0.75 * 0.02 + 0.25 * 0.6 * 0.03) ** 2 + (0.25 * 0.8 * 0.03) ** 2) ** 0.5)
    assert evidence.page([first | ABOUT, second | ABOUT]).count("| b | in distribution |") == 4


def test_methods_of_one_kind_are_one_mean(evidence):
    two, three, more = sys.modules["evidence_page"].KINDS["members, two or three"]
    runs_alone = {score: d | {"error_rows": 0.0, "error_runs": 0.01} for score, d in BETTER.items()}
    parts = [
        {"in distribution": {"mean over cells": {m: runs_alone}, "cells": {"x": {}}}} for m in (two, three, two, more)
    ]
    found = sys.modules["evidence_page"].together(parts, "in distribution")
    half = BETTER["nll"]["high"] - BETTER["nll"]["difference"]
    for name, count in ((two, 2), ("members, two or three", 4)):
        mean, _, high = found[name]["nll"]
        assert (mean, high - mean) == pytest.approx((BETTER["nll"]["difference"], half / count**0.5))
    assert set(found) == {two, "members, two or three"}


def test_another_baseline_is_named_judged_by_no_rule_and_in_no_mean(evidence):
    found = {"in distribution": {"mean over cells": {"b": BETTER}, "cells": {"x": {}}}} | ABOUT
    other = found | {"protocol": ABOUT["protocol"] | {"baseline": "two LoRAs"}}
    text = evidence.page([found, other])
    assert "`b`: better, by every clause." in text and text.count("All cells together") == 0
    assert (
        "`b`: NLL -0.0300 [-0.0500, -0.0100], Brier score -0.0100 [-0.0200, -0.0010].\n\nBaseline: two LoRAs." in text
    )


@pytest.mark.slow
def test_the_road_from_runs_to_a_page_finds_a_known_effect_and_goes_on_where_it_stood(
    evidence, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "results.json"
    smoke = ["--protocol", str(SCRIPT.parent / "evidence" / "smoke.json"), "--runs", str(tmp_path / "runs")]

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["evidence.py", *arguments])
        evidence.main()
        return capsys.readouterr().out

    assert call("run", *smoke).count(" s\n") == 8
    assert " s\n" not in call("run", *smoke)
    call("table", *smoke, "--output", str(output))
    results = json.loads(output.read_text())
    untrained = results["in distribution"]["mean over cells"]["untrained"]
    assert untrained["brier"]["low"] > 0, untrained
    assert results["decision"]["untrained"]["brier lower"] is False
    assert "`untrained`: not shown to be better" in evidence.page([results])
