"""Run PEFT's own test suites on our methods (or, as a control, on a method of PEFT's).

python tests/conformance/run.py                       # all of ours
python tests/conformance/run.py --method bayesianlora
python tests/conformance/run.py --control vera        # the same tests for a built-in method
python tests/conformance/run.py --modules test_config -- -k save_pretrained -x
python tests/conformance/run.py --output FILE --no-longer-left-out  # what FILE leaves out and `cases.py` does not
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODULES = (
    "test_config",
    "test_custom_models",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_quantization",
    "test_seq_classifier",
    "test_token_classification_qa",
)
METHODS = ("hyperlora", "bayesianlora", "curvelora", "ensemblelora")
# upstream's markers; its filters would turn deprecations between PEFT and a newer transformers into failures
INI = """[pytest]
markers =
    single_gpu_tests: one GPU
    multi_gpu_tests: several GPUs
    regression: regression suite
    bitsandbytes: bitsandbytes integration
"""


def fetch_suites(cache: Path) -> Path:
    """Download the source distribution of the installed PEFT with pip and unpack it.

    Args:
        cache: Cache folder.

    Returns:
        Its top folder, in which `tests` is a package.
    """
    release = f"peft-{version('peft')}"
    root = cache / release
    if not (root / "tests" / "__init__.py").exists():
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:", "--no-deps"]
        download += ["--no-build-isolation", "--dest", str(cache), release.replace("-", "==")]
        subprocess.run(download, check=True)
        with tarfile.open(cache / f"{release}.tar.gz") as archive:
            archive.extractall(cache, filter="data")
        (root / "tests" / "__init__.py").touch()  # the suites import each other relatively
    return root


def run_module(
    module: str, method: str, suites: Path, models: Path, extra: str, pytest_args: list[str], only: list[str]
) -> dict:
    """Run one test module in a process of its own.

    Args:
        module: Its name.
        method: PEFT type.
        suites: Folder from `fetch_suites`.
        models: Folder from `models.build`; becomes the current directory.
        extra: JSON of arguments added to each of our cases.
        pytest_args: Passed on to pytest.
        only: Names of the tests to run; all of them if empty.

    Returns:
        Counts, names of failed tests, deselected tests with reasons, and what was answered for tests that were run.

    Raises:
        RuntimeError: If pytest could not collect or run the module.
    """
    with tempfile.TemporaryDirectory() as scratch:
        ini, result = Path(scratch) / "pytest.ini", Path(scratch) / "result.json"
        ini.write_text(INI)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-c",
            str(ini),
            "--rootdir",
            str(suites),
            "-p",
            "conformance_plugin",
        ]
        command += ["-p", "no:cacheprovider", "-q", str(suites / "tests" / f"{module}.py"), *pytest_args]
        environment = {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "CONFORMANCE_METHOD": method,
            "CONFORMANCE_EXTRA": extra,
            "CONFORMANCE_ONLY": json.dumps(only),
            "CONFORMANCE_RESULT": str(result),
        }
        print(f"\n{method} {module}", flush=True)
        status = subprocess.run(command, cwd=models, env=environment, check=False).returncode
        if status not in (0, 1):  # 1: some tests failed
            raise RuntimeError(f"pytest could not run {module} (exit status {status}); see its output above.")
        return json.loads(result.read_text())


def main() -> int:
    """Run the chosen modules on each method, print a table, write JSON; the exit status says if any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", default=METHODS, choices=METHODS, help="ours; all of them if omitted")
    parser.add_argument("--control", help="a built-in method instead, such as lora or vera")
    parser.add_argument("--modules", nargs="+", default=MODULES, choices=MODULES, metavar="MODULE")
    parser.add_argument("--extra", default="{}", help="JSON with further config fields for each case")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "peft_calib" / "conformance")
    parser.add_argument("--output", type=Path, help="JSON file for the counts; other methods' counts in it are kept")
    parser.add_argument(
        "--no-longer-left-out",
        action="store_true",
        help="only the tests that the output file lists as left out and that are not any more; added to its counts",
    )
    parser.add_argument("pytest_args", nargs="*", help="after --: passed on to pytest")
    options = parser.parse_args()
    cache = options.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    suites = fetch_suites(cache)
    from models import build  # imports torch and transformers

    models = build(cache)
    if options.no_longer_left_out:
        before = json.loads(options.output.read_text())
    failed = 0
    for method in [options.control] if options.control else options.method:
        method = method.upper()
        results = {}
        for module in options.modules:
            old, only = {}, []
            if options.no_longer_left_out:
                check_versions(before[method])
                old = before[method]["modules"][module]
                only = no_longer_left_out(old)
            if not only and old:
                results[module] = old
                continue
            found = run_module(module, method, suites, models, options.extra, options.pytest_args, only)
            results[module] = together(old, only, found) if old else found
        print(f"\n{method:32} passed failed skipped deselected")
        for module, counts in results.items():
            row = [counts["passed"], counts["failed"], counts["skipped"], len(counts["deselected"])]
            print(f"{module:32} " + " ".join(f"{number:6}" for number in row))
        if options.output is not None:
            write(options.output, method, results)
        failed += sum(counts["failed"] for counts in results.values())
    return int(failed > 0)


def no_longer_left_out(old: dict) -> list[str]:
    """The tests that a report of one module leaves out and `cases.py` does not name."""
    from cases import DESELECTED

    return [test for test in old["deselected"] if not any(part in test for part in DESELECTED)]


def together(old: dict, only: list[str], found: dict) -> dict:
    """The report of a module with tests that it left out and that have been run since."""
    ran = found["passed"] + found["failed"] + found["skipped"]
    if ran != len(only):
        raise RuntimeError(f"{ran} tests ran instead of the {len(only)} that were left out; run the module whole.")
    return {
        **{name: old[name] + found[name] for name in ("passed", "failed", "skipped")},
        "failures": sorted([*old["failures"], *found["failures"]]),
        "deselected": {test: why for test, why in old["deselected"].items() if test not in only},
        "adapted": {**old.get("adapted", {}), **found["adapted"]},
    }


def versions() -> dict[str, str]:
    """What the counts depend on."""
    return {name: version(name) for name in ("peft", "transformers", "torch")}


def check_versions(report: dict) -> None:
    """Refuse to add to counts that were made with other versions."""
    if report["versions"] != versions():
        raise SystemExit(f"The report is of {report['versions']}, here are {versions()}; run the suites whole.")


def write(path: Path, method: str, results: dict) -> None:
    """Put the counts of one method into the JSON file."""
    report = json.loads(path.read_text()) if path.exists() else {}
    report[method] = {"versions": versions(), "modules": results}
    path.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    sys.exit(main())
