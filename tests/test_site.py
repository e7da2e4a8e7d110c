"""The pages of docs/ as a site: every page has its place, figures have their source, and it builds strictly."""

import json
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GENERATED = {"contributing.md", "changelog.md", "commands.md"}


def pages_of(nav: list) -> list[str]:
    found = []
    for entry in nav:
        inside = next(iter(entry.values())) if isinstance(entry, dict) else entry
        found += pages_of(inside) if isinstance(inside, list) else [inside]
    return found


def number(value: float, digits: int) -> str:
    """As the pages write it: without a zero before the point."""
    return f"{abs(value):.{digits}f}".replace("0.", ".", 1)


def page(name: str) -> str:
    return " ".join((ROOT / "docs" / name).read_text().split())


def test_every_page_has_its_place():
    settings = (ROOT / "mkdocs.yml").read_text()
    listed = {name for name in pages_of(yaml.safe_load(settings)["nav"]) if not name.startswith("reference/")}
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")} | GENERATED
    assert "strict: true" in settings


def test_the_figures_of_the_front_page_are_those_of_its_picture():
    found = json.loads((RESULTS / "front_picture.json").read_text())
    text = page("index.md")
    for stage in ("before", "after"):
        for score in ("nll", "ece", "accuracy"):
            assert number(found[stage][score], 3) in text, (stage, score)
    assert f"temperature of {found['temperature']:.2f}" in text
    assert f"{found['rows']} rows it has not seen" in text
    assert found["before"]["accuracy"] == found["after"]["accuracy"]


def test_the_figures_that_choose_a_method_are_those_of_the_evidence():
    text, evidence = page("which-method.md"), json.loads((RESULTS / "moments.json").read_text())
    inside = evidence["in distribution"]["mean over cells"]["members"]["nll"]
    shifted = evidence["shifted"]["mean over cells"]["members"]["nll"]
    first = json.loads((RESULTS / "evidence.json").read_text())["in distribution"]["mean over cells"]["members"]["nll"]
    for found in (inside, shifted, first):
        sign, ends = "-" if found["difference"] < -0.0005 else "+", (found["low"], found["high"])
        low, high = (f"{'-' if end < 0 else '+'}{number(end, 3)}" for end in ends)
        assert f"{sign}{number(found['difference'], 3)} nats [{low}, {high}]" in text
    assert evidence["decision"]["members"]["nll lower"] is True
    assert evidence["decision"]["members"]["brier lower"] is False
    head = re.search(r"\*\*head \(default\)\*\*: (\S+ \[[^]]*\])", page("uncertainty-head.md"))
    assert head is not None
    said, interval = head[1].split(" ", 1)
    assert f"{said} points of AUROC {interval}" in text


def test_the_figures_of_members_are_those_of_the_evidence():
    text = page("ensemble-lora.md")

    def said(found: dict) -> str:
        ends = [f"{'-' if found[end] < 0 else ''}{number(found[end], 3)}" for end in ("low", "high")]
        return f"{'-' if found['difference'] < 0 else ''}{number(found['difference'], 3)} [{', '.join(ends)}]"

    for file, methods in (("evidence.json", ["members"]), ("moments.json", ["members", "members, moments"])):
        results = json.loads((RESULTS / file).read_text())
        for method in methods:
            scores = results["in distribution"]["mean over cells"][method]
            assert said(scores["nll"]) in text, (file, method)
            assert method != "members" or said(scores["brier"]) in text, file
    assert said(results["shifted"]["mean over cells"]["members"]["nll"]) in text


