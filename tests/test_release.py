"""What a release needs agrees with itself, and what is built is accepted by the index."""

import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from peft_calib import __version__

ROOT = Path(__file__).resolve().parents[1]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def test_the_changelog_and_the_citation_name_this_version_on_one_day():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == __version__
    assert citation["license"] == project["license"]
    first = re.search(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert first.groups() == (__version__, citation["date-released"])
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_the_release_runs_targets_that_exist_and_publishes_only_what_it_built():
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    assert workflow[True]["push"] == {"tags": ["v*"]}  # YAML 1.1 reads `on` as true
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    called = {name for step in build["steps"] for name in re.findall(r"make ([a-z-]+)", step.get("run", ""))}
    assert called == {"dist", "test"} <= TARGETS
    assert publish["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"}  # trusted publishing: there is no token to keep
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text()


@pytest.mark.parametrize("form", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem)
def test_issue_forms_are_forms(form):
    content = yaml.safe_load(form.read_text())
    if form.stem == "config":
        assert set(content) <= {"blank_issues_enabled", "contact_links"}
        return
    assert {"name", "description", "body"} <= set(content)
    names = [part["id"] for part in content["body"]]
    assert len(set(names)) == len(names)
    for part in content["body"]:
        assert part["attributes"]["label"]


@pytest.mark.skipif(not (find_spec("build") and find_spec("twine")), reason="build and twine are not installed")
def test_wheel_and_source_distribution_are_accepted(tmp_path):
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(lambda name: not name.startswith("benchmarks/"), listed.stdout.splitlines()):
        if (ROOT / name).is_file():
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "source" / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist")]
    subprocess.run([*build, str(tmp_path / "source")], check=True, capture_output=True)
    files = sorted((tmp_path / "dist").iterdir())
    assert [file.suffix for file in files] == [".whl", ".gz"]
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, files)], check=True)