def test_the_figures_of_three_members_and_of_all_members_are_those_of_the_evidence():
    names = ("evidence", "moments", "three_members", "three_members_again", "three_members_more_steps")
    protocols = [json.loads((RESULTS / f"{name}.json").read_text()) for name in names]
    keys, found, methods = ("difference", "low", "high"), [], [next(iter(one["decision"])) for one in protocols]
    for three, method in zip(protocols[2:], methods[2:], strict=True):
        here, there = (three[title]["mean over cells"][method] for title in ("in distribution", "shifted"))
        found += [[d[key] for key in keys] for d in (here["nll"], here["brier"], there["nll"])]
    here = protocols[3]["in distribution"]["mean over cells"][methods[3]]
    lower = {
        score: [number(here[score][key], 3) for key in ("difference", "high", "low")] for score in ("nll", "brier")
    }
    readme = " ".join((ROOT / "README.md").read_text().split())
    for score, name, said in (("nll", "NLL", "95 %: "), ("brier", "Brier score", "")):
        mean, low, high = lower[score]
        assert f"{name} {mean} lower ({said}{low} to {high})" in readme
    more = protocols[4]["in distribution"]["mean over cells"][methods[4]]
    nll, ece = (number(more[score]["difference"], 3) for score in ("nll", "ece"))
    assert f"With twice the steps their NLL is {nll} lower and their ECE {ece}," in readme
    together = runpy.run_path(str(ROOT / "benchmarks" / "evidence_page.py"))["together"]
    everything = together(protocols, "in distribution")["members, two or three"]
    found += [everything["nll"], everything["brier"]]
    for name in ("which-method.md", "ensemble-lora.md"):
        text = page(name).replace(" nats [", " [").replace("+", "")
        for figures in found:
            mean, low, high = (f"{'-' if x < 0 else ''}{number(x, 3)}" for x in figures)
            assert f"{mean} [{low}, {high}]" in text, (name, figures)
    missed = [
        [clause for clause, holds in three["decision"][method].items() if not holds]
        for three, method in zip(protocols[2:], methods[2:], strict=True)
    ]
    assert missed == [["brier lower"], [], ["brier lower", "accuracy at most .005 lower"]]


def test_the_figures_of_two_loras_are_those_of_the_evidence():
    """The differences are to two LoRAs there, and of two LoRAs on the pages."""
    results = json.loads((RESULTS / "two_loras.json").read_text())
    lora = results["in distribution"]["mean over cells"]["lora"]

    def turned(score: str) -> str:
        d = lora[score]
        signs = (f"{'-' if -d[end] < 0 else ''}{number(d[end], 3)}" for end in ("difference", "high", "low"))
        return "{} [{}, {}]".format(*signs)

    for name in ("which-method.md", "ensemble-lora.md"):
        text = page(name).replace(" nats [", " [")
        assert turned("nll") in text and turned("brier") in text, name
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert (
        f"better in both ({number(lora['nll']['difference'], 3)} and {number(lora['brier']['difference'], 3)})"
        in readme
    )
    assert lora["accuracy"]["high"] < 0 < lora["ece"]["high"]
    assert results["shifted"]["mean over cells"]["lora"]["nll"]["high"] > 0
    members = results["in distribution"]["mean over cells"]["members"]["nll"]
    assert 0.65 < 1 - members["difference"] / lora["nll"]["difference"] < 0.75  # seven tenths
    assert f"{number(members['difference'], 3)} away in NLL" in page("ensemble-lora.md")


def test_the_first_remedy_is_that_of_the_unknown_type():
    first = re.search(r"^## (.*)$", (ROOT / "docs/troubleshooting.md").read_text(), flags=re.MULTILINE)
    assert first[1] == "`KeyError: 'BAYESIANLORA'`"


@pytest.mark.slow
@pytest.mark.skipif(
    not (find_spec("mkdocs") and find_spec("material") and find_spec("mkdocstrings")),
    reason="the docs extra is not installed",
)
def test_the_site_builds_and_a_warning_is_an_error(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    site = tmp_path / "site"
    assert "calibration_report" in (site / "reference" / "calibration.html").read_text()
    assert "push-metric" in (site / "commands.html").read_text()
    for file in site.glob("*.html"):  # nothing is fetched by who reads it
        assert not re.findall(r"<(?:script|link)[^>]*(?:src|href)=\"https?://", file.read_text()), file


def test_what_calibrating_a_posterior_did_is_what_was_measured():
    cells = json.loads((RESULTS / "posterior_scale.json").read_text())["cells"]
    parts = [part for cell in cells.values() for part in cell.values() if isinstance(part, dict)]
    assert [len(cells), {cell["scale"] for cell in cells.values()}] == [8, {0.0}]
    assert {part["chosen"]["difference"] for part in parts} == {0.0}
    gains = [-part["as trained"]["difference"] for part in parts]
    ends = f"{number(min(gains), 4)} to {number(max(gains), 3)}"
    told = f"on all {len(parts)} sets of rows, shifted ones included, by {ends} nats"
    assert min(gains) > 0 and told in page("bayesian-lora.md")
